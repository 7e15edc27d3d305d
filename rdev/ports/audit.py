"""What the services need from the store of the audit log. Errors of all: SERVICE_UNAVAILABLE.

Entries of changes are written by the statements that make the changes, in the stores of what is
changed; here is what is left: denials, sealing, reading and verifying.
"""

from collections.abc import Sequence
from datetime import date, datetime
from typing import Protocol

from rdev.domain.audit import AuditFilter, AuditPage, Denial, Sealed, SealedEntry
from rdev.domain.audit_chain import Link, Place


class AuditLog(Protocol):
    """Entries and their seals. Neither is ever changed; days are dropped after their time."""

    async def add_denials(self, denials: Sequence[Denial]) -> None:
        """Write entries of denials, all or none."""
        ...

    async def seal(self, *, limit: int) -> Sealed | None:
        """Seal at most `limit` entries of ended transactions, in the order (xid, id), behind what
        is sealed. None: another server is at it; nothing was done."""
        ...

    async def page(self, wanted: AuditFilter, *, before: int | None, limit: int) -> AuditPage:
        """Sealed entries below `before`, newest first, at most `limit`, and none behind the one
        with which they reach `PAGE_BYTES`. Looks at no more than
        `PAGE_LOOK_MAX` seals."""
        ...

    async def read(self, wanted: AuditFilter, *, after: int, limit: int) -> list[SealedEntry]:
        """Sealed entries of the next `limit` seals above `after`, in order; what the filter leaves
        out is left out. Empty does not mean the end: see `bounds`."""
        ...

    async def bounds(self) -> tuple[int, int] | None:
        """The first and the last seal's number, None where nothing is sealed."""
        ...


class AuditChain(Protocol):
    """What a verification reads. It trusts no function of the database."""

    async def bounds(self) -> tuple[int, int] | None:
        """The first and the last seal's number, None where nothing is sealed."""
        ...

    async def place(self, seq: int) -> Place | None:
        """The seal with this number, None where it is not there."""
        ...

    async def links(self, *, after: int, limit: int) -> list[Link]:
        """The next seals above `after`, in order, with the bytes of their entries."""
        ...

    async def strangers(self, first: Place, last: Place) -> int | None:
        """The number of the seal before which an entry stands that was never sealed, of the seals
        from `first` to `last`; with the first seal of all, also of what stands before that. None:
        there is no such entry."""
        ...

    async def is_stored(self, day: date) -> bool:
        """Whether there is a place for entries of this day."""
        ...

    async def drop_of(self, day: date) -> SealedEntry | None:
        """The entry that tells that the day was dropped after its time; None while it is not sealed
        yet, too."""
        ...

    async def newest_drop(self) -> SealedEntry | None:
        """The newest of those entries; its detail says where the chain begins since."""
        ...


class CheckpointSink(Protocol):
    """A place outside of the database for what the chain was at a time."""

    async def keep(self, place: Place, *, at: datetime) -> None:
        """Sign the place and put it there, durably. Errors: SERVICE_UNAVAILABLE."""
        ...
