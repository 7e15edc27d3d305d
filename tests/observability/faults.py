"""The faults that alerts are about, each made to a real server and taken back after its block.

Each says which alerts it is for. What cannot be made in seconds, or only by doing harm to the
machine, is proven by `rules_test.yaml` alone: `ONLY_CASES` says why.
"""

import resource
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGKILL

import httpx2
import trio

from tests.app.server import DEADLINE_S, Api, Server, open_api
from tests.faults.database import Database

ONLY_CASES = {
    "RdevAPIHighMemory": "80 % of a gibibyte is more than a test may take",
    "RdevAPIKillUnconfirmed": "needs a process that no SIGKILL ends",
    "RdevAPIHighCPU": "needs a core that nothing else uses",
    "RdevAPIProjectUnreachable": "a local folder is there or is not: needs a cluster",
    "RdevAPIStreamsLate": "needs a core that is used up for minutes",
    "RdevAPIDatabaseConnections": "a PostgreSQL that is almost full lets nobody else in",
}


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
async def dead_server(place: Place) -> AsyncIterator[None]:
    """SIGKILL; it is started again where it was."""
    place.server.keep_port()
    place.server.end(SIGKILL)
    try:
        yield
    finally:
        await trio.to_thread.run_sync(place.server.start)


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
        _fault(few_files, "OpenFiles"),
    ),
    (_fault(full_queue, "HighCommandQueue", "QueueStuck"),),
    (_fault(locked_table, "HighLatency", "PoolExhausted"),),
    (_fault(dead_database, "DatabaseDown", "DatabaseBreakerOpen", "NotReady", "HighErrorRate"),),
    (_fault(dead_server, "PodDown"),),
)
