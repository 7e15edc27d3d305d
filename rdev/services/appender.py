"""The appender: one per process sends the pending output of all commands as one statement.

Woken by the first write; no timer: it appends at once when nothing is in flight and gathers
meanwhile. Bounds: a batch carries at most 256 KiB of payload (or one command's pending output), a
command may have at most 256 KiB pending, then its writer waits, and the journal in the project is
the buffer. Only what the log has committed is published.
"""

from collections.abc import Callable
from dataclasses import dataclass

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.commands import Claimed, Lease, Outcome
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Offsets, Stream
from rdev.domain.ids import CommandId
from rdev.domain.stream import Chunk, Source
from rdev.ports.output import Append, AppendResult, AppendState, NewChunk, OutputLog

BATCH_MAX_BYTES = 262_144
PENDING_MAX_BYTES = 262_144
# What is kept of each stream of a command: head and tail (the contract's 64 MiB in all).
HEAD_BYTES = 32 * 1024 * 1024
TAIL_BYTES = 32 * 1024 * 1024
# The middle is dropped in strides, so that dropping costs little.
TRIM_STRIDE_BYTES = 4 * 1024 * 1024

Publish = Callable[[Chunk], None]
SOURCE = {Stream.STDOUT: Source.STDOUT, Stream.STDERR: Source.STDERR}


class LeaseLostError(Exception):
    """The command is no longer ours: the writer must stop and leave the command alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppenderStatistics:
    """For tests and metrics: batches sent, appends applied, and those refused as stale."""

    batches: int
    applied: int
    stale: int
    pending_bytes: int


class Writer:
    """One attempt's way into the log. `end` is how far the journals were handed over, committed
    or not."""

    def __init__(self, *, lease: Lease, offsets: Offsets, wake: Callable[["Writer"], None]) -> None:
        self.lease = lease
        self.end = offsets
        self.dropped_bytes = {Source.STDOUT: 0, Source.STDERR: 0}
        self._wake = wake
        self._committed = offsets
        self._chunks: list[NewChunk] = []
        self._pending_bytes = 0
        self._outcome: Outcome | None = None
        self._in_flight: Append | None = None
        self._failure: Exception | None = None
        self._moved = trio.lowlevel.ParkingLot()

    @property
    def pending_bytes(self) -> int:
        """Payload not yet committed."""
        return self._pending_bytes

    async def write(self, stream: Stream, chunk: NewChunk) -> None:
        """Hand over the events that stand for the next `raw_bytes` of a journal.

        Errors: LeaseLostError. Blocks: while 256 KiB are pending; the order of writes is kept.
        Cancellation: the chunk was handed over, or was not when it was still waiting for room.
        """
        while self._pending_bytes >= PENDING_MAX_BYTES and self._failure is None:
            await self._moved.park()
        self._raise_failure()
        moved = {stream.value: getattr(self.end, stream.value) + chunk.raw_bytes}
        self.end = Offsets(**({"stdout": self.end.stdout, "stderr": self.end.stderr} | moved))
        self._chunks.append(chunk)
        self._pending_bytes += len(chunk.payload)
        self._wake(self)

    async def finish(self, outcome: Outcome, last: NewChunk) -> None:
        """End the command with its last events; returns when that is committed and published.

        Errors: LeaseLostError.
        """
        self._raise_failure()
        self._chunks.append(last)
        self._pending_bytes += len(last.payload)
        self._outcome = outcome
        self._wake(self)
        while self._pending_bytes and self._failure is None:
            await self._moved.park()
        self._raise_failure()

    def take(self) -> Append | None:
        """The pending output as one append; the same one again until it is settled."""
        if self._in_flight is None and self._chunks:
            self._in_flight = Append(
                lease=self.lease,
                start=self._committed,
                end=self.end,
                chunks=tuple(self._chunks),
                outcome=self._outcome,
            )
            self._chunks = []
        return self._in_flight

    def settle(self, result: AppendResult) -> None:
        """What became of the append that was taken."""
        assert self._in_flight is not None
        if result.state is AppendState.LOCKED:
            return
        if result.state is AppendState.STALE:
            self.fail(LeaseLostError(self.lease))
            return
        self._committed = self._in_flight.end
        self._pending_bytes -= self._in_flight.size_bytes
        self._in_flight = None
        self._moved.unpark_all()

    def fail(self, failure: Exception) -> None:
        """Nothing more can be written; whoever waits or writes is told."""
        self._failure = failure
        self._in_flight = None
        self._chunks = []
        self._pending_bytes = 0
        self._moved.unpark_all()

    def over_cap(self) -> list[Source]:
        """The streams of which more is stored than is kept."""
        limit = HEAD_BYTES + TAIL_BYTES + TRIM_STRIDE_BYTES
        stored = {
            Source.STDOUT: self._committed.stdout - self.dropped_bytes[Source.STDOUT],
            Source.STDERR: self._committed.stderr - self.dropped_bytes[Source.STDERR],
        }
        return [source for source, size_bytes in stored.items() if size_bytes > limit]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class Appender:
    """Owned by the command queue's nursery."""

    def __init__(self, *, log: OutputLog, publish: Publish, backoff: Callable[[], Backoff]) -> None:
        """`publish` is called with each chunk after its commit, in order, and must not wait."""
        self._log = log
        self._publish = publish
        self._backoff = backoff
        self._ready: dict[CommandId, Writer] = {}
        self._work = trio.Event()
        self._batches = self._applied = self._stale = 0

    def open(self, claimed: Claimed) -> Writer:
        """A writer for a claimed command, which begins where the log stands."""
        return Writer(lease=claimed.lease, offsets=claimed.offsets, wake=self._wake)

    def statistics(self) -> AppenderStatistics:
        """Counters since the start."""
        return AppenderStatistics(
            batches=self._batches,
            applied=self._applied,
            stale=self._stale,
            pending_bytes=sum(writer.pending_bytes for writer in self._ready.values()),
        )

    async def run(self) -> None:
        """Append whatever is pending, until cancelled.

        A database that is gone is waited for, with growing pauses; the same appends are repeated.
        """
        backoff = self._backoff()
        while True:
            if not self._ready:
                self._work = trio.Event()
                await self._work.wait()
            try:
                progress = await self.run_once()
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                await trio.sleep(backoff.next_s())
                continue
            if progress:
                backoff = self._backoff()
            else:
                await trio.sleep(backoff.next_s())

    async def run_once(self) -> int:
        """Send one batch and publish what it committed; returns how many appends were settled.

        Errors: SERVICE_UNAVAILABLE; nothing is lost, the same batch comes again.
        """
        batch = self._take_batch()
        settled = await self._append([append for _, append in batch])
        for writer, append in batch:
            result = settled.get(append.lease.command)
            if result is not None:
                self._settle(writer, result)
        for writer, _ in batch:
            await self._trim(writer)
        return sum(result.state is not AppendState.LOCKED for result in settled.values())

    def _wake(self, writer: Writer) -> None:
        self._ready[writer.lease.command] = writer
        self._work.set()

    def _take_batch(self) -> list[tuple[Writer, Append]]:
        """Writers in the order they became ready, until the batch is full."""
        batch: list[tuple[Writer, Append]] = []
        size_bytes = 0
        for command, writer in list(self._ready.items()):
            append = writer.take()
            if append is None:
                del self._ready[command]
                continue
            batch.append((writer, append))
            size_bytes += append.size_bytes
            if size_bytes >= BATCH_MAX_BYTES:
                break
        return batch

    async def _append(self, batch: list[Append]) -> dict[CommandId, AppendResult]:
        """One statement; a batch that fails as a whole is halved until the guilty one is alone."""
        if not batch:
            return {}
        self._batches += 1
        try:
            results = await self._log.append(batch)
        except RdevError as error:
            if error.code is not ErrorCode.INTERNAL_ERROR:
                raise
            if len(batch) == 1:
                self._fail(batch[0].lease.command, error)
                return {}
            half = len(batch) // 2
            return await self._append(batch[:half]) | await self._append(batch[half:])
        return {result.command: result for result in results}

    def _settle(self, writer: Writer, result: AppendResult) -> None:
        for chunk in result.chunks:
            self._publish(chunk)
        self._applied += result.state is AppendState.APPLIED
        self._stale += result.state is AppendState.STALE
        writer.settle(result)
        # Whoever is waiting goes behind the others.
        if self._ready.pop(writer.lease.command, None) is not None and writer.pending_bytes:
            self._ready[writer.lease.command] = writer

    def _fail(self, command: CommandId, error: RdevError) -> None:
        writer = self._ready.pop(command, None)
        if writer is not None:
            writer.fail(error)

    async def _trim(self, writer: Writer) -> None:
        for source in writer.over_cap():
            dropped_bytes = await self._log.trim(
                writer.lease, source, head_bytes=HEAD_BYTES, tail_bytes=TAIL_BYTES
            )
            writer.dropped_bytes[source] = dropped_bytes
