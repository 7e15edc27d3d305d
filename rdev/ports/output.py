"""What the services need from the log of events: append under a fence, read in order, trim.

The log is the truth: what `append` returned as applied is committed, and only then may anybody
see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from rdev.domain.commands import Lease, Outcome, Status
from rdev.domain.execution import Offsets
from rdev.domain.ids import CommandId
from rdev.domain.stream import Chunk, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class NewChunk:
    """Events that have no numbers yet; the log draws them. Payload ≤ 64 KiB as a rule."""

    source: Source
    events: int
    raw_bytes: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """The pending events of one command. It applies only if the lease is the command's and the
    log stands exactly at `start` and `start_seq` (the last event's number; events may stand for no
    bytes at all); it moves the log to `end`. `outcome` ends the command with it, or, where its
    status is `queued`, the attempt: the command waits again where it stood in its lane, and the log
    stands at the beginning of its next attempt. That is not done once a cancel was asked for.
    """

    lease: Lease
    start: Offsets
    start_seq: int
    end: Offsets
    chunks: tuple[NewChunk, ...]
    outcome: Outcome | None = None

    @property
    def queues_again(self) -> bool:
        """Whether another attempt is to follow."""
        return self.outcome is not None and self.outcome.status is Status.QUEUED

    @property
    def leaves_at(self) -> Offsets:
        """Where the log stands when this was applied."""
        return Offsets() if self.queues_again else self.end

    @property
    def size_bytes(self) -> int:
        """Payload bytes, the unit of all bounds on pending output."""
        return sum(len(chunk.payload) for chunk in self.chunks)


class AppendState(StrEnum):
    """What became of an append."""

    APPLIED = "applied"
    LOCKED = "locked"
    STALE = "stale"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendResult:
    """`chunks` are the stored ones with their numbers (APPLIED). LOCKED: nothing was done, try
    again. STALE: the lease is no longer the command's; the writer must stop. REFUSED: nothing was
    done; the command is not queued again, since a cancel was asked for."""

    command: CommandId
    state: AppendState
    chunks: tuple[Chunk, ...] = ()


class OutputLog(Protocol):
    """The events of all commands."""

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        """Apply each append or none of it, all in one statement, one result for each in order.

        Repeating an append whose reply was lost is harmless: what it starts at no longer matches,
        and it is reported as APPLIED with the numbers it got. Each command concerns only
        itself: a locked or stale one does not hold up the others. At most one append a command.
        Errors: SERVICE_UNAVAILABLE (nothing may be assumed; repeat), INTERNAL_ERROR when the
        batch as a whole is refused (the caller halves it until the guilty one is alone).
        """
        ...

    async def read(self, command: CommandId, *, after: int, limit_bytes: int) -> list[Chunk]:
        """Chunks that hold events with a number > `after`, in order, until `limit_bytes` of
        payload or 1,000 chunks are reached (always at least one if there is any). The first may
        begin earlier."""
        ...

    async def read_tail(
        self, command: CommandId, source: Source, *, tail_bytes: int
    ) -> list[Chunk]:
        """The last chunks of one source that cover at least `tail_bytes` raw bytes, in order; none
        of an earlier attempt."""
        ...

    async def trim(self, lease: Lease, source: Source, *, head_bytes: int, tail_bytes: int) -> int:
        """Replace the middle of a source, as the present attempt wrote it, by gaps: chunks that
        begin no earlier than `head_bytes` into it and have at least `tail_bytes` behind them.
        Neighbouring gaps become one.

        Fenced like an append. Returns the raw bytes dropped in all of the attempt's life by this
        source, 0 when nothing was (or the lease is stale).
        """
        ...

    async def heads(
        self, commands: Sequence[CommandId], *, written_by_others_than: str
    ) -> dict[CommandId, int]:
        """The last event's number of each of these commands that this holder does not run (one
        that waits for its next attempt may be ended by anybody); unknown ones are left out.
        Errors: SERVICE_UNAVAILABLE."""
        ...

    async def oldest_seq(self, command: CommandId) -> int | None:
        """The first number still stored; None when the command has no events any more."""
        ...
