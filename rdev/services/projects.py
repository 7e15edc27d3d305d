"""Making, reading, starting, stopping and deleting projects.

A change is stored first, and then brought about by the keeper, here or wherever somebody looks
next.

Whether a project is there, and what it is, is remembered for a moment (`cached.py`); its counts of
commands never are.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import trio

from rdev.domain.audit import Actor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.projects import (
    PlaceSeen,
    Project,
    ProjectDefinition,
    ProjectStatus,
    Standing,
    Wanted,
    standing,
)
from rdev.ports.execution import Executor
from rdev.ports.project_life import Asked, ProjectLife, ProjectPlaces
from rdev.ports.projects import ProjectMade, ProjectStore
from rdev.services.cached import Cached, CachedStatistics
from rdev.services.project_keeper import ProjectKeeper
from rdev.services.project_steps import ProjectSteps
from rdev.services.shield import commit_shield

# When a repeat of a request that found the cluster away is worth it.
RETRY_AFTER_S = 5.0
# For how long a request that makes a project goes on while the cluster cannot make it.
PATIENCE_S = 8.0
# How long after the API server a watch is at most, when all is well.
HEARD_S = 2.0
# What can never become a pod, or stands in its way: the request is taken back.
_REFUSED = (ErrorCode.BAD_REQUEST, ErrorCode.CONFLICT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectView:
    """A project as clients see it now: what is stored, what follows from it, what was seen."""

    project: Project
    standing: Standing
    seen: PlaceSeen | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """What projects are brought to what is asked of them by."""

    life: ProjectLife
    places: ProjectPlaces
    steps: ProjectSteps
    keeper: ProjectKeeper


class Projects:
    """The use cases of projects."""

    def __init__(
        self,
        *,
        store: ProjectStore,
        executor: Executor,
        executor_name: str,
        lives: Lives,
        tell_replicas: Callable[[ProjectId], None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`tell_replicas` says to the other servers that a project was changed; it never waits."""
        self._store = store
        self._executor = executor
        self._executor_name = executor_name
        self._life = lives.life
        self._places = lives.places
        self._steps = lives.steps
        self._keeper = lives.keeper
        self._tell_replicas = tell_replicas
        self._patience_s = patience_s
        self._cached: Cached[ProjectId, Project] = Cached(store.get, tag=lambda project, _: project)

    async def create(
        self,
        definition: ProjectDefinition,
        actor: Actor,
        *,
        idempotency: Idempotency | None = None,
    ) -> ProjectMade:
        """Make the project; a repeat of an earlier request makes nothing that is there.

        A folder first and then its row: a project that is known can be used. A row first and then
        its pod: whatever is made in the cluster is known here. Errors: CONFLICT when it exists with
        another definition, or something in the cluster has its name; those of
        `ProjectStore.insert`; BAD_REQUEST where the cluster refuses the pod, and nothing stays;
        SERVICE_UNAVAILABLE where it is away: the project is stored then, and is made later.
        """
        earlier = None if idempotency is None else await self._store.replay(idempotency)
        if earlier is None:
            if not self._places.are_made:
                await self._executor.prepare(definition.id)
            elif await self._steps.take_in(definition.id, patience_s=self._patience_s):
                await self._hear(definition.id)
            made = await self._insert(definition, actor, idempotency)
        else:
            made = earlier
        if self._places.are_made and not made.project.is_settled:
            await self._make(made, idempotency)
        elif self._places.are_made and self._is_ready(made.project):
            # It was there: whoever asks for it is told where it is not fit to run anything.
            await self._executor.prepare(definition.id)
        return made

    async def _insert(
        self, definition: ProjectDefinition, actor: Actor, idempotency: Idempotency | None
    ) -> ProjectMade:
        with commit_shield():
            try:
                return await self._store.insert(
                    definition,
                    actor,
                    executor=self._executor_name,
                    reach=self._executor.reach,
                    is_settled=not self._places.are_made,
                    idempotency=idempotency,
                )
            finally:
                # Also where it failed: the reply alone may be lost.
                self._told(definition.id)

    async def _make(self, made: ProjectMade, idempotency: Idempotency | None) -> None:
        """Make its pod now. What is refused for good leaves nothing behind."""
        project = made.project
        if project.wanted is not Wanted.RUNNING:
            return
        try:
            await self._keeper.bring(project, patience_s=self._patience_s)
            return
        except RdevError as error:
            refusal = error
        if refusal.code not in _REFUSED:
            message = f"project {project.id!r} is stored, and made when it can be"
            retry_after_s = refusal.retry_after_s or RETRY_AFTER_S
            raise RdevError(
                refusal.code, f"{message}: {refusal.message}", retry_after_s=retry_after_s
            ) from refusal
        if made.is_new:
            with commit_shield():
                await self._life.withdraw(project, idempotency)
                self._told(project.id)
        raise refusal

    async def start(self, project: str, actor: Actor) -> Project:
        """Let it run: its pod is made where it has none. Errors: as `_want`."""
        return await self._want(project, Wanted.RUNNING, actor, force=False)

    async def stop(self, project: str, actor: Actor, *, force: bool) -> Project:
        """Let nothing run: its pod ends, its volume stays, commands wait. Errors: as `_want`."""
        return await self._want(project, Wanted.STOPPED, actor, force=force)

    async def delete(self, project: str, actor: Actor, *, force: bool) -> Project:
        """Let it be gone: its pod, its volume, what waits in it. Errors: as `_want`."""
        return await self._want(project, Wanted.DELETED, actor, force=force)

    async def _want(self, project: str, wanted: Wanted, actor: Actor, *, force: bool) -> Project:
        """Store what is asked, as it is answered; the keeper does it.

        Errors: NOT_FOUND; CONFLICT while commands run in it, unless `force` (they are cancelled),
        while it is being deleted, and where its pod is not rdev's to start or stop.
        """
        known = await self.get(project)
        self._check_within_reach(known)
        runs = ProjectStatus.PENDING if self._places.are_made else ProjectStatus.READY
        status = runs if wanted is Wanted.RUNNING else ProjectStatus.STOPPED
        with commit_shield():
            try:
                asked = await self._life.want(known.id, wanted, actor, force=force, status=status)
            finally:
                self._told(known.id)
        _check_asked(asked, known.id)
        return await self._store.get(known.id) or known

    def _check_within_reach(self, project: Project) -> None:
        if not self._is_within_reach(project):
            message = f"project {project.id!r} belongs to other servers: {project.reach}"
            raise RdevError(ErrorCode.CONFLICT, message)

    def _is_within_reach(self, project: Project) -> bool:
        try:
            return project.reach == self._executor.reach
        except RdevError:  # it is not known yet where we are
            return False

    def _told(self, project: ProjectId) -> None:
        self._cached.invalidate([project])
        self._tell_replicas(project)
        self._keeper.wake()

    async def _hear(self, project: ProjectId) -> None:
        """Wait for the watch to hear of a pod that was found by asking."""
        with trio.move_on_after(HEARD_S):
            while (seen := self._places.seen(project)) is not None and seen.status is None:  # noqa: ASYNC110  # a watch wakes nobody
                await trio.sleep(HEARD_S / 50)

    def _is_ready(self, project: Project) -> bool:
        return self.view(project).standing.status is ProjectStatus.READY

    def view(self, project: Project) -> ProjectView:
        """What clients see of it. Never waits."""
        if self._is_within_reach(project):
            seen = self._places.seen(project.id)
        elif project.executor == "kubernetes":
            seen = PlaceSeen(is_current=False)  # of another cluster nothing is heard here
        else:
            seen = None
        return ProjectView(project=project, standing=standing(project, seen), seen=seen)

    async def get(self, project: str) -> Project:
        """The project as it is now. Errors: NOT_FOUND."""
        found = await self._store.get(ProjectId(project)) if is_project_id(project) else None
        if found is None:
            raise _unknown(project)
        return found

    async def check_known(self, project: str) -> None:
        """Errors: NOT_FOUND for a project that is not there, or was not a moment ago."""
        found = await self._cached.get(ProjectId(project)) if is_project_id(project) else None
        if found is None:
            raise _unknown(project)

    async def env_of(self, project: ProjectId) -> Mapping[str, str]:
        """What every command in it has in its environment, or had a moment ago; empty for a project
        that is not there."""
        found = await self._cached.get(project)
        return {} if found is None else found.definition.env

    async def list_all(
        self, *, within: Collection[ProjectId] | None, after: ProjectId | None, limit: int
    ) -> list[Project]:
        """Projects in order of id; with `within` only these."""
        return await self._store.list_all(within=within, after=after, limit=limit)

    def heed(self, projects: Sequence[str]) -> None:
        """Another server changed these projects. Never waits."""
        self._cached.invalidate(projects)

    def flush(self) -> None:
        """Projects may have been changed unheard."""
        self._cached.flush()

    def statistics(self) -> CachedStatistics:
        """What is remembered."""
        return self._cached.statistics()


def _check_asked(asked: Asked, project: ProjectId) -> None:
    match asked:
        case Asked.CHANGED | Asked.UNCHANGED:
            return
        case Asked.UNKNOWN:
            raise _unknown(project)
        case Asked.DELETING:
            why = "is being deleted"
        case Asked.BUSY:
            why = "has running commands; with ?force=true they are cancelled first"
        case Asked.ADOPTED:
            why = "was found by its pod, which is not rdev's to start or stop"
    raise RdevError(ErrorCode.CONFLICT, f"project {project!r} {why}")


def _unknown(project: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no project {project!r}")
