"""What the services need from the store of projects."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from rdev.domain.audit import Actor
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project, ProjectDefinition


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectMade:
    """What the store made of a request for a project: made now (`is_new`), there already, or made
    by an earlier request with the same idempotency key (`is_replay`); always as it is now."""

    project: Project
    is_new: bool
    is_replay: bool = False


class ProjectStore(Protocol):
    """Projects by id."""

    async def insert(
        self,
        definition: ProjectDefinition,
        actor: Actor,
        *,
        executor: str,
        reach: str,
        is_settled: bool = True,
        idempotency: Idempotency | None = None,
    ) -> ProjectMade:
        """Store a project with its audit entry and its idempotency key, where it has one, in one
        transaction. An existing one with the same definition is returned as it is, and no key is
        kept. `is_settled` false: its place is still to be made, and nothing runs in it.

        Errors: CONFLICT when it exists with another one, or, with a delay, when another request
        with this idempotency key took longer than 2 s; those of `replay`.
        """
        ...

    async def replay(self, idempotency: Idempotency) -> ProjectMade | None:
        """What an earlier request with this key made, or None. Keys are forgotten after
        `IDEMPOTENCY_S`.

        Errors: IDEMPOTENCY_MISMATCH when it stands for another request; GONE when the project it
        made is no longer stored.
        """
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
