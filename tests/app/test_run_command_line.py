"""The command line against a real server: `rdev run` and its neighbours."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from threading import Thread

import httpx2
import pytest

from tests.app.server import ROOT, Api, Server, open_api, open_server, rdev, until

COMMAND_ID = re.compile(rb"cmd_[0-9a-f]{32}")


@pytest.fixture
def client(server: Server) -> dict[str, str]:
    """The environment of a client; the project `demo` exists."""
    headers = {"X-API-Key": server.key}
    url = server.url + "/projects"
    made = httpx2.post(url, json={"id": "demo"}, headers=headers, trust_env=False)
    assert made.status_code in (200, 201)
    return server.client_environment


def test_output_is_passed_on_byte_by_byte_and_kept_apart(
    client: dict[str, str], server: Server
) -> None:
    odd = b"a\r\n\0\xff\xfe\n\xc3\xa4\n\nno end"
    (server.projects / "demo" / "bytes").write_bytes(odd)
    done = rdev("run", "demo", "--", "cat bytes; cat bytes bytes >&2", environment=client)
    assert (done.returncode, done.stdout, done.stderr) == (0, odd, odd + odd)


def test_several_words_are_one_command_and_its_arguments(client: dict[str, str]) -> None:
    argv = ("printf", "[%s]", "a b", "$HOME", "'", "--flag")
    done = rdev("run", "demo", "--", *argv, environment=client)
    assert (done.returncode, done.stdout) == (0, b"[a b][$HOME]['][--flag]")


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_the_exit_code_is_passed_on(client: dict[str, str], script: str, status: int) -> None:
    assert rdev("run", "demo", "--", script, environment=client).returncode == status


def test_a_timeout_is_told(client: dict[str, str]) -> None:
    done = rdev("run", "--timeout", "1", "demo", "--", "sleep 60", environment=client)
    assert done.returncode == 143
    assert b"timed_out" in done.stderr


def test_detach_prints_the_id_and_nothing_else(client: dict[str, str]) -> None:
    done = rdev("run", "--detach", "demo", "--", "true", environment=client)
    assert done.returncode == 0
    assert COMMAND_ID.fullmatch(done.stdout.strip())


def test_a_refusal_is_one_line_and_exit_status_1(client: dict[str, str]) -> None:
    for environment, words in (
        (client, ("run", "nowhere", "--", "true")),
        (client | {"RDEV_KEY": "wrong"}, ("run", "demo", "--", "true")),
        (client | {"RDEV_URL": "http://127.0.0.1:1"}, ("run", "demo", "--", "true")),
        (client | {"RDEV_URL": "http://127.0.0.1:1"}, ("projects", "list")),
    ):
        refused = rdev(*words, environment=environment)
        assert refused.returncode == 1
        lines = refused.stderr.decode().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("rdev: ")


class HalfAway(BaseHTTPRequestHandler):
    """A proxy whose server is away when the stream is first asked for."""

    streams = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201, "application/json", b'{"data": {"id": "cmd_1"}}')

    def do_GET(self) -> None:
        HalfAway.streams += 1
        if HalfAway.streams == 1:
            self.answer(502, "text/html", b"<h1>Bad Gateway</h1>")
        else:
            data = b'{"status": "failed", "exit_code": 7, "signal": null}'
            self.answer(200, "text/event-stream", b"event: complete\ndata: " + data + b"\n\n")

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_proxy_that_says_its_server_is_away_is_waited_for() -> None:
    with HTTPServer(("127.0.0.1", 0), HalfAway) as proxy:
        thread = Thread(target=proxy.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        environment = {"PATH": "/usr/bin", "RDEV_URL": url, "RDEV_KEY": "k"}
        done = rdev("run", "demo", "--", "exit 7", environment=environment)
        proxy.shutdown()
        thread.join()
    assert (done.returncode, HalfAway.streams) == (7, 2), done.stderr


def test_a_reader_that_leaves_ends_the_program_quietly(client: dict[str, str]) -> None:
    done = subprocess.run(
        f"{sys.executable} -m rdev run demo -- seq 1000000 | head -n 2",
        shell=True, cwd=ROOT, env=client, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == b"1\n2\n"
    assert b"Traceback" not in done.stderr


def test_projects_are_made_and_listed(client: dict[str, str]) -> None:
    made = rdev("projects", "create", "by-hand", environment=client)
    assert (made.returncode, made.stdout) == (0, b"by-hand\tready\n")
    assert rdev("projects", "create", "by-hand", environment=client).returncode == 0
    listed = rdev("projects", "list", environment=client)
    assert b"by-hand\tready\t0 queued, 0 running\n" in listed.stdout
    assert (
        b'"id":"by-hand"' in rdev("projects", "list", "--output", "json", environment=client).stdout
    )
    assert rdev("projects", "create", "NOT-ONE", environment=client).returncode == 1


def test_settings_are_shown_without_their_secrets(server: Server) -> None:
    environment = server.environment | {
        "RDEV_DATABASE_DSN": "host=h user=u password=canary-pass",
        "RDEV_UNKNOWN_THING": "x",
    }
    shown = rdev("config", "show", environment=environment)
    assert shown.returncode == 0
    assert b"canary-pass" not in shown.stdout + shown.stderr
    assert server.key.encode() not in shown.stdout + shown.stderr
    assert b"admin_key = (secret)" in shown.stdout
    assert f"state_dir = {server.state_dir}".encode() in shown.stdout
    assert b"RDEV_UNKNOWN_THING" in shown.stderr


def test_version_and_migrate_status(server: Server) -> None:
    shown = rdev("version", environment=server.environment)
    assert re.fullmatch(rb"rdev \d+\.\d+\.\d+\n", shown.stdout)
    status = rdev("migrate", "status", environment=server.environment)
    assert status.returncode == 0
    assert status.stdout.startswith(b"0001\tapplied\t")
    assert rdev("migrate", "verify", environment=server.environment).returncode == 0
    assert rdev("migrate", "up", environment=server.environment).stdout == b"nothing to do\n"


def test_bad_usage_is_exit_status_2(server: Server) -> None:
    for words in (("run",), ("nope",), ("run", "demo"), ("migrate", "sideways")):
        assert rdev(*words, environment=server.client_environment).returncode == 2


async def test_it_survives_a_restart_of_the_server(quick_place: Path) -> None:
    with open_server(quick_place) as server:
        server.keep_port()
        async with open_api(server) as api:
            await api.project()
        gate = server.state_dir / "gate"
        script = (
            f"n=0; while [ ! -e {gate} ]; do n=$((n+1)); echo $n; echo e$n >&2; sleep 0.02; done;"
            " exit 7"
        )
        out = server.state_dir / "client.out"
        with out.open("wb") as sink:
            client = subprocess.Popen(
                [sys.executable, "-m", "rdev", "run", "demo", "--", script],
                cwd=ROOT, env=server.client_environment, stdin=subprocess.DEVNULL,
                stdout=sink, stderr=subprocess.PIPE,
            )  # fmt: skip
            for end in (SIGKILL, SIGTERM):
                size = out.stat().st_size
                until(lambda s=size: out.stat().st_size > s + 20, "lines come", server)
                server.end(end)
                server.start()
            size = out.stat().st_size
            until(lambda: out.stat().st_size > size + 20, "lines come", server)
            gate.touch()
            _, told = client.communicate(timeout=30)
        assert client.returncode == 7
        lines = out.read_bytes().splitlines()
        assert lines == [b"%d" % n for n in range(1, len(lines) + 1)]
        errors = [line for line in told.splitlines() if line.startswith(b"e")]
        assert errors == [b"e%d" % n for n in range(1, len(lines) + 1)]
        assert b"reconnecting" in told


@contextmanager
def on_terminal(environment: dict[str, str], script: str) -> Iterator["Terminal"]:
    """`rdev run` with a terminal of its own."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rdev", "run", "demo", "--", script],
        cwd=ROOT, env=environment, stdin=follower, stdout=follower, stderr=follower,
        start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    os.set_blocking(leader, False)
    terminal = Terminal(leader, process)
    try:
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(leader)


class Terminal:
    """What a person sees and types."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.seen = b""
        self._descriptor = descriptor

    def wait_for(self, text: bytes) -> None:
        until(lambda: text in self._look(), f"{text!r} is shown")

    def type(self, text: bytes) -> None:
        os.write(self._descriptor, text)

    def exit_status(self) -> int:
        def ended() -> bool:
            self._look()
            return self.process.poll() is not None

        until(ended, "it ends")
        return self.process.returncode

    def _look(self) -> bytes:
        try:
            self.seen += os.read(self._descriptor, 65_536)
        except (BlockingIOError, OSError):
            pass
        return self.seen


async def test_ctrl_c_asks_and_c_cancels(api: Api, server: Server) -> None:
    with on_terminal(server.client_environment, "echo begun; sleep 600") as terminal:
        terminal.wait_for(b"begun")
        terminal.process.send_signal(SIGINT)
        terminal.wait_for(b"[c]ancel it, [d]etach, or go [o]n?")
        found = COMMAND_ID.search(terminal.seen)
        assert found is not None
        terminal.type(b"c\n")
        assert terminal.exit_status() == 143
        assert b"cancelled" in terminal.seen
    assert (await api.command(found[0].decode()))["status"] == "cancelled"


async def test_ctrl_c_asks_and_d_detaches(api: Api, server: Server) -> None:
    with on_terminal(server.client_environment, "echo begun; sleep 600") as terminal:
        terminal.wait_for(b"begun")
        terminal.process.send_signal(SIGINT)
        terminal.wait_for(b"go [o]n?")
        found = COMMAND_ID.search(terminal.seen)
        assert found is not None
        terminal.type(b"d\n")
        assert terminal.exit_status() == 0
        assert b"goes on" in terminal.seen
    command = found[0].decode()
    assert (await api.command(command))["status"] == "running"
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_ctrl_c_asks_and_o_goes_on(api: Api, server: Server) -> None:
    gate = server.state_dir / "on"
    script = f"echo begun; while [ ! -e {gate} ]; do sleep 0.05; done; exit 5"
    with on_terminal(server.client_environment, script) as terminal:
        terminal.wait_for(b"begun")
        terminal.process.send_signal(SIGINT)
        terminal.wait_for(b"go [o]n?")
        terminal.type(b"o\n")
        gate.touch()
        assert terminal.exit_status() == 5


async def test_an_interrupt_without_a_terminal_leaves_the_command_running(
    api: Api, client: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rdev", "run", "demo", "--", "echo begun; sleep 600"],
        cwd=ROOT, env=client, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    found = COMMAND_ID.search(told)
    assert found is not None
    assert (await api.command(found[0].decode()))["status"] == "running"
    await api.http.delete(f"/commands/{found[0].decode()}")
    await api.ended(found[0].decode())
