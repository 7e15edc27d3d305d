"""The feeds: how soon a change of status is seen by whoever watches all commands.

A real server with its own database, a client on the loopback, a light load: a change every 20 ms.
`commit` figures run from the return of the commit on another connection, which then notifies as
another server would; `change` figures from the moment a command's statement wrote the event, its
own commit included. Clocks are those of one machine.
"""

import re
import time
import uuid
from collections.abc import Callable

import trio

from bench.client import Body, create, open_connection
from bench.harness import Context, Figure, Measurement, Scenario, percentile
from bench.server import Server, open_server, open_state_dir
from rdev.adapters.postgres.cluster import conninfo
from rdev.adapters.postgres.connection import ConnectionSettings, TrioConnection
from rdev.adapters.postgres.connection import open_connection as connect
from rdev.adapters.postgres.notifier import FEED_CHANNEL
from rdev.domain.ids import command_id

CHANGES = 200
COMMANDS = 60
BURST = 20_000
PAUSE_S = 0.02
DEADLINE_S = 60.0
EVENT = re.compile(rb'event: (?:status|complete)\ndata: .*?"status":"(\w+)".*?\n\n', re.DOTALL)
COMMAND = re.compile(rb'"command_id":"(cmd_[0-9a-f]{32})"')

INSERT = """
insert into events (xid, type, project, command_id, kind, status, attempt)
select pg_current_xact_id(), 'command.queued', 'bench', id, 'shell', 'queued', 0
from unnest(%s::uuid[]) as made (id)
"""
WRITTEN = """
select command_id, status, extract(epoch from at)::float8 from events
where project = 'bench' and kind = 'shell' and seq is not null
"""

# When each event was seen, by command and status (seconds of the wall clock).
Seen = dict[tuple[str, str], float]


def measure(context: Context) -> Measurement:
    """Every figure, on one server."""
    with open_state_dir() as state_dir, open_server(state_dir) as server:
        dsn = conninfo(state_dir / "run")
        trio.run(_make_project, server)
        return context.repeat(lambda: trio.run(_once, server, dsn))


async def _make_project(server: Server) -> None:
    async with open_connection(server) as connection:
        await create(connection, "/projects", {"id": "bench"})


async def _once(server: Server, dsn: str) -> dict[str, float]:
    writer = await connect(ConnectionSettings(dsn=dsn))
    seen: Seen = {}
    try:
        async with (
            open_connection(server) as watcher,
            watcher.stream("/events") as body,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_watch, body, seen)
            with trio.fail_after(DEADLINE_S):
                found = await _commits(writer, seen)
                found |= await _changes(server, writer, seen)
                found |= await _burst(writer, seen)
            nursery.cancel_scope.cancel()
    finally:
        await writer.close()
    return found


async def _watch(body: Body, seen: Seen) -> None:
    unread = b""
    while data := await body.receive():
        now_s = time.time()
        whole, separator, unread = (unread + data).rpartition(b"\n\n")
        for match in EVENT.finditer(whole + separator):
            command = COMMAND.search(match[0])
            if command is not None:
                seen[command[1].decode(), match[1].decode()] = now_s


async def _commits(writer: TrioConnection, seen: Seen) -> dict[str, float]:
    """A commit of another server → its event at the client, in ms."""
    committed: dict[tuple[str, str], float] = {}
    for _ in range(CHANGES):
        command = uuid.uuid4()
        await writer.execute(INSERT, ([command],))
        committed[command_id(command), "queued"] = time.time()
        await _notify(writer)
        await trio.sleep(PAUSE_S)
    await _until(lambda: committed.keys() <= seen.keys())
    return _late("commit", committed, seen)


async def _changes(server: Server, writer: TrioConnection, seen: Seen) -> dict[str, float]:
    """A change of a command of this server → its event at the client, in ms."""
    async with open_connection(server) as poster:
        mine = set()
        for _ in range(COMMANDS):
            mine.add(await create(poster, "/projects/bench/shell", {"command": "true"}))
            await trio.sleep(3 * PAUSE_S)
    await _until(lambda: all((command, "succeeded") in seen for command in mine))
    cursor = await writer.execute(WRITTEN)
    written = {(command_id(row[0]), str(row[1])): float(row[2]) for row in await cursor.fetchall()}
    return _late("change", {key: at for key, at in written.items() if key[0] in mine}, seen)


async def _burst(writer: TrioConnection, seen: Seen) -> dict[str, float]:
    """Very many events in one commit: how fast they come, events per second."""
    commands = [uuid.uuid4() for _ in range(BURST)]
    await writer.execute(INSERT, (commands,))
    began_s = time.time()
    await _notify(writer)
    wanted = {(command_id(command), "queued") for command in commands}
    await _until(lambda: wanted <= seen.keys())
    return {"burst": BURST / (max(seen[key] for key in wanted) - began_s)}


async def _notify(writer: TrioConnection) -> None:
    await writer.execute("select pg_notify(%s, 'bench:')", (FEED_CHANNEL,))


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await trio.sleep(0.05)


def _late(name: str, began: dict[tuple[str, str], float], seen: Seen) -> dict[str, float]:
    late_ms = [(seen[key] - at_s) * 1e3 for key, at_s in began.items()]
    return {f"{name}_p50": percentile(late_ms, 50), f"{name}_p99": percentile(late_ms, 99)}


SCENARIO = Scenario(
    name="feed",
    what="A change of a command's status, at a client of `/events`: after another server's commit "
    "and NOTIFY; after the statement of this server; 20,000 events in one commit.",
    figures=(
        Figure(name="commit_p50", unit="ms"),
        Figure(name="commit_p99", unit="ms"),
        Figure(name="change_p50", unit="ms"),
        Figure(name="change_p99", unit="ms"),
        Figure(name="burst", unit="events/s"),
    ),
    measure=measure,
)
