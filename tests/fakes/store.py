"""The stores in memory: what the ports promise, and nothing of how PostgreSQL keeps it.

All fakes share one `StoreState`. Time is `trio.current_time()`, nothing is random, and every
operation is one step after one checkpoint, so a simulation on these fakes is deterministic. Faults
are switches of the state: `unavailable`, `lost_replies`, `held`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import trio

from rdev.domain.audit import Actor
from rdev.domain.commands import (
    LANE_CLASS,
    Claimed,
    Command,
    Lease,
    NewCommand,
    Outcome,
    Status,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Offsets
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.projects import Project
from rdev.domain.stream import (
    Chunk,
    Source,
    final_lines,
)
from tests.fakes.idempotency import KeptKeys
from tests.fakes.record import Record

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# Who asks, where it does not matter.
ACTOR = Actor(key_id="key_admin", key_name="bootstrap", ip="127.0.0.1", request_id="req-1")


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
    left_lease: int | None = None
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
    record: Record = field(default_factory=Record)
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
        self.record.age(seconds)
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

    def end(self, row: Row, status: Status, by: Actor | str) -> None:
        """End a queued command."""
        outcome = Outcome(status=status, reason=status.value)
        attempt = row.command.attempt
        payload = final_lines(
            outcome, attempt=attempt, truncated=False, stdout_bytes=0, stderr_bytes=0
        )
        self.put(row, Source.LIFE, 2, 0, payload)
        row.command = replace(row.command, status=status, reason=status.value, finished_at=self.now)
        row.has_spec = False
        self.record.changed(row.command, f"command.{status}", by)

    def lease(self, row: Row, holder: str, lease_s: float) -> None:
        """Put a command under a fresh lease."""
        self.last_lease_id += 1
        row.left_lease = row.lease_id
        row.lease_id = self.last_lease_id
        row.lease_until = trio.current_time() + lease_s
        row.holder = holder

    def queued(self, lane: Lane) -> list[Row]:
        """What waits in a lane, in order."""
        rows = [row for row in self.rows.values() if row.lane == lane and is_queued(row)]
        return sorted(rows, key=lambda row: row.place)

    def has_room(self, lane: Lane) -> bool:
        """Whether fewer than the cap of a lane run, and no kill left anything in its project."""
        if self.is_failed(lane.project):
            return False
        rows = [row for row in self.rows.values() if row.lane == lane and is_running(row)]
        return len(rows) < self.lanes[lane].cap

    def is_failed(self, project: ProjectId) -> bool:
        """Whether a kill has left processes there."""
        rows = [row for row in self.rows.values() if row.command.project == project]
        return any(map(is_unkilled, rows))

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
        trace=row.new.trace,
        taken_from=row.left_lease if take_over else None,
    )


def is_queued(row: Row) -> bool:
    return row.command.status is Status.QUEUED


def is_unkilled(row: Row) -> bool:
    return row.command.kill is not None and not row.command.kill.confirmed


def is_running(row: Row) -> bool:
    return row.command.status is Status.RUNNING
