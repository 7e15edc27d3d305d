"""Projects in memory."""

from collections.abc import Collection
from dataclasses import replace

from rdev.domain.audit import Actor
from rdev.domain.commands import LANE_CAP, LaneClass
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus
from rdev.ports.projects import ProjectMade
from tests.fakes.store import LaneRow, StoreState, is_queued, is_running


class FakeProjects:
    """`ProjectStore`."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

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
        await self._state.step()
        if idempotency is not None and (earlier := self._earlier(idempotency)) is not None:
            return earlier
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
            if idempotency is not None:
                self._state.keys.keep(idempotency, definition.id)
            self._state.reply()
            return ProjectMade(project=project, is_new=True)
        if found.definition != definition:
            message = f"project {definition.id!r} exists with another definition"
            raise RdevError(ErrorCode.CONFLICT, message)
        return ProjectMade(project=self._counted(found), is_new=False)

    async def replay(self, idempotency: Idempotency) -> ProjectMade | None:
        await self._state.step()
        return self._earlier(idempotency)

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

    def _earlier(self, idempotency: Idempotency) -> ProjectMade | None:
        made = self._state.keys.find(idempotency)
        if made is None:
            return None
        found = self._state.projects.get(ProjectId(made))
        if found is None:
            raise RdevError(ErrorCode.GONE, f"project {made!r} is no longer stored")
        return ProjectMade(project=self._counted(found), is_new=False, is_replay=True)

    def _counted(self, project: Project) -> Project:
        rows = [r for r in self._state.rows.values() if r.command.project == project.id]
        is_failed = self._state.is_failed(project.id)
        return replace(
            project,
            status=ProjectStatus.FAILED if is_failed else project.status,
            queued=sum(map(is_queued, rows)),
            running=sum(map(is_running, rows)),
        )
