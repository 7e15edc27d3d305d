"""The connections of this process, lent to one task at a time.

Bounds: at most `max_size` connections; a task waits at most `wait_s` for one, first come first
served; a returned connection is handed to the longest waiting task directly. A connection is
lent only if its socket is silent (an idle socket that is readable was ended by the server) and it
is younger than `max_lifetime_s`; it comes back at rest or is closed. While the database is gone,
one task keeps connecting, with jitter, and callers fail after `wait_s`, or at once where the
pool's breaker is open. What counts there: a connection that was lost or could not be made, and a
statement that did not end in time are failures, a busy pool is none; a connection that was made
makes an open breaker try again.

`open_dedicated` is a pool of exactly one, for work that must never wait behind requests
(heartbeat, append).
"""

import random
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import psycopg
import trio
from psycopg import errors
from psycopg.rows import TupleRow

from rdev.adapters.postgres.connection import (
    ConnectionSettings,
    TrioConnection,
    open_connection,
    retry_delay_s,
)
from rdev.domain.breaker import CallOutcome
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.breaker import Call, CallBreaker, Unbroken

# What a caller told SERVICE_UNAVAILABLE by the database should wait before it asks again.
RETRY_AFTER_S = 1.0

# What a statement is given.
Parameters: TypeAlias = Sequence[object] | Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """Now: `size` open connections, `idle` of them not lent, `waiting` tasks, `failures` to connect
    in a row. Since the start: `requests`, of which `waits` had to wait and `timeouts` got none;
    connections `opened` and `discarded`."""

    size: int
    idle: int
    waiting: int
    failures: int
    requests: int
    waits: int
    timeouts: int
    discarded: int
    opened: int


class _Waiter:
    """A task that waits, and what it was handed."""

    __slots__ = ("connection",)

    def __init__(self) -> None:
        self.connection: TrioConnection[TupleRow] | None = None


class Pool:
    """See the module. Made by `open_pool`, which owns the nursery its connecting tasks run in."""

    def __init__(
        self,
        settings: ConnectionSettings,
        nursery: trio.Nursery,
        *,
        min_size: int,
        max_size: int,
        wait_s: float,
        max_lifetime_s: float,
        breaker: CallBreaker,
    ) -> None:
        """Opens nothing yet."""
        self._breaker = breaker
        self._settings = settings
        self._nursery = nursery
        self._min_size, self._max_size = min_size, max_size
        self._wait_s, self._max_lifetime_s = wait_s, max_lifetime_s
        # Every open connection, lent or not, and the time it is too old.
        self._retire_at: dict[TrioConnection[TupleRow], float] = {}
        self._idle: deque[TrioConnection[TupleRow]] = deque()
        # In order of arrival; nobody waits while a connection is idle.
        self._waiters: dict[trio.lowlevel.Task, _Waiter] = {}
        self._opening = 0
        self._closing = False
        self._last_failure: psycopg.Error | None = None
        self._failures = 0
        self._requests = self._waits = self._timeouts = self._discarded = self._opened = 0

    @asynccontextmanager
    async def connection(
        self, *, wait_s: float | None = None
    ) -> AsyncIterator[TrioConnection[TupleRow]]:
        """A connection in autocommit, for one task, for as long as the block lasts. `wait_s`
        replaces the pool's patience.

        Session state (SET, LISTEN, session locks) must not be left behind: nothing resets it.
        Errors: SERVICE_UNAVAILABLE after `wait_s`, or at once where the breaker is open.
        Cancellation: it goes back, or is closed if it is not at rest. Blocks: at most `wait_s`.
        """
        with self._breaker.call() as call:
            connection = self._take() or await self._wait(
                call, self._wait_s if wait_s is None else wait_s
            )
            try:
                yield connection
            except errors.QueryCanceled:
                call.outcome = CallOutcome.FAILURE
                raise
            finally:
                self._judge(connection, call)
                self._give_back(connection)

    def statistics(self) -> PoolStatistics:
        """What is and what was."""
        return PoolStatistics(
            size=len(self._retire_at),
            idle=len(self._idle),
            waiting=len(self._waiters),
            failures=self._failures,
            requests=self._requests,
            waits=self._waits,
            timeouts=self._timeouts,
            discarded=self._discarded,
            opened=self._opened,
        )

    def grow(self) -> None:
        """Start as many connecting tasks as are missing: up to `min_size`, one for each waiter up
        to `max_size`, only one while the database is gone."""
        size = len(self._retire_at)
        missing = max(self._min_size - size, min(len(self._waiters), self._max_size - size))
        if self._failures:
            missing = min(missing, 1)
        if self._closing:
            missing = 0
        for _ in range(missing - self._opening):
            self._opening += 1
            self._nursery.start_soon(self._open_one)

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back."""
        self._closing = True
        while self._idle:
            self._discard(self._idle.pop())

    def _take(self) -> TrioConnection[TupleRow] | None:
        """The most recently used idle connection that is alive; the dead ones are discarded."""
        self._requests += 1
        while self._idle:
            connection = self._idle.pop()
            if self._is_fit(connection) and not connection.has_input:
                return connection
            self._discard(connection)
        return None

    def _judge(self, connection: TrioConnection[TupleRow], call: Call) -> None:
        """What the call says of the database: the block's own errors (a conflict) say nothing bad
        of it."""
        if connection.closed:
            call.outcome = CallOutcome.FAILURE
        elif call.outcome is None:
            call.outcome = CallOutcome.SUCCESS

    async def _wait(self, call: Call, wait_s: float) -> TrioConnection[TupleRow]:
        self._waits += 1
        task = trio.lowlevel.current_task()
        waiter = self._waiters[task] = _Waiter()
        self.grow()

        def give_up(_: object) -> trio.lowlevel.Abort:
            del self._waiters[task]
            return trio.lowlevel.Abort.SUCCEEDED

        with trio.move_on_after(wait_s):
            await trio.lowlevel.wait_task_rescheduled(give_up)
        if waiter.connection is None:
            self._timeouts += 1
            is_busy = len(self._retire_at) >= self._max_size
            call.outcome = CallOutcome.IGNORED if is_busy else CallOutcome.FAILURE
            raise RdevError(
                ErrorCode.SERVICE_UNAVAILABLE,
                f"there was no database connection within {wait_s:g} s",
                retry_after_s=RETRY_AFTER_S,
            ) from self._last_failure
        return waiter.connection

    def _give_back(self, connection: TrioConnection[TupleRow]) -> None:
        if self._is_fit(connection):
            self._offer(connection)
        else:
            self._discard(connection)

    def _is_fit(self, connection: TrioConnection[TupleRow]) -> bool:
        return (
            not self._closing
            and connection.at_rest
            and trio.current_time() < self._retire_at[connection]
        )

    def _offer(self, connection: TrioConnection[TupleRow]) -> None:
        """To the longest waiting task, else to the idle ones."""
        if not self._waiters:
            self._idle.append(connection)
            return
        task = next(iter(self._waiters))
        self._waiters.pop(task).connection = connection
        trio.lowlevel.reschedule(task)

    def _discard(self, connection: TrioConnection[TupleRow]) -> None:
        connection.abort()
        del self._retire_at[connection]
        self._discarded += 1
        self.grow()

    async def _open_one(self) -> None:
        connection = await self._keep_connecting()
        self._opening -= 1
        if connection is None:
            return
        if self._closing:
            connection.abort()
            return
        self._opened += 1
        self._breaker.try_now()
        # Up to a tenth is random, so that connections opened together do not all retire together.
        lifetime_s = self._max_lifetime_s * (1 - random.random() / 10)
        self._retire_at[connection] = trio.current_time() + lifetime_s
        self._offer(connection)
        self.grow()

    async def _keep_connecting(self) -> TrioConnection[TupleRow] | None:
        """Connect, again and again while somebody waits or `min_size` is not reached.

        None when it is no longer needed, or another task is at it while the database is gone.
        """
        while self._waiters or len(self._retire_at) < self._min_size:
            try:
                connection = await open_connection(self._settings)
            except psycopg.Error as error:
                self._failures += 1
                self._last_failure = error
                if self._opening > 1:
                    return None
                await trio.sleep(retry_delay_s(self._failures))
            else:
                self._failures = 0
                self._last_failure = None
                return connection
        return None


@asynccontextmanager
async def open_pool(
    settings: ConnectionSettings,
    *,
    min_size: int = 2,
    max_size: int = 10,
    wait_s: float = 5.0,
    max_lifetime_s: float = 3600.0,
    breaker: CallBreaker | None = None,
) -> AsyncIterator[Pool]:
    """A pool for the time of the block. Does not wait for the database to be there.

    Every connection is closed at the end; one still lent then, when it comes back.
    """
    async with trio.open_nursery() as nursery:
        pool = Pool(
            settings,
            nursery,
            min_size=min_size,
            max_size=max_size,
            wait_s=wait_s,
            max_lifetime_s=max_lifetime_s,
            breaker=breaker or Unbroken(),
        )
        pool.grow()
        try:
            yield pool
        finally:
            pool.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_dedicated(
    settings: ConnectionSettings, purpose: str, *, by_key: bool = False, wait_s: float = 5.0
) -> AsyncIterator[Pool]:
    """One connection kept for one purpose and replaced when it is lost; used like a pool."""
    own = replace(settings.named(purpose), by_key=by_key)
    async with open_pool(own, min_size=1, max_size=1, wait_s=wait_s) as pool:
        yield pool


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn "the database cannot serve this now" into SERVICE_UNAVAILABLE; all else goes through.

    For a `with` at the edge of an SQL file (not as a decorator of async functions). Now means:
    the connection is lost or refused, the statement took too long, lost a deadlock, or met a
    server that is full or on standby. A schema that lacks what we ask for is a migration that was
    not applied yet: it can come at any moment, and `/ready` names it.
    """
    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedFunction, errors.UndefinedColumn) as error:
        raise _unavailable("the database lacks a migration: run `rdev migrate up`") from error
    except errors.QueryCanceled as error:
        raise _unavailable("the database did not answer in time") from error
    except (
        psycopg.OperationalError,
        psycopg.InterfaceError,
        errors.ReadOnlySqlTransaction,  # a failover: still connected to the former primary
    ) as error:
        raise _unavailable("the database cannot serve this at the moment") from error


def _unavailable(message: str) -> RdevError:
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=RETRY_AFTER_S)
