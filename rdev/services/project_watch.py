"""SUBSYSTEM ProjectWatch: sees when a project is gone, and tells whoever follows its life.

Woken when a project was changed, here or elsewhere, and every `TICK_S`, it asks for all watched
projects in one statement (none where nothing is watched). So its end is told within `TICK_S` +
`LOOK_S` + `LAST_WORDS_S` (once more where it comes just behind another one's), also where every
notification is lost. A project of the same name that was made since is another one. Bounds:
watchers are bounded by the HTTP edge.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


# A project of the same name that is made later has another uid.
_Subject = tuple[ProjectId, str]


class ProjectWatch:
    """See the module."""

    name = "project_watch"

    def __init__(self, *, store: ProjectStore) -> None:
        """Nothing is watched yet."""
        self._store = store
        # Whom to tell; of one watcher each, and a method may be given twice.
        self._watched: dict[_Subject, list[Callable[[str], None]]] = {}
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
    def watch(self, project: ProjectId, uid: str, on_gone: Callable[[str], None]) -> Iterator[None]:
        """For the length of the block: when the project that has this uid goes, `on_gone` is called
        with the reason, once; it never waits."""
        subject = project, uid
        told = self._watched.get(subject)
        if told is None:
            # It may have gone since it was found.
            told = self._watched[subject] = []
            self.wake()
        told.append(on_gone)
        try:
            yield
        finally:
            if on_gone in told:
                told.remove(on_gone)
            if not told and self._watched.get(subject) is told:
                del self._watched[subject]

    async def run_once(self) -> None:
        """Look once at all that is watched, and tell of those that are gone."""
        asked = list(self._watched)
        if not asked:
            return
        self._looks += 1
        names = {project for project, _ in asked}
        try:
            with trio.fail_after(LOOK_S):
                found = await self._store.list_all(within=names, after=None, limit=len(names))
        except (RdevError, trio.TooSlowError):
            self._failures += 1
            return
        there = {(project.id, project.uid) for project in found}
        gone = [subject for subject in asked if subject not in there]
        if not gone:
            return
        with trio.move_on_after(LAST_WORDS_S):
            await self._stop.wait()
        for subject in gone:
            self._tell(subject)

    def _tell(self, subject: _Subject) -> None:
        self._gone += 1
        for on_gone in self._watched.pop(subject, ()):
            on_gone(DELETED)

    def statistics(self) -> ProjectWatchStatistics:
        """What is and what was."""
        return ProjectWatchStatistics(
            watched=len(self._watched), looks=self._looks, failures=self._failures, gone=self._gone
        )
