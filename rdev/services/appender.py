"""The appender: one per process sends the pending output of all commands as one statement.

Woken by the first write; no timer: it appends at once when nothing is in flight and gathers
meanwhile. Bounds: a batch carries at most 256 KiB of payload (or one command's pending output); a
command that has 256 KiB pending makes its writer wait, and the journal in the project is the
buffer. Only what the log has committed is published.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.commands import Claimed, Lease, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Stream
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
    """For tests and metrics: batches sent, appends applied, those refused as stale, and how often
    the middle of a stream over its cap was dropped."""

    batches: int
    applied: int
    stale: int
    trims: int
    pending_bytes: int


class Writer:
    """One attempt's way into the log. `end` is how far the journals were handed over, committed
    or not."""

    def __init__(self, *, claimed: Claimed, wake: Callable[["Writer"], None]) -> None:
        self.lease = claimed.lease
        self.end = claimed.offsets
        self._dropped_before = claimed.dropped_bytes > 0
        self._dropped_bytes = {Source.STDOUT: 0, Source.STDERR: 0}
        # How far a stream must be before it is trimmed again, whatever became of the last time.
        self._trim_at = {Source.STDOUT: 0, Source.STDERR: 0}
        self._wake = wake
        self._committed = claimed.offsets
        self._committed_seq = claimed.last_seq
        self._chunks: list[NewChunk] = []
        self._pending_bytes = 0
        self._outcome: Outcome | None = None
        self._in_flight: Append | None = None
        self._refused = False
        self._failure: Exception | None = None
        self._moved = trio.lowlevel.ParkingLot()

    @property
    def pending_bytes(self) -> int:
        """Payload not yet committed."""
        return self._pending_bytes

    @property
    def next_bytes(self) -> int:
        """Payload of the append that `take` would give."""
        return self._in_flight.size_bytes if self._in_flight else self._pending_bytes

    @property
    def is_ending(self) -> bool:
        """Whether the attempt's end was handed over, committed or not: `finished` tells which."""
        return self._outcome is not None

    @property
    def truncated(self) -> bool:
        """Whether output of the command was dropped, now or in an earlier attempt."""
        return self._dropped_before or any(self._dropped_bytes.values())

    async def write(self, stream: Stream, chunk: NewChunk) -> None:
        """Hand over the events that stand for the next `raw_bytes` of a journal.

        Errors: LeaseLostError. Blocks: while 256 KiB are pending; the order of writes is kept.
        Cancellation: the chunk was handed over, or was not when it was still waiting for room.
        """
        while self._pending_bytes >= PENDING_MAX_BYTES and self._failure is None:
            await self._moved.park()
        self._raise_failure()
        if stream is Stream.STDOUT:
            self.end = replace(self.end, stdout=self.end.stdout + chunk.raw_bytes)
        else:
            self.end = replace(self.end, stderr=self.end.stderr + chunk.raw_bytes)
        self._chunks.append(chunk)
        self._pending_bytes += len(chunk.payload)
        self._wake(self)

    def finish(self, outcome: Outcome, last: NewChunk) -> None:
        """Hand over the end of the command, with its last events. Errors: LeaseLostError."""
        self._end(outcome, last)

    async def finished(self) -> None:
        """Wait until what was handed over is committed and published. Errors: LeaseLostError."""
        while self._pending_bytes and self._failure is None and not self._refused:
            await self._moved.park()
        self._raise_failure()

    async def queue_again(self, last: NewChunk, *, reason: str) -> bool:
        """End the attempt with its last event, and let the command wait for another one; returns
        when that is committed and published. `reason`: why it did not finish. False: a cancel was
        asked for, so nothing was done, and the command is to be finished.

        Errors: LeaseLostError.
        """
        self._end(Outcome(status=Status.QUEUED, reason=reason), last)
        await self.finished()
        return not self._refused

    def _end(self, outcome: Outcome, last: NewChunk) -> None:
        self._raise_failure()
        self._refused = False
        self._chunks.append(last)
        self._pending_bytes += len(last.payload)
        self._outcome = outcome
        self._wake(self)

    def take(self) -> Append:
        """The pending output as one append; the same one again until it is settled."""
        if self._in_flight is None:
            self._in_flight = Append(
                lease=self.lease,
                start=self._committed,
                start_seq=self._committed_seq,
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
        if result.state is AppendState.REFUSED:
            self._take_back(self._in_flight)
            return
        self._committed = self._in_flight.end
        self._committed_seq = result.chunks[-1].last_seq
        self._pending_bytes -= self._in_flight.size_bytes
        self._in_flight = None
        self._moved.unpark_all()

    def _take_back(self, refused: Append) -> None:
        """The output of a refused append goes on without its end."""
        *output, last = refused.chunks
        self._chunks = output
        self._pending_bytes -= len(last.payload)
        self._outcome = None
        self._in_flight = None
        self._refused = True
        self._moved.unpark_all()

    def fail(self, failure: Exception) -> None:
        """Nothing more can be written; whoever waits or writes is told."""
        self._failure = failure
        self._in_flight = None
        self._chunks = []
        self._pending_bytes = 0
        self._moved.unpark_all()

    def trimmed(self, source: Source, dropped_bytes: int) -> None:
        """So many bytes of the source were dropped in all."""
        self._dropped_bytes[source] = dropped_bytes

    def to_trim(self) -> list[Source]:
        """The streams of which more is stored than is kept; each once a stride."""
        limit = HEAD_BYTES + TAIL_BYTES + TRIM_STRIDE_BYTES
        due = []
        for source, reached in (
            (Source.STDOUT, self._committed.stdout),
            (Source.STDERR, self._committed.stderr),
        ):
            if reached - self._dropped_bytes[source] > limit and reached >= self._trim_at[source]:
                self._trim_at[source] = reached + TRIM_STRIDE_BYTES
                due.append(source)
        return due

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
        # By lease: after a take-over of our own a command has two writers for a while.
        self._ready: dict[Lease, Writer] = {}
        self._work = trio.Event()
        self._batches = self._applied = self._stale = self._trims = 0

    def open(self, claimed: Claimed) -> Writer:
        """A writer for a claimed command, which begins where the log stands."""
        return Writer(claimed=claimed, wake=self._wake)

    def statistics(self) -> AppenderStatistics:
        """Counters since the start."""
        return AppenderStatistics(
            batches=self._batches,
            applied=self._applied,
            stale=self._stale,
            trims=self._trims,
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
        settled = await self._append(batch)
        for writer in batch:
            await self._trim(writer)
        return settled

    def _wake(self, writer: Writer) -> None:
        self._ready[writer.lease] = writer
        self._work.set()

    def _take_batch(self) -> list[Writer]:
        """Writers in the order they became ready, one a command, until the batch is full."""
        batch: dict[CommandId, Writer] = {}
        size_bytes = 0
        for writer in self._ready.values():
            size_bytes += writer.next_bytes
            if batch and size_bytes > BATCH_MAX_BYTES:
                break
            batch.setdefault(writer.lease.command, writer)
        return list(batch.values())

    async def _append(self, writers: list[Writer]) -> int:
        """One statement; a batch that fails as a whole is halved until the guilty one is alone."""
        self._batches += 1
        try:
            results = await self._log.append([writer.take() for writer in writers])
        except RdevError as error:
            if error.code is not ErrorCode.INTERNAL_ERROR:
                raise
            if len(writers) == 1:
                self._fail(writers[0], error)
                return 1
            half = len(writers) // 2
            return await self._append(writers[:half]) + await self._append(writers[half:])
        for writer, result in zip(writers, results, strict=True):
            self._settle(writer, result)
        return sum(result.state is not AppendState.LOCKED for result in results)

    def _settle(self, writer: Writer, result: AppendResult) -> None:
        for chunk in result.chunks:
            self._publish(chunk)
        self._applied += result.state is AppendState.APPLIED
        self._stale += result.state is AppendState.STALE
        writer.settle(result)
        # Whoever is waiting goes behind the others.
        del self._ready[writer.lease]
        if writer.pending_bytes:
            self._ready[writer.lease] = writer

    def _fail(self, writer: Writer, error: RdevError) -> None:
        del self._ready[writer.lease]
        writer.fail(error)

    async def _trim(self, writer: Writer) -> None:
        for source in writer.to_trim():
            dropped_bytes = await self._log.trim(
                writer.lease, source, head_bytes=HEAD_BYTES, tail_bytes=TAIL_BYTES
            )
            writer.trimmed(source, dropped_bytes)
            self._trims += 1
