"""Readers of one stream that stand at the same place and let the hub write: one position for all.

An event is one loop over their clients, and nothing else of a reader is touched: after each send
the caches hold the kernel's things, and what a reader needed of its own for each event (a position,
a check, a call) cost 1 µs beside the 5.5 of the send. Bounds: `MEMBERS_MAX` readers; a group is
written to without a pause, so that the hub can yield between two of them.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, Self, TypeVar

from rdev.services.stream_tail import Frames

# Some 0.4 ms of writes of one event each; of 16 KiB each 1.5 ms.
MEMBERS_MAX = 64

# Writes frames to several clients; says which of them, by place, did not take everything.
OfferEach = Callable[[Frames], Sequence[int]]


Member = TypeVar("Member", bound=Hashable)


class Outlet(Protocol):
    """A client that the hub may write to while its reader waits. All of a hub's are of one kind."""

    def together(self, outlets: Sequence[Self]) -> OfferEach:
        """A function that writes frames to each of these, as far as its client takes them at once,
        keeps the rest, and says who kept some. It never waits."""
        ...


class Group(Generic[Member]):
    """Some readers that wait. `position` is the last event that they all were given."""

    __slots__ = ("_offer_each", "members", "position")

    def __init__(self, position: int) -> None:
        self.position = position
        self.members: dict[Member, Outlet] = {}
        # As long as the members are the same.
        self._offer_each: OfferEach | None = None

    @property
    def has_room(self) -> bool:
        """Whether another reader may join."""
        return len(self.members) < MEMBERS_MAX

    def add(self, reader: Member, outlet: Outlet) -> None:
        """A reader that stands where the group does joins it."""
        self.members[reader] = outlet
        self._offer_each = None

    def remove(self, reader: Member) -> None:
        """A reader leaves; from now on nothing is written to it here."""
        del self.members[reader]
        self._offer_each = None

    def write(self, frames: Frames) -> list[Member]:
        """Give all members the frames that follow; those who did not take everything. Nobody joins
        or leaves meanwhile: no outlet calls back."""
        if self._offer_each is None:
            outlets = list(self.members.values())
            self._offer_each = outlets[0].together(outlets)
        kept = self._offer_each(frames)
        self.position = frames.last_seq
        if not kept:
            return []
        members = list(self.members)
        return [members[place] for place in kept]
