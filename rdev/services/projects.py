"""Making and reading projects.

Whether a project is there, and what it is, is remembered for a moment (`cached.py`); its counts of
commands never are.
"""

from collections.abc import Callable, Collection, Sequence

from rdev.domain.audit import Actor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.projects import Project, ProjectDefinition
from rdev.ports.execution import Executor
from rdev.ports.projects import ProjectMade, ProjectStore
from rdev.services.cached import Cached, CachedStatistics
from rdev.services.shield import commit_shield


class Projects:
    """The use cases of projects."""

    def __init__(
        self,
        *,
        store: ProjectStore,
        executor: Executor,
        executor_name: str,
        tell_replicas: Callable[[ProjectId], None],
    ) -> None:
        """`tell_replicas` says to the other servers that a project was changed; it never waits."""
        self._store = store
        self._executor = executor
        self._executor_name = executor_name
        self._tell_replicas = tell_replicas
        self._cached: Cached[ProjectId, Project] = Cached(store.get, tag=lambda project, _: project)

    async def create(
        self,
        definition: ProjectDefinition,
        actor: Actor,
        *,
        idempotency: Idempotency | None = None,
    ) -> ProjectMade:
        """Make the project's place, then its row; a repeat of an earlier request makes neither.

        The place first: a project that is known can be used. Errors: CONFLICT when it exists with
        another definition; those of `ProjectStore.insert`; SERVICE_UNAVAILABLE.
        """
        earlier = None if idempotency is None else await self._store.replay(idempotency)
        if earlier is not None:
            return earlier
        await self._executor.prepare(definition.id)
        with commit_shield():
            try:
                return await self._store.insert(
                    definition,
                    actor,
                    executor=self._executor_name,
                    reach=self._executor.reach,
                    idempotency=idempotency,
                )
            finally:
                # Also where it failed: the reply alone may be lost.
                self._cached.invalidate([definition.id])
                self._tell_replicas(definition.id)

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


def _unknown(project: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no project {project!r}")
