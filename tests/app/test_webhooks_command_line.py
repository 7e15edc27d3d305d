"""`rdev webhooks`, against a real server and its own receiver."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import httpx2
import msgspec
import pytest

from tests.app.server import ROOT, Server, bare_environment, open_server, rdev, until


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    with open_server(quick_place, RDEV_WEBHOOK_ALLOW_NETS="127.0.0.0/8") as server:
        yield server


class Listener:
    """`rdev webhooks listen` in a process of its own."""

    def __init__(
        self, folder: Path, held: str, port: int = 0, variable: str = "WEBHOOK_SECRET"
    ) -> None:
        self.out, self.err = folder / "out", folder / "err"
        argv = [sys.executable, "-m", "rdev", "webhooks", "listen", "--output", "ndjson"]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*argv, "--bind", f"127.0.0.1:{port}"],
                cwd=ROOT,
                env=bare_environment() | {variable: held, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        until(lambda: "listening at" in self.err.read_text(), "it listens")

    @property
    def url(self) -> str:
        return self.err.read_text().split("listening at ")[1].split()[0]

    def events(self) -> list[dict[str, object]]:
        lines = self.out.read_text().splitlines()
        return [msgspec.json.decode(line, type=dict[str, object]) for line in lines]

    def end(self) -> None:
        # (A shell's background job, which a test run may be, ignores SIGINT.)
        self.process.send_signal(SIGTERM)
        self.process.wait(30)


def test_what_the_server_sends_the_listener_verifies_and_prints(
    server: Server, tmp_path: Path
) -> None:
    environment = server.client_environment
    # The port must be known before the secret is: listen with another one first.
    first = Listener(tmp_path, "whsec_" + "A" * 32)
    url = first.url
    try:
        made = rdev("webhooks", "create", url, "--event", "ping", environment=environment)
        assert made.returncode == 0, made.stderr
        hook = made.stderr.decode().split("\t")[0]
        assert rdev("webhooks", "test", hook, environment=environment).returncode == 0
        until(lambda: "refused: no signature" in first.err.read_text(), "it refuses")
        assert first.events() == []
    finally:
        first.end()

    port = int(url.rstrip("/").rpartition(":")[2])
    second = Listener(tmp_path, made.stdout.decode().strip(), port)
    try:
        delivery = rdev("webhooks", "test", hook, environment=environment).stdout.decode().strip()
        until(lambda: second.events(), "it prints")
        event = msgspec.convert(second.events()[0]["event"], dict[str, object])
        assert event["type"] == "ping"
        rdev("webhooks", "redeliver", delivery, environment=environment)
        until(lambda: any(one["again"] for one in second.events()), "it comes again")
    finally:
        second.end()
    listed = rdev("webhooks", "deliveries", hook, environment=environment).stdout.decode()
    assert f"{delivery}\t" in listed
    shown = rdev("webhooks", "list", "--output", "json", environment=environment)
    assert msgspec.json.decode(shown.stdout)[0]["id"] == hook
    assert (
        b"disabled (requested)" in rdev("webhooks", "disable", hook, environment=environment).stdout
    )
    assert rdev("webhooks", "delete", hook, environment=environment).returncode == 0
    assert rdev("webhooks", "list", environment=environment).stdout == b""


def test_with_v1a_the_listener_verifies_by_the_public_key(server: Server, tmp_path: Path) -> None:
    """Also while the key before signs too, and after the scheme was changed."""
    environment = server.client_environment
    first = Listener(tmp_path, "whsec_" + "A" * 32)
    first.end()
    url, port = first.url, int(first.url.rstrip("/").rpartition(":")[2])
    create = ("webhooks", "create", url, "--event", "ping")
    made = rdev(*create, "--signature-scheme", "v1a", environment=environment)
    assert made.returncode == 0, made.stderr
    hook = made.stderr.decode().split("\t")[0]
    listed = rdev("webhooks", "list", "--output", "json", environment=environment)
    (shown,) = (one for one in msgspec.json.decode(listed.stdout) if one["id"] == hook)
    assert shown["public_key"] == made.stdout.decode().strip()
    rotated = rdev("webhooks", "rotate-secret", hook, environment=environment)
    turned = rdev("webhooks", "use-scheme", hook, "v1", environment=environment)
    again = rdev("webhooks", "use-scheme", hook, "v1", environment=environment)
    assert turned.stdout.startswith(b"whsec_")
    assert (again.returncode, again.stdout) == (0, b"")

    listener = Listener(tmp_path, rotated.stdout.decode().strip(), port, "WEBHOOK_PUBLIC_KEY")
    try:
        assert rdev("webhooks", "test", hook, environment=environment).returncode == 0
        until(lambda: listener.events(), "it prints")
    finally:
        listener.end()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    listener = Listener(tmp_path, "whsec_" + "A" * 32)
    try:
        port = listener.url.rstrip("/").rpartition(":")[2]
        argv = [
            "webhooks",
            "listen",
            "--bind",
            f"127.0.0.1:{port}",
            "--secret",
            "whsec_" + "A" * 32,
        ]
        ended = rdev(*argv, environment=bare_environment())
        assert ended.returncode == 1
        assert len(ended.stderr.splitlines()) == 1
        # What is no HTTP, and what is nobody's, ends nothing.
        assert httpx2.post(listener.url, content=b"{}", trust_env=False).status_code == 400
        assert listener.process.poll() is None
    finally:
        listener.end()


@pytest.mark.parametrize(
    "held", [("--secret", "whsec_short"), ("--public-key", "whpk_short"), ("--public-key", "")]
)
def test_a_wrong_secret_or_key_is_one_line(held: tuple[str, str]) -> None:
    ended = rdev("webhooks", "listen", *held, environment=bare_environment())
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1


def test_a_listener_that_can_verify_nothing_does_not_start() -> None:
    ended = rdev("webhooks", "listen", environment=bare_environment())
    assert ended.returncode == 2
    assert b"--public-key" in ended.stderr


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_file_of_authorities_that_cannot_serve_is_one_line(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    environment = bare_environment() | {
        "RDEV_STATE_DIR": str(tmp_path / "state"),
        "RDEV_WEBHOOK_CA_FILE": os.fspath(path),
    }
    ended = rdev("serve", environment=environment)
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert "RDEV_WEBHOOK_CA_FILE" in line
