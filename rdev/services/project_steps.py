"""What is done for a project, in order, to bring it to what is asked of it.

Each step may be repeated, by anybody, at any time: who died, was refused or came too late in the
middle of one leaves nothing that the next one does not finish. When they are taken is the keeper's.

| wanted | in order |
|---|---|
| running | make what is missing |
| stopped | what runs ends, where that was forced · its pod ends |
| deleted | what waits ends · what runs ends · its pod and its volume end · its row goes |

What does not end within `DRAIN_S` loses its pod: it is `lost`, never forgotten.
"""

import logging
from collections.abc import Callable, Sequence

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.projects import Project, Wanted
from rdev.ports.project_life import ProjectLife, ProjectPlaces
from rdev.services.shield import commit_shield

# How long commands that were asked to end are waited for: TERM, grace, KILL and its report.
DRAIN_S = 60.0
QUEUED_MAX = 500  # ended in one statement
# What was made for a project that is gone is asked to go for so long: nobody comes back to it.
CLEAR_S = 8.0

_log = logging.getLogger("rdev.projects")


class ProjectSteps:
    """Holds nothing of any project."""

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

    async def bring(self, project: Project, *, patience_s: float) -> bool:
        """The next steps towards what is wanted of it; whether it is so now. Its place is asked for
        `patience_s` (see `ProjectPlaces`).

        Errors: those of `ProjectPlaces`; SERVICE_UNAVAILABLE. Cancellation: somebody goes on.
        """
        if project.wanted is Wanted.DELETED:
            return await self._delete(project, patience_s)
        if project.wanted is Wanted.STOPPED and not await self._is_quiet(project):
            return False
        is_through = False
        try:
            if project.wanted is Wanted.RUNNING:
                await self._start(project, patience_s)
            elif not await self._places.stop(project, patience_s=patience_s):
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

    async def _start(self, project: Project, patience_s: float) -> None:
        """Make its place. Tries of that may outlast the project, which another server deletes
        meanwhile: then nobody else knows of what was made."""
        failure: RdevError | None = None
        try:
            await self._places.start(project, patience_s=patience_s)
        except RdevError as error:
            failure = error
        if self._places.are_made and not await self._life.is_stored(project):
            await self._places.delete(project, patience_s=CLEAR_S)
        if failure is not None:
            raise failure

    async def _delete(self, project: Project, patience_s: float) -> bool:
        while ended := await self._life.end_queued(project.id, limit=QUEUED_MAX):
            self._ended(ended)
        if not await self._is_quiet(project):
            return False
        if not await self._places.delete(project, patience_s=patience_s):
            return False
        is_gone = await self._life.remove(project)
        self._changed(project.id)
        if is_gone and self._places.are_made:
            # A start may have made it between our look and the row's end; a later one sees that.
            await self._places.delete(project, patience_s=CLEAR_S)
        return is_gone

    async def _is_quiet(self, project: Project) -> bool:
        """Whether nothing runs in it, or was given long enough."""
        running = await self._life.ask_running_to_end(project.id)
        for command in running:
            self._ask_to_end(command)
        return not running or project.wanted_s > DRAIN_S

    async def take_in(self, project: ProjectId, *, patience_s: float) -> bool:
        """Give a row to a project that is there already, by a pod that nobody made through rdev;
        whether it is. Errors: SERVICE_UNAVAILABLE."""
        if not await self._life.missing([project]):
            return False
        image = await self._places.find(project, patience_s=patience_s)
        if image is None:
            return False
        is_new = await self._life.adopt(
            project, executor=self._executor, reach=self._reach(), image=image
        )
        if is_new:
            _log.info("project found", extra={"project": project})
            self._changed(project)
        return is_new
