"""What the housekeeper asks of the store.

The duties are behind turns: while one server has a turn, no other has it. Every duty is idempotent
and bounded, so a turn that ends early (its connection was lost) leaves nothing half done.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date
from typing import Protocol

from rdev.domain.ids import CommandId
from rdev.domain.retention import Ended, OutputDay


class StoreDuties(Protocol):
    """What concerns the store alone. Errors of all: SERVICE_UNAVAILABLE."""

    async def ensure_partitions(self, *, days_ahead: int) -> None:
        """Make the partitions of today and of the days that follow, for output and for the audit
        log: without one for the day no command is accepted, claimed or ended."""
        ...

    async def output_days(self) -> list[OutputDay]:
        """Every day for which there is a partition, oldest first."""
        ...

    async def drop_output(self, day: date) -> bool:
        """Drop a day's output; its streams answer GONE from then on. False: the day is in use now
        (a dump, a long read), and nothing was done. Blocks: at most 0.1 s behind others."""
        ...

    async def old_audit_days(self, *, keep_days: int) -> list[date]:
        """Days of the audit log that are older than this and than the owner's policy, oldest
        first."""
        ...

    async def drop_audit(self, day: date, *, keep_days: int) -> bool:
        """Drop a day of the audit log, and enter that it was dropped. False: nothing was done: it
        is in use, too young, or not all of it is sealed. Blocks: at most 0.1 s behind others."""
        ...

    async def forget_keys(self, *, limit: int) -> int:
        """Delete idempotency keys that stand for nothing any more; returns how many."""
        ...

    async def forget_windows(self, *, limit: int) -> int:
        """Delete windows of rate limits in which no hit counts any more; returns how many. One that
        is being asked is left to the next time."""
        ...

    async def forget_events(self, *, older_s: float, limit: int) -> int:
        """Delete what happened so long ago (not the audit log), in the order of the feeds, up to
        what is younger; returns how many. The newest of them stays: it tells the feeds that
        something went before it."""
        ...

    async def forget_commands(self, *, older_s: float, limit: int) -> int:
        """Delete commands that ended so long ago, of whatever reach; returns how many."""
        ...

    async def forget_deliveries(self, *, older_s: float, limit: int) -> int:
        """Delete deliveries that are so old with their attempts and messages, and endpoints that
        were deleted so long ago; returns how many deliveries or messages, whichever is more. What
        is still to be sent stays, unless its endpoint was deleted."""
        ...


class PlaceDuties(Protocol):
    """What concerns the places of one reach. Errors of all: SERVICE_UNAVAILABLE."""

    async def untidied(self, *, older_s: float, limit: int) -> list[Ended]:
        """Commands that were started, ended so long ago, and come after the last that was tidied;
        in the order in which they ended. Not those of `unkilled`, whose folders are needed."""
        ...

    async def mark_tidied(self, last: Ended) -> None:
        """Everything up to this one is tidied."""
        ...

    async def unkilled(self, *, limit: int) -> list[Ended]:
        """Commands that ended with a kill that left processes; their projects are `failed`."""
        ...

    async def confirm_kill(self, command: CommandId) -> None:
        """Nothing is left of this one. With its last one a project is `ready` again."""
        ...

    async def prunable(self, *, older_s: float, limit: int) -> list[Ended]:
        """Commands that ended so long ago, in the order in which they ended; not those of
        `unkilled`."""
        ...

    async def forget(self, commands: Sequence[CommandId]) -> None:
        """Delete these commands, as far as they have ended."""
        ...


class Upkeep(Protocol):
    """Turns. Each is for one server at a time; None while another one has it."""

    def store_turn(self) -> AbstractAsyncContextManager[StoreDuties | None]:
        """The turn for the store's duties, for the block. Errors: SERVICE_UNAVAILABLE."""
        ...

    def place_turn(self, reach: str) -> AbstractAsyncContextManager[PlaceDuties | None]:
        """The turn for the places of a reach, for the block. Errors: SERVICE_UNAVAILABLE."""
        ...
