"""One PostgreSQL connection, driven by trio: psycopg 3.3 without asyncio and without threads.

psycopg's protocol code is generators that yield "wait until the socket is readable or writable";
this file answers them with trio and keeps everything else (cursors, adaptation, pipelines, COPY,
the C speedups). What bounds it: a name look-up and each connection attempt by `connect_timeout_s`,
a statement by `statement_timeout_ms` on the server, the clean-up after a cancelled statement by
`CLEANUP_S`, a dead peer by TCP keepalive, one that still answers TCP by `SILENCE_MARGIN_S`, work
without waiting by `MAX_BUSY_S`.

A cancelled wait cancels the statement on the server and reads its end, so the connection can be
used again; where that is impossible (COPY, `stream()`, no answer in time) the socket is closed and
the server rolls back.

Private names of psycopg used here and in `transaction.py`, the reason for the pin `>=3.3,<3.4`:
`_connect_gen`, `_cancel_gen`, `_should_cancel`, `_closed`, `_autocommit`, `_adapters`, `_pipeline`,
`waiting._ready`, `errors._WaitTimeout`, `_capabilities.capabilities`. The files
`tests/adapters/postgres/test_{connection,cancellation}.py` are the contract an update must pass.
"""

import math
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import psycopg
import trio
from psycopg import AsyncConnection, AsyncCursor, AsyncServerCursor, errors, pq
from psycopg._capabilities import capabilities
from psycopg.abc import RV, AdaptContext, ConnDict, ConnParam, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import (
    conninfo_attempts,
    conninfo_to_dict,
    make_conninfo,
    timeout_from_conninfo,
)
from psycopg.rows import AsyncRowFactory, Row, TupleRow
from psycopg.waiting import Ready, Wait, _ready

from rdev.adapters.postgres.transaction import (
    AfterCommit,
    TrioTransaction,
    commit_and_announce,
)
from rdev.adapters.postgres.waiting import FreeLock, follow, wait_either

# After a cancel, the server gets this long to end the statement; then the socket is closed.
CLEANUP_S = 5.0
# A cancel that came between two statements of one call is lost; it is asked for again after this.
CANCEL_AGAIN_S = 0.25
# So much later than the server would end a statement, a silent connection is given up: between here
# and there something may live that keeps it open (measured: a server that never worked again).
SILENCE_MARGIN_S = 2.0
# psycopg's own figure for asyncio: COPY and executemany hardly ever wait, other tasks must run.
MAX_BUSY_S = 0.005
# Reconnecting: first pause, and the pause it doubles up to (both before jitter).
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 5.0

_ACTIVE = pq.TransactionStatus.ACTIVE
_IDLE = pq.TransactionStatus.IDLE
_CONNECTED = pq.ConnStatus.OK
_NO_PIPELINE = pq.PipelineStatus.OFF


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Where the database is and what every session is told at its start.

    `statement_timeout_ms` is below the 5 s of a commit's shield on purpose: a statement that runs
    under the shield ends with an error of the server, not with an unknown outcome.
    """

    dsn: str = field(repr=False)
    application_name: str = "rdev"
    connect_timeout_s: int = 5
    statement_timeout_ms: int = 4_000
    idle_in_transaction_timeout_ms: int = 10_000
    # For statements that look rows up by key: no plan that was made while a table was small, and is
    # kept while it grows, may scan it.
    by_key: bool = False

    @property
    def silence_max_s(self) -> float:
        """How long the server may say nothing while it owes a reply."""
        if not self.statement_timeout_ms:
            return math.inf
        return self.statement_timeout_ms / 1_000 + SILENCE_MARGIN_S

    def named(self, purpose: str) -> "ConnectionSettings":
        """The same, recognisable in `pg_stat_activity` as `<application>/<purpose>`."""
        return replace(self, application_name=f"{self.application_name}/{purpose}")

    def conninfo(self) -> str:
        """The connection string with the session's settings as startup options: no round trip.

        Errors: `psycopg.ProgrammingError` when `dsn` is not a connection string.
        """
        given = conninfo_to_dict(self.dsn)
        session = {
            "statement_timeout": str(self.statement_timeout_ms),
            "idle_in_transaction_session_timeout": str(self.idle_in_transaction_timeout_ms),
            "default_transaction_isolation": r"read\ committed",
            "timezone": "UTC",
            **({"enable_seqscan": "off"} if self.by_key else {}),
        }
        options = [str(given.get("options") or ""), *(f"-c {k}={v}" for k, v in session.items())]
        # A peer that vanished is noticed within about 20 s, also while we only wait for a reply.
        patience: ConnDict = {
            "connect_timeout": self.connect_timeout_s,
            "keepalives_idle": 5,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        }
        ours: ConnDict = {
            "application_name": self.application_name,
            "client_encoding": "UTF8",
            "options": " ".join(options).strip(),
        }
        return make_conninfo("", **(patience | given | ours))


class TrioServerCursor(AsyncServerCursor[Row]):
    """A server cursor that is closed also when its task is being cancelled."""

    async def close(self) -> None:
        """Close it on the server, if the transaction is in order. Blocks: `CLEANUP_S` at most."""
        # shielded: psycopg closes it on leaving the block, also when that is by cancellation
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_S):
            await super().close()


class TrioConnection(AsyncConnection[Row]):
    """psycopg's asynchronous connection, on trio. See psycopg for what it does.

    `cleanup_s`: how long a cancelled wait may take to end the statement on the server; 0 closes the
    socket at once, for a connection that holds nothing worth the wait. `silence_max_s`: how long a
    wait without a timeout of its own waits for the next bytes before the connection is closed.
    """

    cleanup_s: float = CLEANUP_S
    silence_max_s: float = math.inf

    def __init__(
        self, pgconn: pq.abc.PGconn, row_factory: AsyncRowFactory[Row] | None = None
    ) -> None:
        """Wrap an open libpq connection; made by `connect`."""
        if row_factory is None:
            super().__init__(pgconn)
        else:
            super().__init__(pgconn, row_factory)
        self.server_cursor_factory = TrioServerCursor
        self.lock = FreeLock()  # type: ignore[assignment]  # psycopg only enters and leaves it
        self._yielded_at = trio.current_time()

    @classmethod
    async def connect(
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: AsyncRowFactory[Row] | None = None,
        cursor_factory: type[AsyncCursor[Row]] | None = None,
        **kwargs: ConnParam,
    ) -> Self:
        """Open a connection, trying each address of each host in turn.

        Errors: `psycopg.OperationalError` when none answers within `connect_timeout` (each).
        Cancellation: nothing is left open.
        """
        params = conninfo_to_dict(conninfo, **kwargs)
        timeout_s = timeout_from_conninfo(params)
        connection = await cls._first_of(await _addresses(params, timeout_s), timeout_s)
        connection._autocommit = autocommit
        connection.prepare_threshold = prepare_threshold
        if row_factory:
            connection.row_factory = row_factory
        if cursor_factory:
            connection.cursor_factory = cursor_factory
        if context:
            connection._adapters = AdaptersMap(context.adapters)
        return connection

    @classmethod
    async def _first_of(cls, addresses: list[ConnDict], timeout_s: float) -> Self:
        failures: list[psycopg.Error] = []
        for address in addresses:
            try:
                with trio.fail_after(timeout_s):
                    return await follow(cls._connect_gen(make_conninfo("", **address)))
            except trio.TooSlowError:
                failures.append(errors.ConnectionTimeout("connection timeout expired"))
            except psycopg.Error as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        raise type(failures[-1])("; ".join(str(failure).strip() for failure in failures))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Commit and close; after an exception close, which makes the server roll back."""
        try:
            if exc_type is None and not self.closed:
                await self.commit()  # noqa: ASYNC102  # commit() shields itself
        finally:
            self.abort()

    async def close(self) -> None:
        """Close; a task waiting on this connection gets `psycopg.OperationalError`."""
        self.abort()

    def abort(self) -> None:
        """Close without waiting: what was open on the server is rolled back. Idempotent."""
        if self.closed:
            return
        self._closed = True
        # First, or a task waiting on the descriptor would go on waiting on its next owner.
        trio.lowlevel.notify_closing(self.pgconn.socket)
        self.pgconn.finish()

    @property
    def at_rest(self) -> bool:
        """Whether it is connected, outside a transaction and with nothing in flight."""
        pgconn = self.pgconn
        return (
            pgconn.status == _CONNECTED
            and pgconn.transaction_status == _IDLE
            and pgconn.pipeline_status == _NO_PIPELINE
        )

    @property
    def _in_flight(self) -> bool:
        """Whether the server owes a reply. In a pipeline it always may: without the Sync that ends
        the pipeline it would skip whatever is sent next, while libpq calls the connection idle."""
        pgconn = self.pgconn
        return pgconn.status == _CONNECTED and (
            pgconn.transaction_status == _ACTIVE or pgconn.pipeline_status != _NO_PIPELINE
        )

    @property
    def has_input(self) -> bool:
        """Whether the socket is readable now. On an idle connection: the server has ended it."""
        return bool(_ready(self.pgconn.socket, Wait.R))

    async def commit(self) -> None:
        """Commit what is open. Errors, Cancellation, Blocks: as `commit_and_announce`."""
        await commit_and_announce(self, super().commit, None)

    @asynccontextmanager
    async def transaction(
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,
        after_commit: AfterCommit | None = None,
    ) -> AsyncIterator[TrioTransaction]:
        """A transaction, or a savepoint within one; see `TrioTransaction`.

        Errors: `psycopg.ProgrammingError` for `after_commit` on what is not the outermost
        transaction, or in a pipeline (where COMMIT is only queued).
        """
        if after_commit is not None and not self.at_rest:
            raise psycopg.ProgrammingError("after_commit is for an outermost transaction")
        transaction = TrioTransaction(self, savepoint_name, force_rollback, after_commit)
        if self._pipeline:
            async with self.pipeline(), transaction, self.pipeline():
                yield transaction
        else:
            async with transaction:
                yield transaction

    async def cancel_safe(self, *, timeout: float = CLEANUP_S) -> None:
        """Ask the server to cancel the running statement; returns once the request is delivered.

        Errors: `psycopg.errors.CancellationTimeout` after `timeout` seconds.
        """
        # shielded: called while the caller is being cancelled; bounded by `timeout`
        with trio.CancelScope(shield=True, deadline=trio.current_time() + timeout):
            return await self._request_cancel()
        raise errors.CancellationTimeout("cancellation timeout expired")

    async def _request_cancel(self) -> None:
        if not self._should_cancel():
            return
        if capabilities.has_cancel_safe():
            await follow(self._cancel_gen())
        else:  # a libpq older than 17 can only do it blocking
            await trio.to_thread.run_sync(self.cancel)

    async def wait(self, gen: PQGen[RV], interval: float = 0.0, timeout: float | None = None) -> RV:
        """Drive one of psycopg's generators to its end and return what it returns.

        `timeout` in seconds, 0 looks once; `interval` is psycopg's and unused.
        Errors: `psycopg.errors._WaitTimeout`; `psycopg.OperationalError` when the socket is closed,
        or was closed here after `silence_max_s`. Cancellation: see the module. What is begun in a
        cancelled scope while something is in flight is psycopg's own clean-up and is driven like
        any other.
        """
        if not self._in_flight:
            await trio.lowlevel.checkpoint_if_cancelled()
        if timeout is None:
            return await self._run(gen, silence_max_s=self.silence_max_s)
        with trio.move_on_after(max(0.0, timeout)):
            return await self._run(gen, look_first=True)
        raise errors._WaitTimeout("wait timeout expired")

    async def _run(
        self, gen: PQGen[RV], *, look_first: bool = False, silence_max_s: float = math.inf
    ) -> RV:
        try:
            return await self._drive(gen, None, look_first=look_first, silence_max_s=silence_max_s)
        except (trio.Cancelled, KeyboardInterrupt, BaseExceptionGroup):
            # Around Cancelled because the server must be told; it is always raised again.
            if self._in_flight:
                await self._settle(gen)  # noqa: ASYNC102  # _settle() shields itself
            raise

    async def _drive(
        self,
        gen: PQGen[RV],
        wanted: Wait | None,
        *,
        look_first: bool = False,
        silence_max_s: float = math.inf,
    ) -> RV:
        """Drive `gen` from its start, or from `wanted`, the wait it stands in."""
        fd = self.pgconn.socket
        waited = False
        try:
            if wanted is None:
                wanted = next(gen)
            while True:
                if wanted == Wait.R and not look_first:
                    with trio.move_on_after(silence_max_s) as patience:
                        await trio.lowlevel.wait_readable(fd)
                    if patience.cancelled_caught:
                        raise self._given_up(gen)
                    waited = True
                    wanted = gen.send(Ready.R)
                else:
                    ready = _ready(fd, wanted) if look_first else 0
                    look_first = False
                    with trio.move_on_after(silence_max_s) as patience:
                        ready = ready or await self._ready_now_or_later(fd, wanted)
                    if patience.cancelled_caught:
                        raise self._given_up(gen)
                    wanted = gen.send(ready)
        except StopIteration as end:
            if not waited and self._is_hogging:
                # What is done is reported, not cancelled: psycopg counts on it.
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._yielded_at = trio.current_time()
            result: RV = end.value
            return result
        except (trio.ClosedResourceError, OSError) as error:
            raise psycopg.OperationalError("connection socket closed") from error

    def _given_up(self, gen: PQGen[RV]) -> psycopg.OperationalError:
        """Close a connection that is silent; the error that says so."""
        self._close_amid(gen)
        return psycopg.OperationalError("the database is silent")

    def _close_amid(self, gen: PQGen[RV]) -> None:
        self.abort()
        try:
            gen.close()
        except psycopg.Error:
            pass  # it tried to read on from what was just closed

    async def _ready_now_or_later(self, fd: int, wanted: Wait) -> int:
        # A socket is nearly always writable: asking the kernel is cheaper than the scheduler.
        if self._is_hogging:
            await trio.lowlevel.checkpoint()
            self._yielded_at = trio.current_time()
        ready = _ready(fd, wanted)
        if not ready:
            ready = await wait_either(fd, wanted)
            self._yielded_at = trio.current_time()
        return ready

    @property
    def _is_hogging(self) -> bool:
        return trio.current_time() - self._yielded_at >= MAX_BUSY_S

    async def _settle(self, gen: PQGen[RV]) -> None:
        """After a cancelled wait: cancel on the server and read the end, or close the socket."""
        # shielded: an unread reply would be taken for the next statement's; at most cleanup_s
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.cleanup_s) as scope:
            try:
                while not await self._cancel_and_resume(gen):
                    pass
            except psycopg.Error:
                # QueryCanceled is what was asked for; a lost connection shows in its status.
                pass
        # A pipeline has an end of its own, which follows; COPY and stream() are not at an end.
        if scope.cancelled_caught or (self._in_flight and self._pipeline is None):
            self._close_amid(gen)

    async def _cancel_and_resume(self, gen: PQGen[RV]) -> bool:
        """One round; False when the generator is not at its end after it: the request failed, or
        came between two statements. Errors: `psycopg.Error`, the generator's own: it has ended."""
        try:
            await self._request_cancel()
        except psycopg.Error:
            pass  # a busy server; it is asked again
        with trio.move_on_after(CANCEL_AGAIN_S):
            try:
                wanted = gen.send(Ready.NONE)  # "not ready": it repeats the wait it stands in
            except StopIteration:
                return True
            await self._drive(gen, wanted)
            return True
        return False


async def open_connection(settings: ConnectionSettings) -> TrioConnection[TupleRow]:
    """Open a connection in autocommit with the session's settings made.

    Errors: `psycopg.OperationalError`. Blocks: `connect_timeout_s` per address at most.
    """
    connection = await TrioConnection[TupleRow].connect(settings.conninfo(), autocommit=True)
    connection.silence_max_s = settings.silence_max_s
    return connection


def retry_delay_s(failures: int, random_fraction: Callable[[], float] = random.random) -> float:
    """Seconds to wait before connecting again after `failures` ≥ 1 in a row.

    Doubles from 50 ms to 5 s; half of it is random, so that servers do not return in step.
    """
    full = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures - 1, 16))
    return full * (0.5 + random_fraction() / 2)


async def _addresses(params: ConnDict, timeout_s: float) -> list[ConnDict]:
    """One set of parameters per address; names are looked up in a thread.

    Errors: `psycopg.OperationalError` when no name can be resolved in time.
    """
    host = str(params.get("host") or os.environ.get("PGHOST") or "")
    if all(not part or part.startswith("/") for part in host.split(",")):
        return conninfo_attempts(params)
    with trio.move_on_after(timeout_s):
        return await trio.to_thread.run_sync(conninfo_attempts, params, abandon_on_cancel=True)
    raise errors.ConnectionTimeout("name resolution timeout expired")
