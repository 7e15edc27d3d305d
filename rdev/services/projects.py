"""Making and reading projects."""

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.projects import Project, ProjectDefinition
from rdev.ports.execution import Executor
from rdev.ports.projects import ProjectStore


class Projects:
    """The use cases of projects."""

    def __init__(self, *, store: ProjectStore, executor: Executor, executor_name: str) -> None:
        self._store = store
        self._executor = executor
        self._executor_name = executor_name

    async def create(self, definition: ProjectDefinition) -> tuple[Project, bool]:
        """Make the project's place, then its row; the flag says whether it is new.

        The place first: a project that is known can be used. Errors: CONFLICT when it exists with
        another definition, SERVICE_UNAVAILABLE.
        """
        await self._executor.prepare(definition.id)
        return await self._store.insert(
            definition, executor=self._executor_name, reach=self._executor.reach
        )

    async def get(self, project: str) -> Project:
        """The project as it is now. Errors: NOT_FOUND."""
        found = await self._store.get(ProjectId(project)) if is_project_id(project) else None
        if found is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no project {project!r}")
        return found

    async def list_all(self, *, after: ProjectId | None, limit: int) -> list[Project]:
        """Projects in order of id."""
        return await self._store.list_all(after=after, limit=limit)
