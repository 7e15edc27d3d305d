"""How much is queued, known to the second, and the refusal of what is too much.

The count is shared: at most `MAX_AGE_S` old, or `REFUSAL_AGE_S` where something is refused by it.
One task at a time takes it, and at most a tenth of the time is spent on it. What this process has
accepted since is added, so that it alone never exceeds a limit; n servers together may, by what the
others accept within that second. A request under way while the count is taken may be counted twice
until the next one. Where the count fails, the last one stands, with what was accepted since: the
bound holds without the database's help.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from rdev.domain.depths import DepthLimits, Depths
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.ports.depths import QueueDepths
from rdev.ports.telemetry import Telemetry

MAX_AGE_S = 1.0
# What was accepted since the count may run already: a refusal looks again.
REFUSAL_AGE_S = 0.1
# A count that took t seconds serves for at least so many times t.
AGE_PER_COUNT = 10
MAX_AGE_OF_SLOW_S = 10.0
# A full queue is not empty in a second.
RETRY_AFTER_S = 5.0


class QueueFullError(RdevError):
    """A refusal by a depth limit: nothing was asked of the store. `limit` is its name."""

    def __init__(self, limit: str, code: ErrorCode, message: str) -> None:
        """With a delay."""
        super().__init__(code, message, retry_after_s=RETRY_AFTER_S)
        self.limit = limit


class Place:
    """One command's place in the queue. Kept unless given back."""

    def __init__(self) -> None:
        self.is_kept = True

    def give_back(self) -> None:
        """Nothing was queued after all. Idempotent."""
        self.is_kept = False


class QueueGate:
    """Counts, and lets in."""

    def __init__(self, *, queue: QueueDepths, limits: DepthLimits, telemetry: Telemetry) -> None:
        self.limits = limits
        self._queue = queue
        self._telemetry = telemetry
        self._counting = trio.Lock()
        self._counted = Depths(projects={})
        self._queued = 0
        self._failure: RdevError | None = None
        self._counted_at_s = float("-inf")
        self._pause_s = 0.0
        # Places taken since the count began; those of requests that are still under way; and, while
        # the next count is taken, what will have to be added to it.
        self._taken: Counter[ProjectId] = Counter()
        self._under_way: Counter[ProjectId] = Counter()
        self._taken_meanwhile: Counter[ProjectId] | None = None

    async def depths(self) -> Depths:
        """The queue as it was at most `MAX_AGE_S` ago (longer where counting takes long).

        Errors: SERVICE_UNAVAILABLE, the same for all who ask within that time.
        """
        failure = await self._refresh(MAX_AGE_S)
        if failure is not None:
            raise RdevError(failure.code, failure.message, retry_after_s=failure.retry_after_s)
        return self._counted

    @asynccontextmanager
    async def place(self, project: ProjectId) -> AsyncIterator[Place]:
        """Let one command in, and hold its place while the block stores it.

        An error that says nothing was stored gives the place back.
        Errors: QueueFullError: TOO_MANY_REQUESTS where the project's queue is full,
        SERVICE_UNAVAILABLE where the server's is, both with a delay.
        """
        await self._refresh(MAX_AGE_S)
        if self._refusal(project) is not None:
            await self._refresh(REFUSAL_AGE_S)
        refusal = self._refusal(project)
        if refusal is not None:
            self._telemetry.limit_checked(refusal.limit, refused=True)
            raise refusal
        place = Place()
        self._move(project, 1)
        self._under_way[project] += 1
        try:
            yield place
        except RdevError as error:
            # Only then it may have been stored.
            place.is_kept = error.code is ErrorCode.SERVICE_UNAVAILABLE
            raise
        finally:
            self._under_way[project] -= 1
            if not place.is_kept:
                self._move(project, -1)

    async def _refresh(self, max_age_s: float) -> RdevError | None:
        """Count again where the count is too old; why that failed, where it did."""
        async with self._counting:
            began_s = trio.current_time()
            if began_s >= self._counted_at_s + max(max_age_s, self._pause_s):
                self._failure = await self._count()
                self._counted_at_s = trio.current_time()
                took_s = self._counted_at_s - began_s if self._failure is None else 0.0
                self._pause_s = min(MAX_AGE_OF_SLOW_S, AGE_PER_COUNT * took_s)
        return self._failure

    async def _count(self) -> RdevError | None:
        self._taken_meanwhile = Counter(self._under_way)
        try:
            counted = await self._queue.count()
        except RdevError as error:
            return error
        else:
            self._counted, self._queued = counted, counted.depth.queued
            self._taken = +self._taken_meanwhile
            self._under_way = +self._under_way
            return None
        finally:
            self._taken_meanwhile = None

    def _refusal(self, project: ProjectId) -> QueueFullError | None:
        """Why no more may be queued there now."""
        found = self._counted.projects.get(project)
        in_project = (0 if found is None else found.depth.queued) + self._taken[project]
        if in_project >= self.limits.project_max:
            message = f"project {project!r} has {in_project} commands queued, as many as it may"
            return QueueFullError("queue_project", ErrorCode.TOO_MANY_REQUESTS, message)
        if self._queued + self._taken.total() >= self.limits.server_max:
            message = f"{self.limits.server_max} commands are queued, as many as there may be"
            return QueueFullError("queue", ErrorCode.SERVICE_UNAVAILABLE, message)
        return None

    def _move(self, project: ProjectId, places: int) -> None:
        self._taken[project] += places
        if self._taken_meanwhile is not None:
            self._taken_meanwhile[project] += places
