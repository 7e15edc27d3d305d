"""Projects in memory."""

from collections.abc import Collection
from dataclasses import replace

from rdev.domain.audit import Actor
from rdev.domain.commands import LANE_CAP, LaneClass
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus
from tests.fakes.store import LaneRow, StoreState, is_queued, is_running


class FakeProjects:
    """`ProjectStore`."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    async def insert(
        self, definition: ProjectDefinition, actor: Actor, *, executor: str, reach: str
    ) -> tuple[Project, bool]:
        await self._state.step()
        found = self._state.projects.get(definition.id)
        if found is None:
            project = Project(
                id=definition.id,
                name=definition.id,
                status=ProjectStatus.READY,
                executor=executor,
                reach=reach,
                image=definition.image,
                created_at=self._state.now,
                definition=definition,
            )
            self._state.projects[definition.id] = project
            for lane_class in LaneClass:
                lane = Lane(project=project.id, lane_class=lane_class)
                self._state.lanes[lane] = LaneRow(reach=reach, cap=LANE_CAP[lane_class])
            self._state.reply()
            return project, True
        if found.definition != definition:
            message = f"project {definition.id!r} exists with another definition"
            raise RdevError(ErrorCode.CONFLICT, message)
        return self._counted(found), False

    async def get(self, project: ProjectId) -> Project | None:
        await self._state.step()
        found = self._state.projects.get(project)
        return None if found is None else self._counted(found)

    async def list_all(
        self, *, within: Collection[ProjectId] | None, after: ProjectId | None, limit: int
    ) -> list[Project]:
        await self._state.step()
        seen = self._state.projects.keys() & set(self._state.projects if within is None else within)
        ids = sorted(id_ for id_ in seen if after is None or id_ > after)
        return [self._counted(self._state.projects[id_]) for id_ in ids[:limit]]

    def _counted(self, project: Project) -> Project:
        rows = [r for r in self._state.rows.values() if r.command.project == project.id]
        is_failed = self._state.is_failed(project.id)
        return replace(
            project,
            status=ProjectStatus.FAILED if is_failed else project.status,
            queued=sum(map(is_queued, rows)),
            running=sum(map(is_running, rows)),
        )
