"""What the services need from the record of events: read it in order.

The order is that of `Position`. Only what is final is given: nothing will ever become readable
before what was read. What is committed but stands behind a transaction that is still writing is
*held back* until that one has ended.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from rdev.domain.feed import FeedEvent, Position
from rdev.domain.ids import ProjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPage:
    """What follows a place: everything that was asked for after it and up to `end`.

    `is_held`: events that are committed stand behind the end of what may be read.
    """

    events: tuple[FeedEvent, ...]
    end: Position
    is_held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedBounds:
    """`oldest`: from there on everything is stored. `head`: the last event that may be read, or a
    place before the first one."""

    oldest: Position
    head: Position


class FeedLog(Protocol):
    """The changes of all commands. Errors of all: SERVICE_UNAVAILABLE."""

    async def read(
        self, *, after: Position, limit: int, projects: Collection[ProjectId] | None
    ) -> FeedPage:
        """The events after a place, of these projects (None: of all), in order, at most `limit`.

        Its cost is in what it returns, not in what is stored. Errors: GONE where events after
        `after` are no longer stored, or where the place is none that was ever given.
        """
        ...

    async def bounds(self) -> FeedBounds:
        """From where and how far the feed can be read now."""
        ...

    async def held_back_s(self) -> float:
        """The age, in seconds, of the oldest transaction that holds events back; 0 where none
        does."""
        ...
