"""What the services need from the store of commands: accepting, reading, leasing, ending.

All stamps are the database's. A lease is a fence: every write of an attempt compares it, and a
writer whose lease is no longer the command's changes nothing.

Whatever changes a command, here and in the log (`rdev/ports/output.py`), is recorded in the same
transaction: each change of its status as an event, with the number of the event of its own stream
that tells the same (of an end, `complete`); each change but a heartbeat, output and a release as an
audit entry, under the `Actor` who asked or the holder that did it by itself. What changes nothing
records nothing. Of one command, the records stand in the order in which it changed.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from rdev.domain.audit import Actor
from rdev.domain.commands import Claimed, Command, Kind, Lease, NewCommand, Status
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.pages import Page

# Positions are counted so far: a count must not cost what a whole queue costs.
POSITION_MAX = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What the store made of a new command, or (`is_replay`) of an earlier request with the same
    idempotency key, as it is now. The position is None where the command is no longer queued."""

    command: Command
    queue_position: int | None
    is_replay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelResult:
    """What a cancel found. `ended_now` is true when the command was queued and this call ended
    it; a running command has the request recorded instead."""

    command: Command
    ended_now: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a claim took, and what it ended because it had expired."""

    claimed: list[Claimed]
    expired: list[CommandId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a heartbeat found: leases that are no longer ours, and commands to be cancelled."""

    stale: frozenset[Lease]
    cancel_requested: frozenset[Lease]


class CommandStore(Protocol):
    """Accepting, reading and cancelling commands."""

    async def insert(self, new: NewCommand) -> Accepted:
        """Store a queued command with its first event (seq 1) and its idempotency key, where it has
        one, in one transaction. A key that stands for something already makes nothing: what it
        stands for is returned. Of several at once with one key one makes a command, the others wait
        for it.

        Errors: NOT_FOUND when the project does not exist; CONFLICT, with a delay, when another
        request with this key took longer than 2 s; as `replay`.
        Cancellation: runs under a bounded shield; when it returns, the command is stored.
        """
        ...

    async def replay(self, idempotency: Idempotency) -> Accepted | None:
        """What the key stands for, as it is now; None when nothing was made under it within
        `IDEMPOTENCY_S`.

        Errors: IDEMPOTENCY_MISMATCH when it stands for another request; GONE when the command it
        stands for is no longer stored.
        """
        ...

    async def get(self, command: CommandId) -> Command | None:
        """The command as it is now, or None."""
        ...

    async def list_for_project(
        self,
        project: ProjectId,
        *,
        status: Status | None,
        kind: Kind | None,
        before: CommandId | None,
        limit: int,
    ) -> Page[Command]:
        """Commands of a project, newest first, those older than `before`: at most `limit`, and none
        behind the one with which they reach `PAGE_BYTES`."""
        ...

    async def queue_position(self, command: CommandId) -> int | None:
        """How many queued commands of its lane are served no later than it, itself included; None
        when it is not queued. No more than `POSITION_MAX` are counted: that number says "at least
        so many"."""
        ...

    async def request_cancel(self, command: CommandId, actor: Actor) -> CancelResult | None:
        """End a queued command as `cancelled` (with its last events), or record the request on a
        running one; `actor` asks. Ended commands are returned as they are. None: no such command.
        Needs no lease: it only asks.
        """
        ...


class Lanes(Protocol):
    """The order of queued commands, and taking the next ones."""

    async def touch(self, lanes: Collection[Lane]) -> None:
        """Put these lanes where they stand now: something was queued there, or ended there.

        Called after the commit of what happened, never with it. What is lost is found by `repair`.
        A lane that is unknown is left out.
        """
        ...

    async def claim(
        self,
        *,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        touched: Collection[Lane] = (),
        closed: Collection[ProjectId] = (),
    ) -> Claims:
        """Touch these lanes, then take up to `limit` (≥ 1) commands: heads of lanes of this reach,
        in the order of `due`; a lane that gave one stands behind those that wait.

        Never more commands of a lane run than its cap, whoever claims at the same time; within a
        lane they are taken in order of rank. What has expired is ended on the way. A claim stores
        `running`, the next attempt's number, the event `status: running`, a fresh lease, and
        `instance` where it is given; what was claimed never expires, though it be queued again. A
        lane that another claim holds is left out; nothing taken and nothing ended means that there
        is nothing for this claim.

        Lanes of `closed` projects are passed by: nothing is taken there, they keep their place for
        the next claim that does not name them, and they take none of this one's.
        """
        ...

    async def repair(self, *, reach: str) -> int:
        """Touch every lane of this reach that could be served and is parked or stands too late;
        returns how many there were."""
        ...

    async def expire(self, *, holder: str, limit: int) -> list[CommandId]:
        """End queued commands whose `expires_in_s` has passed, with their last events, in the name
        of `holder`."""
        ...


class Leases(Protocol):
    """Who may write for a running command."""

    async def take_over(
        self, *, reach: str, holder: str, limit: int, closed: Collection[ProjectId] = ()
    ) -> list[Claimed]:
        """Take commands of this reach whose lease has expired, under fresh leases; those of
        `closed` projects stay for the next one who does not name them.

        Attempt, instance and the log's offsets stay: the command is attached to, not run again.
        """
        ...

    async def heartbeat(self, leases: Sequence[Lease]) -> Beat:
        """Renew the leases in one statement; says which are stale and which are to be cancelled."""
        ...

    async def record_instance(self, lease: Lease, instance: str) -> bool:
        """Store what the project is, before anything starts in it; again is fine. False: the lease
        is stale, or another instance was recorded."""
        ...

    async def release(self, leases: Sequence[Lease]) -> None:
        """Let others take over at once: the leases expire now. Stale ones are left alone."""
        ...

    async def release_holder(self, holder: str) -> int:
        """Expire all leases of a holder that is known to be dead. Returns how many there were."""
        ...
