"""The receivers of docs/api/webhooks.md, run as they stand, before the real sender."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from rdev.adapters.webhooks.ed25519 import PrivateKey
from rdev.domain.sending import OutgoingRequest
from rdev.domain.signing import Secret, sign
from rdev.domain.webhook_targets import parse_target

PAGE = (Path(__file__).parents[3] / "docs" / "api" / "webhooks.md").read_text()
SECRET = Secret(key=bytes(range(32)))
DEADLINE_S = 60


def sample(language, word):
    """The page's program in which this word stands."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (code,) = (code for code in found if word in code)
    return code


@pytest.fixture
def in_python(tmp_path):
    (tmp_path / "receiver.py").write_text(sample("python", "class Receiver"))
    return [sys.executable, str(tmp_path / "receiver.py")]


@pytest.fixture
def in_javascript(node_folder):
    (node_folder / "receiver.mjs").write_text(sample("js", "createServer("))
    return [shutil.which("node"), str(node_folder / "receiver.mjs")]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["python", "javascript"])
async def test_a_receiver_of_the_documentation_verifies_and_takes_an_event_once(
    language, request, sender_of
):
    argv = request.getfixturevalue(f"in_{language}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WEBHOOK_SECRET": SECRET.text, "PORT": str(port), "PATH": "/usr/bin:/bin"}
    receiver = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        await until_listening(port, receiver)
        sender = sender_of()
        old, foreign = Secret(key=bytes(32)), Secret(key=bytes(64))
        statuses = [
            (await sender.send(delivery(port, signers))).status
            for signers in ([SECRET], [old, SECRET], [foreign], [SECRET])
        ]
        stale = delivery(port, [SECRET], age_s=400)
        statuses.append((await sender.send(stale)).status)
        assert sender.statistics().dialled == 1  # both keep their connection
    finally:
        receiver.terminate()
        told, faults = receiver.communicate(timeout=DEADLINE_S)

    assert statuses == [200, 200, 400, 200, 400], faults
    assert told == "command.completed cmd_01\n"


async def until_listening(port, receiver):
    with trio.fail_after(DEADLINE_S):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                assert receiver.poll() is None, receiver.stderr.read()
                await trio.sleep(0.05)
            else:
                await stream.aclose()
                return


def delivery(port, signers, *, age_s=0):
    body = json.dumps({"type": "command.completed", "data": {"command_id": "cmd_01"}}).encode()
    return OutgoingRequest(
        target=parse_target(f"http://127.0.0.1:{port}/"),
        headers=sign("evt_0190", int(time.time()) - age_s, body, signers),
        body=body,
    )


def test_the_example_on_the_page_has_the_headers_that_are_signed() -> None:
    (example,) = re.findall(r"```\nPOST (.*?)```", PAGE, re.DOTALL)

    for header in sign("evt_1", 1, b"", [SECRET]):
        assert f"\n{header}: " in example


def test_the_function_of_the_documentation_judges_v1a() -> None:
    words: dict[str, object] = {}
    exec(sample("python", "def is_signed"), words)
    is_signed, body = words["is_signed"], b'{"type": "ping"}'
    old, new, foreign = (PrivateKey(bytes([n]) * 32) for n in (1, 2, 3))
    headers = sign("evt_1", 1_800_000_000, body, [SECRET, new, old])
    for key in (old, new):
        assert is_signed(key.public.text, headers, body)
        assert not is_signed(key.public.text, headers, body + b" ")
        assert not is_signed(key.public.text, headers | {"webhook-id": "evt_2"}, body)
    assert not is_signed(foreign.public.text, headers, body)
    assert not is_signed(new.public.text, sign("evt_1", 1_800_000_000, body, [SECRET]), body)
