"""How a server ends, and how the next one goes on, with real signals and kills."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGQUIT, SIGTERM, signal

import pytest
import trio

from rdev.app import ONE_SIGNAL_S
from tests.app.server import (
    DEADLINE_S,
    Api,
    Event,
    Server,
    open_api,
    open_server,
    open_state,
    output_of,
    probe,
    seqs_of,
    until,
    until_async,
)

# Numbered lines with the ledger of starts; ends when the gate is there.
COUNTING = """
echo started >> {ledger}
n=0
while [ ! -e {gate} ]; do n=$((n+1)); echo "line $n"; echo "error $n" >&2; sleep 0.01; done
echo last
"""


@pytest.fixture
def own(quick_place: Path) -> Iterator[Server]:
    """A ready server of this test's own."""
    with open_server(quick_place) as server:
        yield server


def journal(server: Server, command: str, name: str = "out") -> bytes:
    """What the command itself wrote."""
    return (server.projects / ".commands" / command / name).read_bytes()


def counting(server: Server) -> str:
    return COUNTING.format(ledger=server.state_dir / "ledger", gate=server.state_dir / "gate")


async def read_until(
    api: Api, command: str, seen: list[Event], *, lines: int, last_id: int | None = None
) -> None:
    """Read the stream until so many more events of output came."""
    wanted = len(seen) + lines
    with trio.fail_after(DEADLINE_S):
        async with api.stream(command, last_id=last_id) as events:
            async for event in events:
                if event.seq is not None:
                    seen.append(event)
                if len(seen) >= wanted:
                    return


async def finish(server: Server, command: str, seen: list[Event]) -> None:
    """Open the gate, read the rest, and compare everything with the journals."""
    (server.state_dir / "gate").touch()
    async with open_api(server) as api:
        rest = await api.events(command, last_id=seen[-1].seq)
        assert rest[0].data["reconnecting"] is True
        whole = seen + rest[1:]
        assert seqs_of(whole) == list(range(1, len(whole) + 1))
        assert output_of(whole) == journal(server, command)
        assert output_of(whole, "stderr") == journal(server, command, "err")
        assert whole[-1].name == "complete"
        assert whole[-1].data["status"] == "succeeded"
        assert [event for event in await api.events(command) if event.seq] == whole
    assert (server.state_dir / "ledger").read_text() == "started\n"


async def test_a_killed_server_goes_on_where_its_clients_are(own: Server) -> None:
    async with open_api(own) as api:
        await api.project()
        command = await api.submit(counting(own))
        seen: list[Event] = []
        await read_until(api, command, seen, lines=40)
    own.kill()
    own.start()
    async with open_api(own) as api:
        await read_until(api, command, seen, lines=40, last_id=seen[-1].seq)
    await finish(own, command, seen)


async def test_what_was_written_while_no_server_ran_is_read_by_the_next(own: Server) -> None:
    async with open_api(own) as api:
        await api.project()
        command = await api.submit(counting(own))
        seen: list[Event] = []
        await read_until(api, command, seen, lines=10)
    own.kill()
    (own.state_dir / "gate").touch()
    status = own.projects / ".commands" / command / "status"
    until(status.exists, "the command ends without a server")
    own.start()
    await finish(own, command, seen)


async def test_sigterm_leaves_the_command_to_the_next_server(own: Server) -> None:
    async with open_api(own) as api:
        await api.project()
        command = await api.submit(counting(own))
        seen: list[Event] = []
        await read_until(api, command, seen, lines=10)
        async with api.stream(command, last_id=seen[-1].seq) as events:
            with trio.fail_after(DEADLINE_S):
                assert (await anext(events)).name == "connected"
                own.signal(SIGTERM)
                last = [event async for event in events]
    assert own.wait() == 0
    assert (last[-1].name, last[-1].data) == ("disconnecting", {"reason": "draining"})
    assert last[-1].retry_ms is not None
    seen += last[:-1]
    size = len(journal(own, command))
    until(lambda: len(journal(own, command)) > size, "the command goes on")
    assert not [argv for argv in own.processes().values() if "postgres" in argv]
    own.start()
    await finish(own, command, seen)


async def test_sigterm_with_nothing_open_is_quick(own: Server) -> None:
    with trio.fail_after(10):
        assert await trio.to_thread.run_sync(own.end, SIGTERM) == 0
    assert own.processes() == {}


async def test_a_held_wait_does_not_hold_the_stop(own: Server) -> None:
    async with open_api(own) as api:
        await api.project()
        answers = []

        async def wait() -> None:
            answers.append(await api.post("/projects/demo/shell?wait=60", {"command": "sleep 60"}))

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                while not (found := (await api.get("/projects/demo/commands")).json()["data"]):
                    await trio.sleep(0.02)
                await api.running(found[0]["id"])
                own.signal(SIGTERM)
        assert answers[0].status_code == 201
        assert answers[0].json()["data"]["status"] == "running"
    assert own.wait() == 0
    own.start()
    # Ctrl-C ends what runs here: what is not taken over yet would go on, and wait for the next.
    async with open_api(own) as api:
        await api.http.delete(f"/commands/{found[0]['id']}")
        assert (await api.ended(found[0]["id"]))["status"] == "cancelled"


async def test_a_second_sigterm_ends_at_once(quick_place: Path) -> None:
    # A drain that nobody would wait for.
    with open_server(quick_place, RDEV_DRAIN_DELAY_S="600") as server:
        server.signal(SIGTERM)
        until(lambda: probe(server.url + "/ready") == 503, "it drains", server)
        time.sleep(ONE_SIGNAL_S)  # one that comes sooner is the first, told twice
        server.signal(SIGTERM)
        assert server.wait() == 0
        until(lambda: not server.processes(), "no process is left")


def test_a_signal_that_comes_twice_at_once_is_one(own: Server) -> None:
    own.signal(SIGTERM)
    own.signal(SIGTERM)
    assert own.wait() == 0
    assert "stopping at once" not in own.log


async def test_ctrl_c_ends_commands_and_leaves_no_process_behind(own: Server) -> None:
    async with open_api(own) as api:
        await api.project()
        commands = [await api.submit("sleep 4321 & echo up; wait") for _ in range(3)]
        queued = [await api.submit("sleep 4321") for _ in range(3)]
        for command in commands:
            await api.running(command)
    assert own.end(SIGINT) == 0
    until(lambda: not own.processes(), "no process is left")
    own.start()
    async with open_api(own) as api:
        for command in commands:
            shown = await api.command(command)
            assert (shown["status"], shown["kill"]["confirmed"]) == ("cancelled", True)
            assert (await api.events(command))[-1].name == "complete"
        for command in queued:
            await api.http.delete(f"/commands/{command}")
            assert (await api.ended(command))["status"] == "cancelled"


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_during_the_start_leaves_no_process_behind(quick_place: Path, number: int) -> None:
    with open_state(quick_place) as server:
        server.spawn()
        # initdb, or the database's start, is under way.
        until((server.state_dir / "postgres").exists, "the start is under way", server)
        server.signal(number)
        assert server.wait() == 0, server.log
        until(lambda: not server.processes(), "no process is left")
        server.start()


async def test_a_database_that_outlived_its_server_is_adopted(own: Server) -> None:
    pids = {pid for pid, argv in own.processes().items() if " -D " in argv}
    assert len(pids) == 1
    async with open_api(own) as api:
        await api.project("before")
    own.kill()
    own.start()
    assert {pid for pid, argv in own.processes().items() if " -D " in argv} == pids
    async with open_api(own) as api:
        assert (await api.get("/projects/before")).status_code == 200


async def test_ready_fails_before_the_streams_end_and_clients_come_back_apart(
    quick_place: Path,
) -> None:
    with open_state(quick_place, RDEV_DRAIN_DELAY_S="2") as server:
        server.start()
        streams: list[list[Event]] = [[] for _ in range(5)]
        async with open_api(server) as api:
            await api.project()
            gate = server.state_dir / "gate"
            command = await api.submit(f"while [ ! -e {gate} ]; do sleep 0.05; done")
            await api.running(command)

            async def follow(into: list[Event]) -> None:
                async with api.stream(command) as events:
                    async for event in events:
                        into.append(event)

            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    for into in streams:
                        nursery.start_soon(follow, into)
                    await until_async(lambda: all(len(s) > 1 for s in streams), "all watch")
                    server.signal(SIGTERM)
                    ready = partial(trio.to_thread.run_sync, probe, server.url + "/ready")
                    while await ready() != 503:
                        await trio.sleep(0.01)
                    # Whoever balances load knows before any client is sent away.
                    assert not any(e.name == "disconnecting" for s in streams for e in s)
        assert server.wait() == 0
        gate.touch()
    ends = [stream[-1] for stream in streams]
    assert {(end.name, end.data["reason"]) for end in ends} == {("disconnecting", "draining")}
    assert len({end.retry_ms for end in ends}) == len(ends)


@pytest.mark.slow
async def test_what_the_server_was_started_to_ignore_its_commands_do_not(quick_place: Path) -> None:
    """As under nohup, in the background: it outlives a hang-up, its commands need not."""
    before = {number: signal(number, SIG_IGN) for number in (SIGHUP, SIGQUIT)}
    try:
        with open_server(quick_place) as server, trio.fail_after(DEADLINE_S):
            server.signal(SIGHUP)
            async with open_api(server) as api:
                await api.project()
                command = await api.submit("grep SigIgn /proc/self/status")
                told = output_of(await api.events(command))
    finally:
        for number, handler in before.items():
            signal(number, handler)
    ignored = int(told.split()[1], 16)
    assert not ignored & (1 << SIGHUP - 1 | 1 << SIGQUIT - 1)
