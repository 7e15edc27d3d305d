"""One world of feeds per test: the fake, and the port on a PostgreSQL of the test's own."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
from psycopg import AsyncConnection

from rdev.adapters.postgres.connection import ConnectionSettings, open_connection
from rdev.adapters.postgres.feed import PostgresFeed
from rdev.domain.feed import FeedEvent, Position, position_of
from rdev.domain.ids import command_uuid
from rdev.ports.feed import FeedLog
from tests.fakes.feed import KEPT_S, FakeFeed
from tests.ports.conftest import Pools

PUT = """
insert into events (xid, type, project, command_id, kind, status, attempt, detail)
values (pg_current_xact_id(), 'command.' || %(status)s::text, %(project)s, %(command)s, %(kind)s,
        %(status)s, %(attempt)s, %(detail)s)
returning xid::text::bigint, position
"""


class Transaction(Protocol):
    """A transaction that writes; it has a number from the start."""

    async def put(self, event: FeedEvent) -> Position: ...


@dataclass(slots=True, kw_only=True)
class FeedWorld:
    """A feed, and who writes it."""

    log: FeedLog
    transaction: Callable[[], AbstractAsyncContextManager[Transaction]]
    # Make all that is stored so many seconds older.
    age: Callable[[float], Awaitable[None]]

    async def put(self, event: FeedEvent) -> Position:
        """One event in a transaction of its own."""
        async with self.transaction() as transaction:
            return await transaction.put(event)


class Aborted(Exception):  # what a test raises on purpose
    """Ends a transaction without a commit."""


class PostgresTransaction:
    def __init__(self, connection: AsyncConnection[tuple[object, ...]]) -> None:
        self.connection = connection

    async def put(self, event: FeedEvent) -> Position:
        return await put_event(self.connection, event)


async def put_event(connection: AsyncConnection[object], event: FeedEvent) -> Position:
    """Write an event in the connection's transaction."""
    cursor = await connection.execute(PUT, values_of(event))
    row = await cursor.fetchone()
    assert isinstance(row, tuple)
    return position_of(row[0], row[1])


def values_of(event: FeedEvent) -> dict[str, object]:
    """The parameters of `PUT`."""
    return {
        "project": event.project,
        "command": command_uuid(event.command),
        "kind": event.kind,
        "status": event.status,
        "attempt": event.attempt,
        "detail": msgspec.json.encode(event.detail).decode(),
    }


@asynccontextmanager
async def writing(settings: ConnectionSettings) -> AsyncIterator[PostgresTransaction]:
    """A transaction on a connection of its own; it has its number from the start."""
    connection = await open_connection(settings)
    try:
        async with connection.transaction():
            await connection.execute("select pg_current_xact_id()")
            yield PostgresTransaction(connection)
    finally:
        await connection.close()


def postgres_feed(pools: Pools) -> FeedWorld:
    """The port on PostgreSQL."""

    async def age(seconds: float) -> None:
        async with pools.requests.connection() as connection:
            await connection.execute(
                "update events set at = at - make_interval(secs => %s)", (seconds,)
            )

    return FeedWorld(
        log=PostgresFeed(pool=pools.requests, kept_s=KEPT_S),
        transaction=lambda: writing(pools.settings),
        age=age,
    )


def fake_feed() -> FeedWorld:
    """The port in memory."""
    log = FakeFeed()

    async def age(seconds: float) -> None:
        log.age(seconds)

    return FeedWorld(log=log, transaction=log.transaction, age=age)
