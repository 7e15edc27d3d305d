"""The stores in memory: what the ports promise, and nothing of how PostgreSQL keeps it.

All fakes share one `StoreState`. Time is `trio.current_time()`, nothing is random, and every
operation is one step after one checkpoint, so a simulation on these fakes is deterministic. Faults
are switches of the state: `unavailable`, `lost_replies`, `held`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby

import trio

from rdev.domain.commands import (
    LANE_CAP,
    LANE_CLASS,
    Claimed,
    Command,
    Kind,
    LaneClass,
    Lease,
    NewCommand,
    Outcome,
    Status,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Offsets
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane, rank
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus
from rdev.domain.stream import (
    Chunk,
    GapEvent,
    Source,
    final_lines,
    gap_line,
    queued_line,
)
from rdev.ports.commands import POSITION_MAX, Accepted, Beat, CancelResult
from rdev.ports.output import Append, AppendResult, AppendState, NewChunk
from tests.fakes.idempotency import KeptKeys

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# PostgreSQL's integer: an append that does not fit is refused, and its batch with it.
RAW_MAX_BYTES = 2**31 - 1
PAGE_CHUNKS = 1_000


@dataclass(slots=True, kw_only=True)
class Row:
    """One command as it is stored."""

    new: NewCommand
    command: Command
    reach: str
    rank: float
    expires_at: float
    has_spec: bool = True
    cancel_requested: bool = False
    lease_id: int | None = None
    lease_until: float = 0.0
    holder: str | None = None
    instance: str | None = None
    started_at_s: float = 0.0

    @property
    def offsets(self) -> Offsets:
        return Offsets(stdout=self.command.stdout_bytes, stderr=self.command.stderr_bytes)

    @property
    def lane(self) -> Lane:
        return Lane(project=self.new.project, lane_class=LANE_CLASS[self.new.kind])

    @property
    def place(self) -> tuple[float, CommandId]:
        """Where it stands in its lane."""
        return self.rank, self.new.id


@dataclass(slots=True, kw_only=True)
class LaneRow:
    """One lane as it is stored."""

    reach: str
    cap: int
    due: float | None = None
    last_start: float = 0.0


@dataclass(slots=True, kw_only=True)
class StoreState:
    """What all fakes of one store share, and the switches of their faults."""

    projects: dict[ProjectId, Project] = field(default_factory=dict)
    rows: dict[CommandId, Row] = field(default_factory=dict)
    chunks: dict[CommandId, list[Chunk]] = field(default_factory=dict)
    keys: KeptKeys = field(default_factory=KeptKeys)
    lanes: dict[Lane, LaneRow] = field(default_factory=dict)
    # Rows that "another connection" has locked: appends and take-overs pass them by.
    held: set[CommandId] = field(default_factory=set)
    # The database is gone.
    unavailable: bool = False
    # So many of the next writes are done, and their reply is lost.
    lost_replies: int = 0
    last_lease_id: int = 0
    last_moment: float = 0.0

    @property
    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=trio.current_time())

    def moment(self) -> float:
        """The store's clock, which never shows the same time twice."""
        self.last_moment = max(trio.current_time(), self.last_moment + 1e-6)
        return self.last_moment

    def age(self, seconds: float) -> None:
        """Make all that is stored so much older."""
        back = timedelta(seconds=seconds)
        self.keys.age(seconds)
        for row in self.rows.values():
            row.started_at_s -= seconds
            ended_at = row.command.finished_at
            ended_at = None if ended_at is None else ended_at - back
            created_at = row.command.created_at - back
            row.command = replace(row.command, created_at=created_at, finished_at=ended_at)

    async def step(self) -> None:
        """Before each operation."""
        await trio.lowlevel.checkpoint()
        self._check_available()

    def reply(self) -> None:
        """After each write."""
        if self.lost_replies > 0:
            self.lost_replies -= 1
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the reply was lost", retry_after_s=1.0)

    def put(self, row: Row, source: Source, events: int, raw_bytes: int, payload: bytes) -> Chunk:
        """Number and store a chunk."""
        last = row.command.last_seq
        chunk = Chunk(
            command=row.command.id,
            first_seq=last + 1,
            last_seq=last + events,
            source=source,
            raw_bytes=raw_bytes,
            payload=payload,
        )
        row.command = replace(row.command, last_seq=chunk.last_seq)
        self.chunks[row.command.id].append(chunk)
        return chunk

    def end(self, row: Row, status: Status) -> None:
        """End a queued command."""
        outcome = Outcome(status=status, reason=status.value)
        attempt = row.command.attempt
        payload = final_lines(
            outcome, attempt=attempt, truncated=False, stdout_bytes=0, stderr_bytes=0
        )
        self.put(row, Source.LIFE, 2, 0, payload)
        row.command = replace(row.command, status=status, reason=status.value, finished_at=self.now)
        row.has_spec = False

    def lease(self, row: Row, holder: str, lease_s: float) -> None:
        """Put a command under a fresh lease."""
        self.last_lease_id += 1
        row.lease_id = self.last_lease_id
        row.lease_until = trio.current_time() + lease_s
        row.holder = holder

    def queued(self, lane: Lane) -> list[Row]:
        """What waits in a lane, in order."""
        rows = [row for row in self.rows.values() if row.lane == lane and is_queued(row)]
        return sorted(rows, key=lambda row: row.place)

    def has_room(self, lane: Lane) -> bool:
        """Whether fewer than the cap of a lane run."""
        rows = [row for row in self.rows.values() if row.lane == lane and is_running(row)]
        return len(rows) < self.lanes[lane].cap

    def leased(self, lease: Lease) -> Row | None:
        """The running command of a lease that is still its own."""
        row = self.rows.get(lease.command)
        if row is None or row.lease_id != lease.id or row.command.status is not Status.RUNNING:
            return None
        return row

    @contextmanager
    def hold(self, command: CommandId) -> Iterator[None]:
        """Lock a row for the length of the block."""
        self.held.add(command)
        yield
        self.held.discard(command)

    def _check_available(self) -> None:
        if self.unavailable:
            message = "the database cannot serve this at the moment"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=1.0)


class FakeCommands:
    """`CommandStore` and `Leases`."""

    def __init__(self, state: StoreState, *, lease_s: float = 30.0) -> None:
        self._state = state
        self._lease_s = lease_s

    async def insert(self, new: NewCommand) -> Accepted:
        state = self._state
        await state.step()
        project = state.projects.get(new.project)
        if project is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no project {new.project!r}")
        if new.idempotency is not None:
            if (made := state.keys.find(new.idempotency)) is not None:
                return self._replayed(CommandId(made))
            state.keys.keep(new.idempotency, new.id)
        expires_in_s = float("inf") if new.expires_in_s is None else new.expires_in_s
        row = Row(
            new=new,
            command=_accepted(new, state.now),
            reach=project.reach,
            rank=rank(accepted_at_s=state.moment(), level=new.priority.level),
            expires_at=trio.current_time() + expires_in_s,
        )
        state.rows[new.id] = row
        state.chunks[new.id] = []
        position = self._position(row)
        state.put(row, Source.LIFE, 1, 0, queued_line(queue_position=position))
        state.reply()
        return Accepted(command=row.command, queue_position=position)

    async def replay(self, idempotency: Idempotency) -> Accepted | None:
        await self._state.step()
        made = self._state.keys.find(idempotency)
        return None if made is None else self._replayed(CommandId(made))

    def _replayed(self, command: CommandId) -> Accepted:
        row = self._state.rows.get(command)
        if row is None:
            raise RdevError(ErrorCode.GONE, f"command {command!r} is no longer stored")
        position = self._position(row) if is_queued(row) else None
        return Accepted(command=row.command, queue_position=position, is_replay=True)

    async def get(self, command: CommandId) -> Command | None:
        await self._state.step()
        row = self._state.rows.get(command)
        return None if row is None else row.command

    async def list_for_project(
        self,
        project: ProjectId,
        *,
        status: Status | None,
        kind: Kind | None,
        before: CommandId | None,
        limit: int,
    ) -> list[Command]:
        await self._state.step()
        found = [
            row.command
            for row in self._state.rows.values()
            if row.command.project == project
            and status in (None, row.command.status)
            and kind in (None, row.command.kind)
            and (before is None or row.command.id < before)
        ]
        return sorted(found, key=lambda command: command.id, reverse=True)[:limit]

    async def queue_position(self, command: CommandId) -> int | None:
        await self._state.step()
        row = self._state.rows.get(command)
        if row is None or row.command.status is not Status.QUEUED:
            return None
        return self._position(row)

    async def request_cancel(self, command: CommandId) -> CancelResult | None:
        await self._state.step()
        row = self._state.rows.get(command)
        if row is None:
            return None
        ended_now = row.command.status is Status.QUEUED
        if ended_now:
            self._state.end(row, Status.CANCELLED)
        elif row.command.status is Status.RUNNING:
            row.cancel_requested = True
        self._state.reply()
        return CancelResult(command=row.command, ended_now=ended_now)

    async def take_over(self, *, reach: str, holder: str, limit: int) -> list[Claimed]:
        await self._state.step()
        rows = [row for row in self._state.rows.values() if row.reach == reach and is_running(row)]
        late = [row for row in rows if row.lease_until < trio.current_time()]
        taken = [row for row in late if row.command.id not in self._state.held][:limit]
        for row in taken:
            self._state.lease(row, holder, self._lease_s)
        self._state.reply()
        return [claimed_of(row, take_over=True) for row in taken]

    async def heartbeat(self, leases: Sequence[Lease]) -> Beat:
        await self._state.step()
        alive = {lease: row for lease in leases if (row := self._state.leased(lease)) is not None}
        for row in alive.values():
            row.lease_until = trio.current_time() + self._lease_s
        self._state.reply()
        return Beat(
            stale=frozenset(leases) - alive.keys(),
            cancel_requested=frozenset(
                [lease for lease, row in alive.items() if row.cancel_requested]
            ),
        )

    async def record_instance(self, lease: Lease, instance: str) -> bool:
        await self._state.step()
        row = self._state.leased(lease)
        if row is None or row.instance not in (None, instance):
            return False
        row.instance = instance
        self._state.reply()
        return True

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._state.step()
        for lease in leases:
            if (row := self._state.leased(lease)) is not None:
                row.lease_until = float("-inf")
        self._state.reply()

    async def release_holder(self, holder: str) -> int:
        await self._state.step()
        now = trio.current_time()
        rows = [row for row in self._state.rows.values() if row.holder == holder]
        held = [row for row in rows if is_running(row) and row.lease_until >= now]
        for row in held:
            row.lease_until = float("-inf")
        self._state.reply()
        return len(held)

    def _position(self, row: Row) -> int:
        ahead = sum(other.place <= row.place for other in self._state.queued(row.lane))
        return min(POSITION_MAX, ahead)


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
            self._queue_again(row)
        elif append.outcome is not None:
            self._finish(row, append.outcome)
        return _applied(command, _numbered(append))

    def _queue_again(self, row: Row) -> None:
        row.command = replace(
            row.command,
            status=Status.QUEUED,
            stdout_bytes=0,
            stderr_bytes=0,
            dropped_bytes=0,
            truncated=False,
            attempt_seq=row.command.last_seq,
        )

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


class FakeProjects:
    """`ProjectStore`."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    async def insert(
        self, definition: ProjectDefinition, *, executor: str, reach: str
    ) -> tuple[Project, bool]:
        await self._state.step()
        found = self._state.projects.get(definition.id)
        if found is None:
            project = Project(
                id=definition.id,
                name=definition.id,
                status=ProjectStatus.READY,
                executor=executor,
                reach=reach,
                image=definition.image,
                created_at=self._state.now,
                definition=definition,
            )
            self._state.projects[definition.id] = project
            for lane_class in LaneClass:
                lane = Lane(project=project.id, lane_class=lane_class)
                self._state.lanes[lane] = LaneRow(reach=reach, cap=LANE_CAP[lane_class])
            self._state.reply()
            return project, True
        if found.definition != definition:
            message = f"project {definition.id!r} exists with another definition"
            raise RdevError(ErrorCode.CONFLICT, message)
        return self._counted(found), False

    async def get(self, project: ProjectId) -> Project | None:
        await self._state.step()
        found = self._state.projects.get(project)
        return None if found is None else self._counted(found)

    async def list_all(
        self, *, within: Collection[ProjectId] | None, after: ProjectId | None, limit: int
    ) -> list[Project]:
        await self._state.step()
        seen = self._state.projects.keys() & set(self._state.projects if within is None else within)
        ids = sorted(id_ for id_ in seen if after is None or id_ > after)
        return [self._counted(self._state.projects[id_]) for id_ in ids[:limit]]

    def _counted(self, project: Project) -> Project:
        rows = [r for r in self._state.rows.values() if r.command.project == project.id]
        return replace(
            project, queued=sum(map(is_queued, rows)), running=sum(map(is_running, rows))
        )


def _accepted(new: NewCommand, now: datetime) -> Command:
    nothing: Mapping[str, None] = dict.fromkeys(
        ("exit_code", "signal", "reason", "started_at", "finished_at", "duration_ms",
         "queue_wait_ms", "session_id", "usage", "kill")
    )  # fmt: skip
    return Command(
        id=new.id,
        project=new.project,
        kind=new.kind,
        status=Status.QUEUED,
        priority=new.priority,
        attempt=0,
        created_at=now,
        stdout_bytes=0,
        stderr_bytes=0,
        dropped_bytes=0,
        truncated=False,
        argv=new.argv,
        key_id=new.key_id,
        last_seq=0,
        attempt_seq=0,
        **nothing,
    )


def claimed_of(row: Row, *, take_over: bool) -> Claimed:
    assert row.lease_id is not None
    return Claimed(
        lease=Lease(command=row.command.id, id=row.lease_id),
        project=row.command.project,
        kind=row.command.kind,
        spec=row.new.spec,
        retry=row.new.retry,
        attempt=row.command.attempt,
        running_s=trio.current_time() - row.started_at_s,
        take_over=take_over,
        instance=row.instance,
        offsets=row.offsets,
        last_seq=row.command.last_seq,
        attempt_seq=row.command.attempt_seq,
        dropped_bytes=row.command.dropped_bytes,
        queue_wait_ms=row.command.queue_wait_ms or 0,
        cancel_requested=row.cancel_requested,
    )


def is_queued(row: Row) -> bool:
    return row.command.status is Status.QUEUED


def is_running(row: Row) -> bool:
    return row.command.status is Status.RUNNING


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
