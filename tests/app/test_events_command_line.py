"""`rdev events` against a real server."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.app.server import ROOT, Api, Server, open_server, rdev, until


class Following:
    """What `rdev events` has printed so far, line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def lines(self) -> list[dict[str, object]]:
        whole = self._path.read_bytes().splitlines(keepends=True)
        return [msgspec.json.decode(line) for line in whole if line.endswith(b"\n")]


@contextmanager
def following(server: Server, *argv: str) -> Iterator[Following]:
    """`rdev events` while the block runs."""
    path = server.state_dir / "events.ndjson"
    with path.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "rdev", "events", "--output", "ndjson", *argv],
            cwd=ROOT,
            env=server.client_environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield Following(path)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_life_of_all_commands_is_followed_over_a_restart(quick_place: Path) -> None:
    with open_server(quick_place) as server:
        server.keep_port()
        environment = server.client_environment
        rdev("projects", "create", "demo", environment=environment)
        with following(server, "--after", "0") as shown:
            assert rdev("run", "demo", "--", "exit 3", environment=environment).returncode == 3
            until(lambda: len(shown.lines) == 3, "three events are shown", server)
            server.kill()
            server.start()
            assert rdev("run", "demo", "--", "exit 0", environment=environment).returncode == 0
            until(lambda: len(shown.lines) == 6, "three more are shown", server)
            assert [line["status"] for line in shown.lines] == [
                *("queued", "running", "failed"),
                *("queued", "running", "succeeded"),
            ]
            assert [line["event"] for line in shown.lines] == ["status", "status", "complete"] * 2
            assert len({line["id"] for line in shown.lines}) == 6


async def test_a_command_is_followed_to_its_end(server: Server, api: Api) -> None:
    command = await api.submit("echo x")
    await api.ended(command)
    done = rdev("events", command, environment=server.client_environment)
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.decode().splitlines()] == [
        ["status", "queued"],
        ["status", "running"],
        ["output", "stream=stdout"],
        ["status", "succeeded"],
        ["complete", "succeeded"],
    ]
    again = rdev("events", command, "--after", "5", environment=server.client_environment)
    assert (again.returncode, again.stdout) == (0, b"")


async def test_a_project_that_is_not_there_is_told(server: Server, api: Api) -> None:
    done = rdev("events", "--project", "nowhere", environment=server.client_environment)
    assert done.returncode == 1
    assert b"there is no project" in done.stderr
