"""The log of events in memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from rdev.domain.commands import Lease, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId
from rdev.domain.stream import Chunk, GapEvent, Source, gap_line
from rdev.ports.output import Append, AppendResult, AppendState, NewChunk
from tests.fakes.store import Row, StoreState, is_running

# PostgreSQL's integer: an append that does not fit is refused, and its batch with it.
RAW_MAX_BYTES = 2**31 - 1
PAGE_CHUNKS = 1_000


class FakeOutput:
    """`OutputLog`."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        await self._state.step()
        for append in batch:
            if any(chunk.raw_bytes > RAW_MAX_BYTES for chunk in append.chunks):
                raise RdevError(ErrorCode.INTERNAL_ERROR, "the database refused a batch of output")
        results = [self._append(append) for append in batch]
        self._state.reply()
        return results

    async def read(self, command: CommandId, *, after: int, limit_bytes: int) -> list[Chunk]:
        await self._state.step()
        page: list[Chunk] = []
        size_bytes = 0
        for chunk in self._state.chunks.get(command, ()):
            if chunk.last_seq <= after:
                continue
            if page and (size_bytes >= limit_bytes or len(page) == PAGE_CHUNKS):
                break
            page.append(chunk)
            size_bytes += len(chunk.payload)
        return page

    async def read_tail(
        self, command: CommandId, source: Source, *, tail_bytes: int
    ) -> list[Chunk]:
        await self._state.step()
        tail: list[Chunk] = []
        for chunk in reversed(self._of_attempt(command, source)):
            if sum(c.raw_bytes for c in tail) >= tail_bytes:
                break
            tail.append(chunk)
        return tail[::-1]

    async def trim(self, lease: Lease, source: Source, *, head_bytes: int, tail_bytes: int) -> int:
        await self._state.step()
        row = self._state.leased(lease)
        if row is None:
            return 0
        stored = self._of_attempt(lease.command, source)
        middle = list(_middle(stored, head_bytes, tail_bytes))
        kept = [chunk for chunk in self._state.chunks[lease.command] if chunk not in middle]
        gaps = [_gap(island) for island in _islands(middle)]
        self._state.chunks[lease.command] = sorted([*kept, *gaps], key=lambda c: c.first_seq)
        dropped_bytes = row.command.dropped_bytes + _raw(c for c in middle if not c.is_gap)
        row.command = replace(row.command, dropped_bytes=dropped_bytes, truncated=dropped_bytes > 0)
        self._state.reply()
        return _raw(middle)

    async def heads(
        self, commands: Sequence[CommandId], *, written_by_others_than: str
    ) -> dict[CommandId, int]:
        await self._state.step()
        rows = {
            command: self._state.rows[command]
            for command in commands
            if command in self._state.rows
        }
        return {
            command: row.command.last_seq
            for command, row in rows.items()
            if row.holder != written_by_others_than or row.command.status is not Status.RUNNING
        }

    async def oldest_seq(self, command: CommandId) -> int | None:
        await self._state.step()
        chunks = self._state.chunks.get(command)
        return chunks[0].first_seq if chunks else None

    def _of_attempt(self, command: CommandId, source: Source) -> list[Chunk]:
        row = self._state.rows.get(command)
        after = 0 if row is None else row.command.attempt_seq
        stored = self._state.chunks.get(command, ())
        return [chunk for chunk in stored if chunk.source is source and chunk.first_seq > after]

    def _append(self, append: Append) -> AppendResult:
        command = append.lease.command
        row = self._state.rows.get(command)
        if row is None or row.lease_id != append.lease.id:
            return AppendResult(command=command, state=AppendState.STALE)
        end_seq = append.start_seq + sum(chunk.events for chunk in append.chunks)
        if row.offsets == append.leaves_at and row.command.last_seq == end_seq:
            return _applied(command, _numbered(append))
        stands_at = (row.offsets, row.command.last_seq)
        if stands_at != (append.start, append.start_seq) or not is_running(row):
            return AppendResult(command=command, state=AppendState.STALE)
        if command in self._state.held:
            return AppendResult(command=command, state=AppendState.LOCKED)
        if append.queues_again and row.cancel_requested:
            return AppendResult(command=command, state=AppendState.REFUSED)
        for chunk in append.chunks:
            self._state.put(row, chunk.source, chunk.events, chunk.raw_bytes, chunk.payload)
        row.command = replace(
            row.command, stdout_bytes=append.end.stdout, stderr_bytes=append.end.stderr
        )
        if append.queues_again:
            self._queue_again(row, append.outcome)
        elif append.outcome is not None:
            self._finish(row, append.outcome)
        return _applied(command, _numbered(append))

    def _queue_again(self, row: Row, outcome: Outcome | None) -> None:
        row.command = replace(
            row.command,
            status=Status.QUEUED,
            stdout_bytes=0,
            stderr_bytes=0,
            dropped_bytes=0,
            truncated=False,
            attempt_seq=row.command.last_seq,
        )
        assert outcome is not None
        assert row.holder is not None
        self._state.record.changed(row.command, "command.queued", row.holder, reason=outcome.reason)

    def _finish(self, row: Row, outcome: Outcome) -> None:
        row.has_spec = False
        row.command = replace(
            row.command,
            status=outcome.status,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            reason=outcome.reason,
            duration_ms=outcome.duration_ms,
            kill=outcome.kill,
            session_id=outcome.agent.session_id if outcome.agent else None,
            usage=outcome.agent.usage if outcome.agent else None,
            finished_at=self._state.now,
        )
        assert row.holder is not None
        self._state.record.changed(row.command, "command.finished", row.holder)


def _applied(command: CommandId, chunks: Iterable[Chunk]) -> AppendResult:
    return AppendResult(command=command, state=AppendState.APPLIED, chunks=tuple(chunks))


def _numbered(append: Append) -> Iterator[Chunk]:
    last = append.start_seq
    for new in append.chunks:
        yield _chunk(append.lease.command, last, new)
        last += new.events


def _chunk(command: CommandId, last: int, new: NewChunk) -> Chunk:
    return Chunk(
        command=command,
        first_seq=last + 1,
        last_seq=last + new.events,
        source=new.source,
        raw_bytes=new.raw_bytes,
        payload=new.payload,
    )


def _raw(chunks: Iterable[Chunk]) -> int:
    return sum(chunk.raw_bytes for chunk in chunks)


def _middle(stored: list[Chunk], head_bytes: int, tail_bytes: int) -> Iterator[Chunk]:
    """Chunks with at least a head before them and at least a tail behind them."""
    before, total = 0, _raw(stored)
    for chunk in stored:
        if before >= head_bytes and total - before - chunk.raw_bytes >= tail_bytes:
            yield chunk
        before += chunk.raw_bytes


def _islands(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """Runs of neighbouring numbers: what is constant in a run is number − events before it."""
    events = 0
    keyed = []
    for chunk in chunks:
        keyed.append((chunk.first_seq - events, chunk))
        events += chunk.last_seq - chunk.first_seq + 1
    for _, island in groupby(keyed, key=lambda pair: pair[0]):
        yield [chunk for _, chunk in island]


def _gap(island: list[Chunk]) -> Chunk:
    first, last = island[0], island[-1]
    event = GapEvent(
        stream=first.source.name.lower(),
        dropped_bytes=_raw(island),
        first_seq=first.first_seq,
        last_seq=last.last_seq,
    )
    return replace(first, last_seq=last.last_seq, raw_bytes=_raw(island), payload=gap_line(event))
