"""What is asked of projects, in memory: as much of it as the keeper needs where nothing runs."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import trio

from rdev.domain.audit import Actor
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus, Wanted
from rdev.ports.project_life import Asked, Tried

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class FakeProjectLife:
    """Part of the port `ProjectLife`; each wish is asked a second after the one before."""

    reach: str = "here"
    rows: dict[ProjectId, Project] = field(default_factory=dict)
    wishes: int = 0

    async def want(
        self, project: ProjectId, wanted: Wanted, actor: Actor, *, force: bool, status: str
    ) -> Asked:
        """See `ProjectLife.want`; makes a project that is not there."""
        await trio.lowlevel.checkpoint()
        self.wishes += 1
        known = self.rows.get(project) or _new(project, self.reach)
        wanted_at = EPOCH + timedelta(seconds=self.wishes)
        self.rows[project] = replace(known, wanted=wanted, wanted_at=wanted_at, is_settled=False)
        return Asked.CHANGED

    async def missing(self, projects: Collection[ProjectId]) -> list[ProjectId]:
        """See `ProjectLife.missing`."""
        await trio.lowlevel.checkpoint()
        return sorted(set(projects) - self.rows.keys())

    async def unsettled(self, *, reach: str, tried: Collection[Tried], limit: int) -> list[Project]:
        """See `ProjectLife.unsettled`."""
        await trio.lowlevel.checkpoint()
        known = {one.project: one for one in tried}
        found: list[tuple[float, datetime, ProjectId]] = []
        for project in self.rows.values():
            one = known.get(project.id)
            is_new = one is None or one.wanted_at not in (None, project.wanted_at)
            wait_s = float("-inf") if one is None or is_new else one.wait_s
            if project.reach == reach and not project.is_settled and wait_s <= 0:
                found.append((wait_s, project.wanted_at or EPOCH, project.id))
        return [self.rows[name] for _, _, name in sorted(found)[:limit]]

    async def settle(self, project: Project) -> bool:
        """See `ProjectLife.settle`."""
        await trio.lowlevel.checkpoint()
        known = self.rows.get(project.id)
        if known is None:
            return False
        is_so = known.wanted_at == project.wanted_at
        self.rows[project.id] = replace(known, is_settled=is_so, trouble=None)
        return is_so

    async def doubt(self, project: Project) -> None:
        """See `ProjectLife.doubt`."""
        await trio.lowlevel.checkpoint()
        known = self.rows.get(project.id)
        if known is not None and known.wanted_at != project.wanted_at:
            self.rows[project.id] = replace(known, is_settled=False)

    async def is_stored(self, project: Project) -> bool:
        """See `ProjectLife.is_stored`."""
        await trio.lowlevel.checkpoint()
        return project.id in self.rows

    async def note(self, project: Project, trouble: str) -> None:
        """See `ProjectLife.note`."""
        await trio.lowlevel.checkpoint()
        known = self.rows.get(project.id)
        if known is not None and known.wanted_at == project.wanted_at:
            self.rows[project.id] = replace(known, trouble=trouble)

    async def end_queued(self, project: ProjectId, *, limit: int) -> list[CommandId]:
        """See `ProjectLife.end_queued`: nothing waits."""
        await trio.lowlevel.checkpoint()
        return []

    async def ask_running_to_end(self, project: ProjectId) -> list[CommandId]:
        """See `ProjectLife.ask_running_to_end`: nothing runs."""
        await trio.lowlevel.checkpoint()
        return []

    async def remove(self, project: Project) -> bool:
        """See `ProjectLife.remove`."""
        await trio.lowlevel.checkpoint()
        self.rows.pop(project.id, None)
        return True


def _new(project: ProjectId, reach: str) -> Project:
    return Project(
        id=project,
        name=project,
        status=ProjectStatus.READY,
        executor="fake",
        reach=reach,
        image=None,
        created_at=EPOCH,
        definition=ProjectDefinition(id=project),
    )
