"""The faults that alerts are about, each made to a real server and taken back after its block.

Each says which alerts it is for. All alerts have one.
"""

import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGTERM

import httpx2
import trio

from tests.app.server import DEADLINE_S, Api, Server, open_api
from tests.faults.database import Database

# Of PostgreSQL's connections, so many per cent are taken.
TAKEN_PERCENT = 86
# So many bodies, each as long as it may be and never ended, are some 200 MiB.
BODIES = 200
BODY_BYTES = 1_000_000
# Clients that never pause, each with so many requests on its way.
BUSY_CLIENTS = 4
PIPELINED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What faults are made to."""

    server: Server
    database: Database
    # Answers nothing: a receiver's port that nobody listens on.
    closed_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`make` is a block in which it lasts."""

    name: str
    alerts: frozenset[str]
    make: Callable[[Place], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _again(step: Callable[[], object], every_s: float) -> AsyncIterator[None]:
    """The step, again and again, for as long as the block lasts."""

    async def repeat() -> None:
        while True:
            with suppress(httpx2.TransportError):
                await step()  # type: ignore[misc]
            await trio.sleep(every_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(repeat)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def storm_of_429(place: Place) -> AsyncIterator[None]:
    """A client in a loop, with a key that may ask five times in ten seconds."""
    async with open_api(place.server) as api:
        key = await _key(api, rate_limit={"requests": 5, "window_s": 10})
        headers = {"Authorization": f"Bearer {key}"}
        async with _again(partial(api.get, "/projects", headers=headers), 0.05):
            yield


@asynccontextmanager
async def wrong_keys(place: Place) -> AsyncIterator[None]:
    """Four a second."""
    async with open_api(place.server) as api:
        headers = {"Authorization": "Bearer wrong"}
        async with _again(partial(api.get, "/projects", headers=headers), 0.2):
            yield


@asynccontextmanager
async def full_queue(place: Place) -> AsyncIterator[None]:
    """More commands than there are places, and none of them ends."""
    async with open_api(place.server) as api:
        await api.project("stuck")
        commands = [await api.submit("sleep 600", project="stuck") for _ in range(20)]
        try:
            yield
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(DEADLINE_S):
                for command in reversed(commands):
                    await api.http.delete(f"/commands/{command}")


@asynccontextmanager
async def killed_supervisor(place: Place) -> AsyncIterator[None]:
    """A command that takes its supervisor with it."""
    async with open_api(place.server) as api:
        await api.project("lost")
        command = await api.submit("kill -9 $PPID; kill -9 $$", project="lost")
        ended = await api.ended(command)
        assert ended["status"] == "lost", ended
        yield


@asynccontextmanager
async def failing_endpoint(place: Place) -> AsyncIterator[None]:
    """A receiver that refuses connections."""
    async with open_api(place.server) as api:
        await api.project("hooks")
        url = f"http://127.0.0.1:{place.closed_port}/hooks"
        made = await api.post("/webhooks", {"url": url, "events": ["command.completed"]})
        assert made.status_code == 201, made.text
        try:
            async with _again(partial(api.submit, "true", project="hooks"), 0.5):
                yield
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(DEADLINE_S):
                await api.http.delete(f"/webhooks/{made.json()['data']['id']}")


@asynccontextmanager
async def open_transaction(place: Place) -> AsyncIterator[None]:
    """Somebody wrote, went away, and left it open, while somebody follows all commands."""
    async with open_api(place.server) as api, api.wire("/events", {}) as followed:
        assert followed.status == 200
        with place.database.connect() as connection:
            connection.execute("begin")
            connection.execute("select pg_current_xact_id()")
            yield


@asynccontextmanager
async def few_files(place: Place) -> AsyncIterator[None]:
    """A limit just above what is open."""
    pid = place.server.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    opened = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened + 10, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@asynccontextmanager
async def locked_table(place: Place) -> AsyncIterator[None]:
    """A session that keeps everybody from the table of projects, for longer than a statement may
    take (4 s) and a request waits for a connection (5 s)."""

    def hold() -> None:
        with place.database.connect() as connection, connection.transaction():
            connection.execute("lock table projects in access exclusive mode")
            connection.execute("select pg_sleep(8)")

    async with open_api(place.server) as api, trio.open_nursery() as nursery:

        async def lock() -> None:
            while True:
                await trio.to_thread.run_sync(hold)
                await trio.sleep(0.2)

        async def ask() -> None:
            while True:
                with suppress(httpx2.TransportError):
                    await api.get("/projects")
                await trio.sleep(0.1)

        nursery.start_soon(lock)
        for _ in range(40):
            nursery.start_soon(ask)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def dead_database(place: Place) -> AsyncIterator[None]:
    """It is killed; clients and probes go on asking."""
    await trio.to_thread.run_sync(place.database.crash)
    try:
        async with (
            open_api(place.server) as api,
            _again(partial(api.get, "/projects"), 0.02),
            _again(partial(api.post, "/projects/base/shell", {"command": "true"}), 0.1),
        ):
            yield
    finally:
        await trio.to_thread.run_sync(place.database.start)


@asynccontextmanager
async def many_connections(place: Place) -> AsyncIterator[None]:
    """Somebody else takes most of what PostgreSQL has."""
    with ExitStack() as taken:
        first = taken.enter_context(place.database.connect())
        (most,) = first.execute("select current_setting('max_connections')::int").fetchone() or (0,)
        used = "select count(*) from pg_stat_activity where backend_type = 'client backend'"
        while (first.execute(used).fetchone() or (0,))[0] * 100 < most * TAKEN_PERCENT:
            taken.enter_context(place.database.connect())
            await trio.lowlevel.checkpoint()
        yield


@asynccontextmanager
async def killed_killers(place: Place) -> AsyncIterator[None]:
    """A command is cancelled, and whoever is to end it is killed before it can say what is left."""

    async def kill_them(command: str) -> None:
        while True:
            for entry in Path("/proc").iterdir():
                with suppress(OSError):
                    argv = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                    if command.encode() in argv and (
                        b"kill_command" in argv or b"cancelled" in argv
                    ):
                        os.kill(int(entry.name), SIGKILL)
            await trio.sleep(0.02)

    async with open_api(place.server) as api, trio.open_nursery() as nursery:
        await api.project("unkilled")
        # It hears of the first attempt, and ends by itself when that one is over.
        script = "trap 'echo told; sleep 1; exit 0' TERM; echo here; while :; do sleep 0.1; done"
        command = await api.submit(script, project="unkilled")
        await _says(api, command, b"here")
        await api.http.delete(f"/commands/{command}")
        await _says(api, command, b"told")
        nursery.start_soon(kill_them, command)
        ended = await api.ended(command)
        nursery.cancel_scope.cancel()
        assert ended["kill"] == {"confirmed": False, "survivors": []}, ended
    yield


@asynccontextmanager
async def lost_place(place: Place) -> AsyncIterator[None]:
    """A file lies where the folders of commands are: nothing starts, nothing is read."""
    folder = place.server.projects / ".commands"
    moved = folder.with_name(".moved")
    async with open_api(place.server) as api:
        folder.rename(moved)
        folder.touch()
        try:
            async with _again(partial(api.submit, "true", project="base"), 0.5):
                yield
        finally:
            folder.unlink()
            moved.rename(folder)


@asynccontextmanager
async def slow_log(place: Place) -> AsyncIterator[None]:
    """A session keeps everybody from the table of output for some seconds, again and again, while
    another server says that there is news."""

    def hold(command: str) -> None:
        with place.database.connect() as connection, connection.transaction():
            connection.execute("lock table output in access exclusive mode")
            with place.database.connect() as other:
                other.execute("select pg_notify('rdev_stream', %s)", (f"another:{command}",))
            connection.execute("select pg_sleep(2.5)")

    async with open_api(place.server) as api, trio.open_nursery() as nursery:
        await api.project("late")
        command = await api.submit("while :; do date; sleep 0.2; done", project="late")

        async def lock() -> None:
            while True:
                await trio.to_thread.run_sync(hold, command)
                await trio.sleep(0.5)

        nursery.start_soon(api.events, command)
        nursery.start_soon(lock)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(DEADLINE_S):
                await api.http.delete(f"/commands/{command}")
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def busy_clients(place: Place) -> AsyncIterator[None]:
    """Clients that ask and ask. They do not look at what they get, which is the smaller work."""
    host, _, port = place.server.url.removeprefix("http://").rpartition(":")
    asked = f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() * PIPELINED

    async def ask() -> None:
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            while True:
                await stream.send_all(asked)
                answered = 0
                while answered < PIPELINED and (got := await stream.receive_some()):
                    answered += got.count(b"HTTP/1.1 200")

    async def ask_again() -> None:
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                await ask()

    async with trio.open_nursery() as nursery:
        for _ in range(BUSY_CLIENTS):
            nursery.start_soon(ask_again)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def endless_bodies(place: Place) -> AsyncIterator[None]:
    """Clients that send nearly all of a large body. Memory that was used is not all given back:
    the server is started again, as the runbook says."""
    host, _, port = place.server.url.removeprefix("http://").rpartition(":")
    head = (
        f"POST /projects/base/shell HTTP/1.1\r\nHost: {host}\r\n"
        f"Authorization: Bearer {place.server.key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {BODY_BYTES + 1}\r\n\r\n"
    ).encode()

    async def send(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(head + b" " * BODY_BYTES)
            await trio.sleep_forever()

    async def keep() -> None:
        """The server gives those up that come too slowly: others follow."""
        while True:
            with trio.move_on_after(20):
                async with AsyncExitStack() as opened, trio.open_nursery() as nursery:
                    for _ in range(BODIES):
                        stream = await trio.open_tcp_stream(host, int(port))
                        nursery.start_soon(send, await opened.enter_async_context(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
    place.server.keep_port()
    await trio.to_thread.run_sync(place.server.end, SIGTERM)
    await trio.to_thread.run_sync(place.server.start)


@asynccontextmanager
async def dead_server(place: Place) -> AsyncIterator[None]:
    """SIGKILL; it is started again where it was."""
    place.server.keep_port()
    place.server.end(SIGKILL)
    try:
        yield
    finally:
        await trio.to_thread.run_sync(place.server.start)


async def _says(api: Api, command: str, word: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        while word not in await api.output(command):
            await trio.sleep(0.05)


async def _key(api: Api, **fields: object) -> str:
    made = await api.post("/keys", {"name": "storm", "scopes": ["projects:read"], **fields})
    assert made.status_code == 201, made.text
    data: dict[str, str] = made.json()["data"]
    return data["key"]


def _fault(make: Callable[[Place], AbstractAsyncContextManager[None]], *alerts: str) -> Fault:
    name = make.__name__.replace("_", " ")  # type: ignore[attr-defined]
    return Fault(name=name, alerts=frozenset(f"RdevAPI{alert}" for alert in alerts), make=make)


# What does not disturb the others is made at once: round by round.
ROUNDS = (
    (
        _fault(storm_of_429, "HighRateLimit"),
        _fault(wrong_keys, "AuthFailures"),
        _fault(killed_supervisor, "CommandsLost"),
        _fault(failing_endpoint, "WebhookBacklog", "WebhooksDead", "WebhookEndpointFailing"),
        _fault(open_transaction, "OldTransaction", "FeedsHeldBack", "AuditSealLag"),
        _fault(many_connections, "DatabaseConnections"),
        _fault(killed_killers, "KillUnconfirmed"),
        # The last: what comes behind it would find none.
        _fault(few_files, "OpenFiles"),
    ),
    (_fault(full_queue, "HighCommandQueue", "QueueStuck"),),
    (_fault(locked_table, "HighLatency", "PoolExhausted"),),
    (_fault(slow_log, "StreamsLate"),),
    (_fault(lost_place, "ProjectUnreachable"),),
    (_fault(busy_clients, "HighCPU"),),
    (_fault(endless_bodies, "HighMemory"),),
    (_fault(dead_database, "DatabaseDown", "DatabaseBreakerOpen", "NotReady", "HighErrorRate"),),
    (_fault(dead_server, "PodDown"),),
)
