"""What the services need from the store of projects."""

from collections.abc import Collection
from typing import Protocol

from rdev.domain.audit import Actor
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project, ProjectDefinition


class ProjectStore(Protocol):
    """Projects by id."""

    async def insert(
        self, definition: ProjectDefinition, actor: Actor, *, executor: str, reach: str
    ) -> tuple[Project, bool]:
        """Store a project with its audit entry; the flag says whether this call made it. An
        existing one with the same definition is returned as it is. Errors: CONFLICT when it exists
        with another one."""
        ...

    async def get(self, project: ProjectId) -> Project | None:
        """The project with its counts of commands, or None."""
        ...

    async def list_all(
        self, *, within: Collection[ProjectId] | None, after: ProjectId | None, limit: int
    ) -> list[Project]:
        """Projects in order of id, those after `after`, at most `limit`; with `within` only
        these."""
        ...
