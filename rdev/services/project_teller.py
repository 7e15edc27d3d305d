"""SUBSYSTEM ProjectTeller: tells what becomes of projects by themselves.

What is asked of a project has its event in the statement that stores it; that its pod is ready
then, fails, or is gone, only the cluster knows. Every server hears of that, and the store lets one
tell it: whoever finds there what it saw before. A server that lags behind therefore tells nothing
old; what nobody could tell so (all were away meanwhile) is told when it has stood for `STOOD_S`.
A cluster that is not heard says nothing of any project. A look is one query, taken when a pod
changes (at most each `PAUSE_S`) and each `IDLE_S`. In hand: three words for each project that runs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import ProjectStatus, Standing, Told, standing
from rdev.ports.project_life import ProjectPlaces, ProjectTold

IDLE_S = 10.0
PAUSE_S = 0.1
STOOD_S = 5.0


@dataclass(frozen=True, slots=True)
class _Sight:
    """What is seen of a project since then, and what was before."""

    status: ProjectStatus
    since_s: float
    before: ProjectStatus | None


class ProjectTeller:
    """One loop."""

    name = "project_teller"

    def __init__(
        self,
        *,
        store: ProjectTold,
        places: ProjectPlaces,
        reach: Callable[[], str],
        written: Callable[[], None],
    ) -> None:
        """`written` says that an event was; it never waits. Opens nothing."""
        self._store = store
        self._places = places
        self._reach = reach
        self._written = written
        self._sights: dict[ProjectId, _Sight] = {}
        self._work = trio.Event()
        self._is_stopping = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Survives a database and a cluster that are gone."""
        task_status.started()
        pause = Backoff(random=random.random, first_s=0.2, most_s=10.0)
        while not self._is_stopping:
            self._work = trio.Event()
            try:
                wait_s, pause.failures = await self.run_once(), 0
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                wait_s = pause.next_s()
            with trio.move_on_after(wait_s):
                await self._work.wait()
            if not self._is_stopping:
                await trio.sleep(PAUSE_S)

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._is_stopping = True
        self._work.set()

    def wake(self) -> None:
        """A pod has changed. Never waits."""
        self._work.set()

    async def run_once(self) -> float:
        """Tell what is new; when to look again, in seconds. Errors: SERVICE_UNAVAILABLE."""
        last = await self._store.told(reach=self._reach())
        self._sights = {t.project.id: s for t in last if (s := self._sights.get(t.project.id))}
        wait_s = IDLE_S
        for told in last:
            now = standing(told.project, self._places.seen(told.project.id))
            if now.status is ProjectStatus.UNKNOWN:
                continue
            sight = self._see(told.project.id, now.status)
            if now.status is (told.status or ProjectStatus.PENDING):
                # A pod that somebody deleted is expected to come for a moment.
                wait_s = min(wait_s, STOOD_S) if now.reason == "starting" else wait_s
            elif told.status is None or sight.before is told.status or _has_stood(sight):
                await self._tell(told, now)
            else:
                wait_s = min(wait_s, 1.0)
        return wait_s

    def _see(self, project: ProjectId, status: ProjectStatus) -> _Sight:
        known = self._sights.get(project)
        if known is None or known.status is not status:
            before = None if known is None else known.status
            known = self._sights[project] = _Sight(status, trio.current_time(), before)
        return known

    async def _tell(self, told: Told, now: Standing) -> None:
        if await self._store.tell(told, status=now.status, reason=now.reason):
            self._written()


def _has_stood(sight: _Sight) -> bool:
    return trio.current_time() - sight.since_s >= STOOD_S
