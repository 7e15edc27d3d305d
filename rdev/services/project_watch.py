"""SUBSYSTEM ProjectWatch: sees when a project is gone, and tells whoever follows its life.

Woken when a project was changed, here or elsewhere, and every `TICK_S`, it asks for all watched
projects in one statement (none where nothing is watched); so its end is told within `TICK_S` +
`LOOK_S` + `LAST_WORDS_S`, also where every notification is lost. A project of the same name that
was made since is another one. Bounds: watchers are bounded by the HTTP edge.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from rdev.domain.errors import RdevError
from rdev.domain.ids import ProjectId
from rdev.ports.projects import ProjectStore
from rdev.services.beat import next_beat_s

TICK_S: Final = 5.0
# A statement that takes longer has failed.
LOOK_S: Final = 2.0
# Between two looks, however often it is woken.
PAUSE_S: Final = 0.05
# What the project's commands came to was written before it went: time for the feed to tell it.
LAST_WORDS_S: Final = 1.5

# In the words of a stream's `disconnecting`.
DELETED: Final = "project_deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectWatchStatistics:
    """Projects watched now; since the start: looks, looks that failed, projects that went."""

    watched: int
    looks: int
    failures: int
    gone: int


@dataclass(slots=True, eq=False)
class _Watched:
    """One project. `uid` is known from the first look on."""

    uid: str | None = None
    # Of one watcher each; a method may be given twice.
    on_gone: list[Callable[[str], None]] = field(default_factory=list)


class ProjectWatch:
    """See the module."""

    name = "project_watch"

    def __init__(self, *, store: ProjectStore) -> None:
        """Nothing is watched yet."""
        self._store = store
        self._watched: dict[ProjectId, _Watched] = {}
        self._work = trio.Event()
        self._stop = trio.Event()
        self._looks = self._failures = self._gone = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look until `stop`. Survives a database that is gone."""
        task_status.started()
        again_at_s = 0.0
        while not self._stop.is_set():
            with trio.move_on_at(next_beat_s(TICK_S)):
                await self._work.wait()
            if trio.current_time() < again_at_s:
                with trio.move_on_at(again_at_s):
                    await self._stop.wait()
            self._work = trio.Event()
            await self.run_once()
            again_at_s = trio.current_time() + PAUSE_S

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()
        self._work.set()

    def wake(self) -> None:
        """A project may have changed. Never waits."""
        self._work.set()

    @contextmanager
    def watch(self, project: ProjectId, on_gone: Callable[[str], None]) -> Iterator[None]:
        """For the length of the block: when the project goes, `on_gone` is called with the reason,
        once; it never waits."""
        watched = self._watched.get(project)
        if watched is None:
            # It may have gone since it was found.
            watched = self._watched[project] = _Watched()
            self.wake()
        watched.on_gone.append(on_gone)
        try:
            yield
        finally:
            if on_gone in watched.on_gone:
                watched.on_gone.remove(on_gone)
            if not watched.on_gone and self._watched.get(project) is watched:
                del self._watched[project]

    async def run_once(self) -> None:
        """Look once at all that is watched, and tell of those that are gone."""
        asked = dict(self._watched)
        if not asked:
            return
        self._looks += 1
        try:
            with trio.fail_after(LOOK_S):
                found = await self._store.list_all(
                    within=asked.keys(), after=None, limit=len(asked)
                )
        except (RdevError, trio.TooSlowError):
            self._failures += 1
            return
        uids = {project.id: project.uid for project in found}
        gone = [name for name, watched in asked.items() if _is_gone(watched, uids.get(name))]
        if not gone:
            return
        with trio.move_on_after(LAST_WORDS_S):
            await self._stop.wait()
        for name in gone:
            self._tell(name, asked[name])

    def _tell(self, project: ProjectId, watched: _Watched) -> None:
        self._gone += 1
        if self._watched.get(project) is watched:
            del self._watched[project]
        told, watched.on_gone = watched.on_gone, []
        for on_gone in told:
            on_gone(DELETED)

    def statistics(self) -> ProjectWatchStatistics:
        """What is and what was."""
        return ProjectWatchStatistics(
            watched=len(self._watched), looks=self._looks, failures=self._failures, gone=self._gone
        )


def _is_gone(watched: _Watched, uid: str | None) -> bool:
    """Whether what is there now is not what was watched. Takes down what is seen first."""
    if watched.uid is None:
        watched.uid = uid
    return uid is None or uid != watched.uid
