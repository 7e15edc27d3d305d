"""Projects whose place is a folder: it stands, whatever is asked of the project.

Stopped, its commands wait; deleted, its folder stays as it is, and whoever makes the project again
finds it. rdev never deletes a working tree of this machine.
"""

from collections.abc import Collection

import trio

from rdev.domain.ids import ProjectId
from rdev.domain.projects import PlaceSeen, Project
from rdev.ports.execution import Executor


class StandingPlaces:
    """The `ProjectPlaces` port over an executor that makes its folders."""

    are_made = False

    def __init__(self, executor: Executor) -> None:
        """Opens nothing."""
        self._executor = executor

    def seen(self, project: ProjectId) -> PlaceSeen | None:
        """See `ProjectPlaces.seen`: there is nothing to hear."""
        return None

    def found(self) -> Collection[ProjectId]:
        """See `ProjectPlaces.found`: a folder says nothing by itself."""
        return ()

    async def find(self, project: ProjectId, *, patience_s: float) -> str | None:
        """See `ProjectPlaces.find`."""
        await trio.lowlevel.checkpoint()
        return None

    async def start(self, project: Project, *, patience_s: float) -> None:
        """See `ProjectPlaces.start`."""
        await self._executor.prepare(project.id)

    async def stop(self, project: Project, *, patience_s: float) -> bool:
        """See `ProjectPlaces.stop`."""
        await trio.lowlevel.checkpoint()
        return True

    async def delete(self, project: Project, *, patience_s: float) -> bool:
        """See `ProjectPlaces.delete`."""
        await trio.lowlevel.checkpoint()
        return True
