"""SUBSYSTEM ProjectKeeper: brings every project to what is asked of it.

What is asked is a row (`ProjectLife`), so whoever looks next goes on where another one stopped,
died or was refused; two at once do the same thing twice, which is allowed. A look is taken when
somebody asks for something, when a pod changes, and each `TICK_S` while anything is unsettled
(`IDLE_S` when nothing is): one query. In hand: `AT_ONCE` projects, each for as long as its place
may take.

| wanted | in order |
|---|---|
| running | make what is missing |
| stopped | what runs ends, where that was forced · its pod ends |
| deleted | what waits ends · what runs ends · its pod and its volume end · its row goes |

What does not end within `DRAIN_S` loses its pod: it is `lost`, never forgotten. A project that
cannot be brought there keeps the reason, and is tried again with pauses up to a minute.
Also takes in what was found by its labels: a pod that is there gives its project a row.
"""

import logging
import random
from collections.abc import Callable, Sequence

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.projects import Project, Wanted
from rdev.ports.project_life import ProjectLife, ProjectPlaces
from rdev.services.shield import commit_shield

TICK_S = 2.0
IDLE_S = 10.0
AT_ONCE = 8
LOOK_MAX = 200
# How long commands that were asked to end are waited for: TERM, grace, KILL and its report.
DRAIN_S = 60.0
QUEUED_MAX = 500  # ended in one statement
_FIRST_S, _MOST_S = 1.0, 20.0
_ASKED_MOST_S = 60.0  # of what the cluster asks for

_log = logging.getLogger("rdev.projects")


class ProjectKeeper:
    """One loop; what it does for a project is idempotent, also from outside (`bring`)."""

    name = "project_keeper"

    def __init__(
        self,
        *,
        life: ProjectLife,
        places: ProjectPlaces,
        executor: str,
        reach: Callable[[], str],
        ended: Callable[[Sequence[CommandId]], None],
        ask_to_end: Callable[[CommandId], None],
        changed: Callable[[ProjectId], None],
    ) -> None:
        """`ended` says which commands ended here, `ask_to_end` reaches who runs one, `changed` says
        that a project is another, or gone; none of them waits. Opens nothing."""
        self._life = life
        self._places = places
        self._executor = executor
        self._reach = reach
        self._ended = ended
        self._ask_to_end = ask_to_end
        self._changed = changed
        self._work = trio.Event()
        self._is_stopping = False
        # Those that could not be brought there: the pauses, and when the next try is due.
        self._pauses: dict[ProjectId, tuple[Backoff, float]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Survives a database and a cluster that are gone."""
        task_status.started()
        pause = Backoff(random=random.random, first_s=0.2, most_s=10.0)
        while not self._is_stopping:
            self._work = trio.Event()
            try:
                left = await self.run_once()
                wait_s, pause.failures = TICK_S if left else IDLE_S, 0
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                wait_s = pause.next_s()
            with trio.move_on_after(wait_s):
                await self._work.wait()

    def stop(self) -> None:
        """End the loop; what it was at goes on elsewhere. Idempotent."""
        self._is_stopping = True
        self._work.set()

    def wake(self) -> None:
        """Something was asked for, or a pod changed. Never waits."""
        self._work.set()

    async def run_once(self) -> int:
        """Take in what was found, and bring what is unsettled a step further; how many are left.

        Errors: SERVICE_UNAVAILABLE, of the database.
        """
        if self._places.are_made:
            await self._adopt()
        projects = await self._life.unsettled(reach=self._reach(), limit=LOOK_MAX)
        names = {project.id for project in projects}
        self._pauses = {name: pause for name, pause in self._pauses.items() if name in names}
        due = [project for project in projects if self._is_due(project.id)]
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for project in due:
                nursery.start_soon(self._try, project, limiter)
        return len(projects)

    async def bring(self, project: Project) -> bool:
        """The next steps towards what is wanted of it; whether it is so now.

        Errors: those of `ProjectPlaces`; SERVICE_UNAVAILABLE. Cancellation: somebody goes on.
        """
        if project.wanted is Wanted.DELETED:
            return await self._delete(project)
        if project.wanted is Wanted.STOPPED and not await self._is_quiet(project):
            return False
        is_through = False
        try:
            if project.wanted is Wanted.RUNNING:
                await self._start(project)
            elif not await self._places.stop(project):
                return False
            is_settled = await self._life.settle(project)
            is_through = True
        finally:
            if not is_through:
                await self._doubt(project)  # noqa: ASYNC102  # shielded there, and bounded
        self._changed(project.id)
        return is_settled

    async def _doubt(self, project: Project) -> None:
        """Tell that we acted, where `settle` does not: another server may have looked before, and
        brought what is wanted since then. What we met, if anything, is told by whoever called."""
        try:
            with commit_shield():
                await self._life.doubt(project)
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            facts = {"project": project.id, "wanted": project.wanted, "error": error.message}
            _log.warning("project may be changed by a step that is not known", extra=facts)

    async def _start(self, project: Project) -> None:
        """Make its place. Tries of that may outlast the project, which another server deletes
        meanwhile: then nobody else knows of what was made."""
        failure: RdevError | None = None
        try:
            await self._places.start(project)
        except RdevError as error:
            failure = error
        if self._places.are_made and not await self._life.is_stored(project):
            await self._places.delete(project)
        if failure is not None:
            raise failure

    async def _delete(self, project: Project) -> bool:
        while ended := await self._life.end_queued(project.id, limit=QUEUED_MAX):
            self._ended(ended)
        if not await self._is_quiet(project) or not await self._places.delete(project):
            return False
        is_gone = await self._life.remove(project)
        self._changed(project.id)
        if is_gone and self._places.are_made:
            # A start may have made it between our look and the row's end; a later one sees that.
            await self._places.delete(project)
        return is_gone

    async def _is_quiet(self, project: Project) -> bool:
        """Whether nothing runs in it, or was given long enough."""
        running = await self._life.ask_running_to_end(project.id)
        for command in running:
            self._ask_to_end(command)
        return not running or project.wanted_s > DRAIN_S

    async def _try(self, project: Project, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            try:
                await self.bring(project)
                self._pauses.pop(project.id, None)
            except RdevError as error:
                pause, _ = self._pauses.get(project.id) or (_backoff(), 0.0)
                wait_s = max(pause.next_s(), min(error.retry_after_s or 0.0, _ASKED_MOST_S))
                self._pauses[project.id] = pause, trio.current_time() + wait_s
                facts = {"project": project.id, "wanted": project.wanted, "error": error.message}
                _log.warning("project is not what is asked of it", extra=facts)
                await self._note(project, error)

    async def _note(self, project: Project, trouble: RdevError) -> None:
        try:
            await self._life.note(project, trouble.message)
        except RdevError as error:
            # Most often what the trouble was: the database is away. The log has it.
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise

    def _is_due(self, project: ProjectId) -> bool:
        found = self._pauses.get(project)
        return found is None or found[1] <= trio.current_time()

    async def take_in(self, project: ProjectId) -> bool:
        """Give a row to a project that is there already, by a pod that nobody made through rdev;
        whether it is. Errors: SERVICE_UNAVAILABLE."""
        if not await self._life.missing([project]):
            return False
        image = await self._places.find(project)
        if image is None:
            return False
        is_new = await self._life.adopt(
            project, executor=self._executor, reach=self._reach(), image=image
        )
        if is_new:
            _log.info("project found", extra={"project": project})
            self._changed(project)
        return is_new

    async def _adopt(self) -> None:
        """Take in every project that was found by its pod and has no row."""
        found = self._places.found()
        for project in await self._life.missing(found) if found else ():
            try:
                await self.take_in(project)
            except RdevError as error:
                _log.info("pod passed by", extra={"project": project, "error": error.message})


def _backoff() -> Backoff:
    return Backoff(random=random.random, first_s=_FIRST_S, most_s=_MOST_S)
