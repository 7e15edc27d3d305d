"""Two servers that share a database and a projects folder: one service."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM

import pytest
import trio

from tests.app.server import (
    DEADLINE_S,
    Event,
    Server,
    open_api,
    open_server,
    output_of,
    seqs_of,
    until_async,
)


@pytest.fixture
def pair(quick_place: Path, migrated_dsn: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    settings = {
        "RDEV_DATABASE_DSN": migrated_dsn,
        "RDEV_PROJECTS_DIR": str(tmp_path / "projects"),
        "RDEV_LEASE_S": "2",
        "RDEV_DRAIN_DELAY_S": "0",
    }
    with ExitStack() as stack:
        one = stack.enter_context(open_server(quick_place, **settings))
        two = stack.enter_context(open_server(quick_place, **settings))
        yield one, two


def script(folder: Path) -> str:
    return (
        f"echo started >> {folder}/ledger; n=0\n"
        f"while [ ! -e {folder}/gate ]; do n=$((n+1)); echo line $n; sleep 0.02; done"
    )


async def watch(server: Server, command: str, into: list[Event]) -> None:
    async with open_api(server) as api, api.stream(command) as events:
        async for event in events:
            into.append(event)


async def test_what_runs_here_is_seen_there_line_by_line(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    one, two = pair
    seen: dict[str, list[Event]] = {"one": [], "two": []}
    async with open_api(one) as api:
        await api.project()
        command = await api.submit(script(tmp_path))
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, one, command, seen["one"])
                nursery.start_soon(watch, two, command, seen["two"])
                for wanted in (20, 60):
                    await until_async(
                        lambda w=wanted: all(len(events) > w for events in seen.values()),
                        "both see the lines while it runs",
                    )
                (tmp_path / "gate").touch()
        assert [event for event in seen["one"] if event.seq] == [
            event for event in seen["two"] if event.seq
        ]
        assert seqs_of(seen["two"]) == list(range(1, len(seen["two"])))
    assert (tmp_path / "ledger").read_text() == "started\n"


async def test_a_cancel_there_ends_what_runs_here(pair: tuple[Server, Server]) -> None:
    async with open_api(pair[0]) as one, open_api(pair[1]) as two:
        await one.project()
        commands = [await one.submit("sleep 600") for _ in range(4)]
        for command in commands:
            await two.running(command)
            assert (await two.http.delete(f"/commands/{command}")).status_code == 202
        for command in commands:
            shown = await one.ended(command)
            assert (shown["status"], shown["kill"]["confirmed"]) == ("cancelled", True)


async def test_a_killed_server_is_taken_over_within_the_lease(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    one, two = pair

    async with open_api(one) as api:
        await api.project()
        command = await api.submit(script(tmp_path))
        await api.running(command)
    holder, other = await who_runs(command, one, two)
    seen: list[Event] = []
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, other, command, seen)
            await until_async(lambda: len(seen) > 20, "the other one shows its lines")
            holder.kill()
            await until_async(lambda: observes(other, command), "it is taken over")
            count = len(seen)
            await until_async(lambda: len(seen) > count + 20, "the lines go on")
            (tmp_path / "gate").touch()
    written = (tmp_path / "projects" / ".commands" / command / "out").read_bytes()
    assert output_of(seen) == written
    assert seqs_of(seen) == list(range(1, len(seen)))
    assert seen[-1].name == "complete"
    assert seen[-1].data["status"] == "succeeded"
    async with open_api(other) as api:
        assert (await api.command(command))["attempt"] == 1
    assert (tmp_path / "ledger").read_text() == "started\n"


async def test_a_stopped_server_hands_over_at_once(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    one, two = pair
    async with open_api(one) as api:
        await api.project()
        command = await api.submit(script(tmp_path))
        await api.running(command)
    holder, other = await who_runs(command, one, two)
    assert holder.end(SIGTERM) == 0
    await until_async(lambda: observes(other, command), "it is taken over")
    (tmp_path / "gate").touch()
    async with open_api(other) as api:
        assert (await api.ended(command))["status"] == "succeeded"
    assert (tmp_path / "ledger").read_text() == "started\n"


async def who_runs(command: str, one: Server, two: Server) -> tuple[Server, Server]:
    """The server that runs the command, then the other."""
    await until_async(
        lambda: observes(one, command) or observes(two, command), "somebody runs the command"
    )
    return (one, two) if observes(one, command) else (two, one)


def observes(server: Server, command: str) -> bool:
    """Whether a process that the server started, and that lives, names the command."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == server.pid and command in (entry / "cmdline").read_text():
                    return True
            except (OSError, UnicodeDecodeError):
                continue
    return False
