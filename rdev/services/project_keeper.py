"""SUBSYSTEM ProjectKeeper: brings every project to what is asked of it.

What is asked is a row (`ProjectLife`), so whoever looks next goes on where another one stopped,
died or was refused; two servers at once do the same thing twice, which is allowed. A look is one
query, taken when somebody asks for something, when a pod changes, when a try is over or due, and
each `IDLE_S`; it waits for no try, so none holds up another project's. What a try does is in
`project_steps.py`.

A project that cannot be brought there keeps the reason. A try asks its place once. What is not
through is due again after `TICK_S` or when its pod changes; what failed after pauses up to
`_MOST_S`, or what the cluster asks for up to `_ASKED_MOST_S`; both later where so many wait that
more than `AGAIN_PER_S` would be tried a second. A new wish is due at once, before all that was
tried: what can be brought about never waits for what cannot, however much that is.
In hand: `AT_ONCE` projects, and what was tried of those that are unsettled.
Also takes in what was found by its labels: a pod that is there gives its project a row.
"""

import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project
from rdev.ports.project_life import ProjectLife, ProjectPlaces, Tried
from rdev.services.project_steps import ProjectSteps

TICK_S = 2.0
IDLE_S = 10.0
AT_ONCE = 8
AGAIN_PER_S = 10
_FIRST_S, _MOST_S = 1.0, 20.0
_ASKED_MOST_S = 60.0  # of what the cluster asks for
_IN_HAND_S = float("inf")

_log = logging.getLogger("rdev.projects")


def _backoff() -> Backoff:
    return Backoff(random=random.random, first_s=_FIRST_S, most_s=_MOST_S)


@dataclass(slots=True, eq=False)
class _Try:
    """What was tried for one wish: `due_s` is when again (a trio time), of one in hand never."""

    wanted_at: datetime | None
    due_s: float = _IN_HAND_S
    hands: int = 0
    # Its pod has, while it was in hand.
    has_changed: bool = False
    trouble: str | None = None  # the last
    pauses: Backoff = field(default_factory=_backoff)


class ProjectKeeper:
    """One loop, and whoever waits for a project (`bring`)."""

    name = "project_keeper"

    def __init__(
        self,
        *,
        steps: ProjectSteps,
        life: ProjectLife,
        places: ProjectPlaces,
        reach: Callable[[], str],
    ) -> None:
        """Opens nothing."""
        self._steps = steps
        self._life = life
        self._places = places
        self._reach = reach
        self._work = trio.Event()
        self._is_stopping = False
        self._free = AT_ONCE
        self._tries: dict[ProjectId, _Try] = {}
        # The pods that were looked at last, and when they are again.
        self._found: Collection[ProjectId] = ()
        self._found_due_s = 0.0
        self._is_adopting = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, and until what is in hand then is through its try. Survives a
        database and a cluster that are gone."""
        task_status.started()
        pause = Backoff(random=random.random, first_s=0.2, most_s=10.0)
        async with trio.open_nursery() as hands:
            while not self._is_stopping:
                self._work = trio.Event()
                try:
                    wait_s, pause.failures = await self._look(hands), 0
                except RdevError as error:
                    if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                        raise
                    wait_s = pause.next_s()
                with trio.move_on_after(wait_s):
                    await self._work.wait()

    def stop(self) -> None:
        """End the loop; what is not through goes on elsewhere. Idempotent."""
        self._is_stopping = True
        self._work.set()

    def wake(self) -> None:
        """Something was asked for. Never waits."""
        self._work.set()

    def heed(self, project: ProjectId) -> None:
        """Its pod has changed: where that is what it waits for, it is due. Never waits."""
        known = self._tries.get(project)
        if known is not None:
            known.has_changed = True
            if not known.hands and not known.pauses.failures:
                known.due_s = trio.current_time()
        self._work.set()

    async def run_once(self) -> None:
        """One look, and what it takes in hand to the end of a try. Errors: SERVICE_UNAVAILABLE, of
        the database."""
        async with trio.open_nursery() as hands:
            await self._look(hands)

    async def _look(self, hands: trio.Nursery) -> float:
        """Take in hand what is due, as far as hands are free; when to look again, in seconds."""
        self._look_for_pods(hands)
        if self._free == 0:
            return IDLE_S  # who is through wakes the loop
        now_s, free = trio.current_time(), self._free
        tried = [_told(project, known, now_s) for project, known in self._tries.items()]
        due = await self._life.unsettled(reach=self._reach(), tried=tried, limit=free)
        for project in due:
            known = self._tries.get(project.id)
            if known is not None and known.hands:
                continue  # whoever waits for it was quicker than our question
            self._free -= 1
            hands.start_soon(self._try, project, self._take(project))
        if len(due) < free:
            self._forget([one.project for one in tried if one.wait_s <= 0])
        next_s = min((known.due_s for known in self._tries.values()), default=_IN_HAND_S)
        return min(max(0.0, next_s - trio.current_time()), IDLE_S)

    def _forget(self, were_due: Collection[ProjectId]) -> None:
        """Those of them that were not found unsettled: another server was there."""
        for project in were_due:
            known = self._tries.get(project)
            if known is not None and not known.hands:
                del self._tries[project]

    def _take(self, project: Project) -> _Try:
        """Take it in hand: nothing else is begun for it here meanwhile."""
        known = self._tries.get(project.id)
        if known is None or known.wanted_at != project.wanted_at:
            known = self._tries[project.id] = _Try(wanted_at=project.wanted_at)
        known.hands += 1
        known.due_s, known.has_changed = _IN_HAND_S, False
        return known

    def _let_go(self, project: ProjectId, known: _Try, wait_s: float, *, is_through: bool) -> None:
        known.hands -= 1
        if is_through and self._tries.get(project) is known:
            del self._tries[project]
        elif known.hands:
            pass  # who has it still says when
        elif known.has_changed and not known.pauses.failures:
            known.due_s = trio.current_time()
        else:
            pace_s = len(self._tries) / AGAIN_PER_S * (0.5 + random.random())
            known.due_s = trio.current_time() + max(wait_s, pace_s)

    async def _try(self, project: Project, known: _Try) -> None:
        try:
            await self._carry(project, known, patience_s=0.0)
        except RdevError as error:
            if known.trouble != error.message:
                known.trouble = error.message
                facts = {"project": project.id, "wanted": project.wanted, "error": error.message}
                _log.warning("project is not what is asked of it", extra=facts)
            await self._note(project, error)
        finally:
            self._free += 1
            self._work.set()

    async def _carry(self, project: Project, known: _Try, *, patience_s: float) -> bool:
        """A try of what was taken in hand, and when the next one is due."""
        is_through, wait_s = False, 0.0
        try:
            is_through = await self._steps.bring(project, patience_s=patience_s)
            wait_s, known.pauses.failures = TICK_S, 0
        except RdevError as error:
            wait_s = max(known.pauses.next_s(), min(error.retry_after_s or 0.0, _ASKED_MOST_S))
            raise
        finally:
            self._let_go(project.id, known, wait_s, is_through=is_through)
        return is_through

    async def bring(self, project: Project, *, patience_s: float) -> bool:
        """The next steps towards what is wanted of it, for somebody who waits; whether it is so
        now. If not, the loop goes on.

        Errors: those of `ProjectPlaces`; SERVICE_UNAVAILABLE. Cancellation: somebody goes on.
        """
        try:
            return await self._carry(project, self._take(project), patience_s=patience_s)
        except RdevError as error:
            trouble = error
        finally:
            self._work.set()
        await self._note(project, trouble)
        raise trouble

    async def _note(self, project: Project, trouble: RdevError) -> None:
        try:
            await self._life.note(project, trouble.message)
        except RdevError as error:
            # Most often what the trouble was: the database is away. The log has it.
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise

    def _look_for_pods(self, hands: trio.Nursery) -> None:
        """Ask for those that were found, when they are others and each `IDLE_S`."""
        if self._is_adopting or not self._places.are_made:
            return
        found = frozenset(self._places.found())
        if found != self._found or trio.current_time() >= self._found_due_s:
            self._found, self._found_due_s = found, trio.current_time() + IDLE_S
            self._is_adopting = True
            hands.start_soon(self._adopt, found)

    async def _adopt(self, found: Collection[ProjectId]) -> None:
        """Take in every project that was found by its pod and has no row."""
        try:
            for project in await self._life.missing(found) if found else ():
                await self._adopt_one(project)
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            _log.info("pods are not looked at now", extra={"error": error.message})
        finally:
            self._is_adopting = False
            if frozenset(self._places.found()) != found:
                self._work.set()

    async def _adopt_one(self, project: ProjectId) -> None:
        try:
            await self._steps.take_in(project, patience_s=0.0)
        except RdevError as error:
            _log.info("pod passed by", extra={"project": project, "error": error.message})


def _told(project: ProjectId, known: _Try, now_s: float) -> Tried:
    wanted_at = None if known.hands else known.wanted_at
    return Tried(project=project, wanted_at=wanted_at, wait_s=known.due_s - now_s)
