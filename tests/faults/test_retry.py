"""A machine that is restarted under its commands: real processes, and a ledger they write.

The machine is a PID namespace whose first process is the server: when that is killed all goes with
it, and the next one is another instance.
"""

import os
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests.app.server import Api, Json, Server, open_api, open_state, until_async

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
# Each start says who it is, again and again; the gate lets it end.
SCRIPT = """
echo first words; printf 'half a li'
read me _ </proc/uptime
while [ ! -e {gate} ]; do echo "$me" >> {ledger}; sleep 0.02; done
echo last words
"""


def _machine() -> tuple[str, ...]:
    """The words that start a machine; a normal user needs a user namespace as well."""
    words = UNSHARE if os.geteuid() == 0 else (*UNSHARE, "--user", "--map-current-user")
    try:
        possible = (
            subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
        )
    except FileNotFoundError:
        possible = False
    return words if possible else ()


@pytest.fixture
def server(quick_place: Path, migrated_dsn: str) -> Iterator[Server]:
    """A server in a machine of its own; its database is elsewhere."""
    settings = {"RDEV_DATABASE_DSN": migrated_dsn, "RDEV_DRAIN_DELAY_S": "0"}
    with open_state(quick_place, **settings) as server:
        server.within = _machine()
        if not server.within:
            pytest.skip("no PID namespace can be made here")
        server.start()
        yield server
        server.kill()


def _script(server: Server) -> str:
    return SCRIPT.format(gate=server.state_dir / "gate", ledger=server.state_dir / "ledger")


def _starts(server: Server) -> list[tuple[str, int]]:
    """Who wrote to the ledger, and how many lines in a row."""
    ledger = server.state_dir / "ledger"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return [(who, len(list(run))) for who, run in groupby(lines)]


async def _works(server: Server, starts: int) -> None:
    await until_async(
        lambda: len(found := _starts(server)) == starts and found[-1][1] > 5, "it works"
    )


async def _restart(server: Server) -> None:
    """Restart the machine."""
    server.kill()
    await until_async(lambda: not server.processes(), "everything is gone")
    server.start()


async def _statuses(api: Api, command: str) -> list[tuple[object, object]]:
    events = [event.data for event in await api.events(command) if event.name == "status"]
    return [(event["status"], event["attempt"]) for event in events]


@pytest.mark.slow
async def test_a_command_that_may_be_retried_survives_its_machine(server: Server) -> None:
    async with open_api(server) as api:
        await api.project()
        command = await api.submit(_script(server), retry="safe")
        await _works(server, 1)
    await _restart(server)
    await _works(server, 2)
    (server.state_dir / "gate").touch()
    async with open_api(server) as api:
        ended = await api.ended(command)
        assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
        assert await _statuses(api, command) == [
            ("queued", 0),
            ("running", 1),
            ("queued", 1),
            ("running", 2),
            ("succeeded", 2),
        ]
        await _check_output(api, server, command, ended)
    # Whoever began second wrote only after the last word of the first.
    starts = [who for who, _ in _starts(server)]
    assert len(starts) == 2 == len(set(starts))


async def _check_output(api: Api, server: Server, command: str, ended: Json) -> None:
    """What is said of output is the last attempt's; the stream holds all of it."""
    whole = b"first words\nhalf a lilast words\n"
    assert await api.output(command) == whole
    assert await api.output(command, tail_bytes=12) == whole[-12:]
    assert ended["stdout_bytes"] == len(whole)
    events = await api.events(command)
    shown = [event.content for event in events if event.name == "output"]
    assert b"".join(shown) == b"first words\nhalf a li" + whole
    numbers = [event.seq for event in events if event.seq]
    assert numbers == list(range(1, len(numbers) + 1))
    for folder in (command, f"{command}.2"):
        assert (server.projects / ".commands" / folder / "go").is_dir()


@pytest.mark.slow
async def test_a_command_that_may_not_is_lost_with_its_machine(server: Server) -> None:
    async with open_api(server) as api:
        await api.project()
        command = await api.submit(_script(server))
        await _works(server, 1)
    await _restart(server)
    async with open_api(server) as api:
        ended = await api.ended(command)
        # A later command of the same lane runs, so nothing of the first is still to come.
        assert (await api.run("true"))["status"] == "succeeded"
    assert (ended["status"], ended["reason"], ended["attempt"]) == ("lost", "supervisor_gone", 1)
    assert ended["may_still_run"] is False
    assert len(_starts(server)) == 1


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(300)
async def test_a_machine_that_restarts_for_ever_ends_its_command_after_three_attempts(
    server: Server,
) -> None:
    async with open_api(server) as api:
        await api.project()
        command = await api.submit(_script(server), retry="safe")
    for attempt in (1, 2, 3):
        await _works(server, attempt)
        await _restart(server)
    async with open_api(server) as api:
        ended = await api.ended(command)
    assert (ended["status"], ended["attempt"]) == ("lost", 3)
    assert len({who for who, _ in _starts(server)}) == len(_starts(server)) == 3
