"""What is committed is announced, and nothing else: COMMIT under a shield.

A task cancelled in COMMIT used to leave a committed row that nobody was woken for (256 of 295
cancelled transactions). Here COMMIT and the announcement that follows it run in one shielded scope,
bounded by `SHIELD_S`:

    async with connection.transaction(after_commit=announce): ...

A single statement that commits by itself is shielded by whoever announces it: `services/shield.py`.

A synchronous announcement runs in the same step in which the reply is read, so nothing can come
between. One that must wait (a further statement, a NOTIFY) returns an awaitable and gets the rest
of the shield's time.

Private names of psycopg used here: `AsyncTransaction._conn`, `_outer_transaction`.
"""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

import psycopg
import trio
from psycopg import AsyncConnection, AsyncTransaction, errors, pq

from rdev.domain.errors import ErrorCode, RdevError

# COMMIT and what must follow it; §4 of the architecture.
SHIELD_S = 5.0

AfterCommit = Callable[[], Awaitable[None] | None]

_Result = TypeVar("_Result")

_CONNECTED = pq.ConnStatus.OK
_IDLE = pq.TransactionStatus.IDLE
_FAILED = pq.TransactionStatus.INERROR
_OPEN = pq.TransactionStatus.INTRANS
_NO_PIPELINE = pq.PipelineStatus.OFF


class OutcomeUnknownError(RdevError):
    """The connection was lost, or the time was up, between asking for a commit and its answer.

    The change may or may not be in the database and was not announced; the connection is closed.
    Whoever can tell by reading (offsets, an idempotency key) reads and repeats.
    """

    def __init__(self) -> None:
        """Code SERVICE_UNAVAILABLE, `details` {"outcome": "unknown"}."""
        super().__init__(
            ErrorCode.SERVICE_UNAVAILABLE,
            "the database did not confirm the change, it may or may not have been made",
            retry_after_s=1.0,
            details={"outcome": "unknown"},
        )


async def commit_and_announce(
    connection: AsyncConnection[object],
    commit: Callable[[], Awaitable[_Result]],
    announce: Callable[[_Result], Awaitable[None] | None] | None,
) -> _Result:
    """Do what commits and then, if and only if it did, announce its result.

    Errors: the server's own error: not committed, not announced. `OutcomeUnknownError`: not
    announced. RdevError with `details` {"outcome": "committed"}: the time ended in an announcement
    that waits. What `announce` raises goes through; the change stays.
    Cancellation: has no effect from the first byte to the end of the announcement.
    Blocks: `SHIELD_S`, and as long again to end the statement on the server when that is over.
    """
    if connection.closed:
        raise psycopg.OperationalError("the connection is closed")
    committed = False
    # shielded: a commit whose reply is not read is a change that nobody is told of
    with trio.CancelScope(shield=True, deadline=trio.current_time() + SHIELD_S):
        result = await _asked(connection, commit)
        committed = True
        following = announce(result) if announce is not None else None
        if following is not None:
            await following
        return result
    if not committed:
        await connection.close()
        raise OutcomeUnknownError
    raise RdevError(
        ErrorCode.SERVICE_UNAVAILABLE,
        "the change was made, but what follows it did not end in time",
        details={"outcome": "committed"},
    )


async def _asked(
    connection: AsyncConnection[object], commit: Callable[[], Awaitable[_Result]]
) -> _Result:
    try:
        return await commit()
    except psycopg.Error as error:
        if connection.pgconn.status == _CONNECTED:
            raise  # the server said no
        raise OutcomeUnknownError from error


class TrioTransaction(AsyncTransaction):
    """A transaction block that a cancelled task leaves rolled back and whose COMMIT is shielded.

    Cancellation: in the block: rolled back under a shield of `SHIELD_S`; a connection that is not
    in order after it is closed. In COMMIT: no effect.
    Errors, at the end: `psycopg.OperationalError` when the connection was lost in the block;
    `psycopg.errors.InFailedSqlTransaction` when the block swallowed an error of the database
    (COMMIT would silently roll back); as `commit_and_announce`.
    """

    def __init__(
        self,
        connection: AsyncConnection[object],
        savepoint_name: str | None = None,
        force_rollback: bool = False,
        after_commit: AfterCommit | None = None,
    ) -> None:
        """Made by `TrioConnection.transaction`."""
        super().__init__(connection, savepoint_name, force_rollback)
        self._after_commit = after_commit

    async def __aenter__(self) -> Self:
        """BEGIN or SAVEPOINT."""
        await trio.lowlevel.checkpoint_if_cancelled()
        # shielded: psycopg takes back a half-begun transaction by a round trip of its own
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SHIELD_S):
            return await super().__aenter__()
        await self._conn.close()
        raise psycopg.OperationalError("the transaction could not be begun in time")

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        """Decide how the block ends:

        1. it failed, or is to be rolled back: roll back;
        2. the connection is lost: say so, whether or not the block noticed;
        3. it swallowed an error of the database: roll back and say so;
        4. it is a savepoint: release it;
        5. commit and announce.
        """
        if exc_val is not None or self.force_rollback:
            return await self._end(exc_type, exc_val, exc_tb)  # noqa: ASYNC102  # _end() shields itself
        if self.pgconn.status != _CONNECTED:
            raise psycopg.OperationalError("the connection was lost in the transaction")
        if self.pgconn.transaction_status == _FAILED:
            swallowed = errors.InFailedSqlTransaction("a statement of the transaction had failed")
            await self._end(type(swallowed), swallowed, None)  # noqa: ASYNC102  # _end() shields itself
            raise swallowed
        if not self._outer_transaction:
            return await self._end(None, None, None)  # noqa: ASYNC102  # _end() shields itself
        return await commit_and_announce(self._conn, self._commit, self._announce)  # noqa: ASYNC102  # shields itself

    async def _end(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        """Roll back (or release a savepoint); close a connection that is not in order then."""
        swallow = False
        # shielded: an open transaction holds locks and spoils the connection for the next task
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SHIELD_S):
            swallow = await super().__aexit__(exc_type, exc_val, exc_tb)
        if self._outer_transaction:
            in_order = self.pgconn.transaction_status == _IDLE
        else:
            in_order = self.pgconn.transaction_status == _OPEN
        # Within a pipeline the command is only queued; the pipeline's own end sends it.
        if not in_order and self.pgconn.pipeline_status == _NO_PIPELINE:
            await self._conn.close()
        return swallow

    async def _commit(self) -> bool:
        return await super().__aexit__(None, None, None)

    def _announce(self, _: bool) -> Awaitable[None] | None:
        return None if self._after_commit is None else self._after_commit()
