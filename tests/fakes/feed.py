"""The record of events in memory, with transactions that end in any order."""

from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from uuid import UUID

import trio

from rdev.domain.commands import Kind, Status
from rdev.domain.errors import RdevError
from rdev.domain.feed import Detail, FeedEvent, Position, check_kept, position_of
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.ports.feed import FeedBounds, FeedPage

KEPT_S = 7 * 86_400.0


def new_event(
    status: Status = Status.QUEUED,
    *,
    command: CommandId | None = None,
    project: str = "demo",
    kind: Kind = Kind.SHELL,
    attempt: int = 0,
    detail: Detail | None = None,
) -> FeedEvent:
    """An event that has no place yet."""
    return FeedEvent(
        position=Position(0),
        command=command or command_id(UUID(int=1)),
        project=ProjectId(project),
        kind=kind,
        status=status,
        attempt=attempt,
        detail=detail or Detail(),
    )


@dataclass(slots=True, eq=False)
class FakeTransaction:
    """A transaction that writes; it has its number from the start."""

    log: "FakeFeed"
    xid: int
    began_s: float
    events: list[FeedEvent] = field(default_factory=list)

    async def put(self, event: FeedEvent) -> Position:
        await trio.lowlevel.checkpoint()
        place = position_of(self.xid, next(self.log.numbers))
        self.events.append(replace(event, position=place))
        return place


class FakeFeed:
    """The `FeedLog` port."""

    def __init__(self) -> None:
        self.numbers: Iterator[int] = count(1)
        self._xids: Iterator[int] = count(700)
        self._xmin = 700
        self._running: dict[FakeTransaction, None] = {}
        # Committed events, and how old they are by `age`.
        self._stored: dict[Position, FeedEvent] = {}
        self._ages_s: dict[Position, float] = {}
        self.reads = 0
        self.error: RdevError | None = None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[FakeTransaction]:
        """Commits at the end of the block; aborts where it is left by an error."""
        transaction = FakeTransaction(self, next(self._xids), trio.current_time())
        self._running[transaction] = None
        try:
            yield transaction
            for event in transaction.events:
                self._stored[event.position] = event
                self._ages_s[event.position] = 0.0
        finally:
            del self._running[transaction]
            self._xmin = transaction.xid + 1 if not self._running else self._xmin

    async def put(self, event: FeedEvent) -> Position:
        """One event in a transaction of its own."""
        async with self.transaction() as transaction:
            return await transaction.put(event)

    def age(self, seconds: float) -> None:
        """Make all that is stored older."""
        for place in self._ages_s:
            self._ages_s[place] += seconds

    def forget(self, *, limit: int) -> int:
        """Delete what is old, all but its newest; returns how many."""
        places = sorted(self._stored)
        kept = next((n for n, p in enumerate(places) if self._ages_s[p] <= KEPT_S), len(places))
        gone = places[: max(0, min(kept - 1, limit))]
        for place in gone:
            del self._stored[place], self._ages_s[place]
        return len(gone)

    async def read(
        self, *, after: Position, limit: int, projects: Collection[ProjectId] | None
    ) -> FeedPage:
        await self._step()
        self.reads += 1
        bounds, edge = self._bounds(), position_of(self._edge, 0)
        check_kept(after, oldest=bounds.oldest, end=edge)
        found = [
            event
            for place, event in sorted(self._stored.items())
            if after < place < edge and (projects is None or event.project in projects)
        ][:limit]
        is_full = len(found) == limit
        return FeedPage(
            events=tuple(found),
            end=found[-1].position if is_full else max(after, bounds.head),
            is_held=any(place > edge for place in self._stored),
        )

    async def bounds(self) -> FeedBounds:
        await self._step()
        return self._bounds()

    async def held_back_s(self) -> float:
        await self._step()
        if not any(place > position_of(self._edge, 0) for place in self._stored):
            return 0.0
        return trio.current_time() - min(one.began_s for one in self._running)

    @property
    def _edge(self) -> int:
        running = [transaction.xid for transaction in self._running]
        newest = max((place >> 63 for place in self._stored), default=self._xmin - 1)
        return min(running, default=max(self._xmin, newest + 1))

    def _bounds(self) -> FeedBounds:
        places = sorted(self._stored)
        edge = position_of(self._edge, 0)
        has_old = bool(places) and self._ages_s[places[0]] > KEPT_S
        return FeedBounds(
            oldest=places[0] if has_old else Position(0),
            head=max((place for place in places if place < edge), default=edge),
        )

    async def _step(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
