"""Counting the queue of the stores in memory."""

import trio

from rdev.domain.commands import Priority, Status
from rdev.domain.depths import Depth, Depths, ProjectDepth
from rdev.domain.ids import ProjectId
from tests.fakes.store import EPOCH, StoreState


class FakeDepths:
    """`QueueDepths`."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    async def count(self) -> Depths:
        await self._state.step()
        waiting: dict[ProjectId, dict[Priority, Depth]] = {}
        running: dict[ProjectId, int] = {}
        for row in self._state.rows.values():
            command = row.command
            if command.status is Status.QUEUED:
                of_project = waiting.setdefault(command.project, {})
                wait_s = trio.current_time() - (command.created_at - EPOCH).total_seconds()
                one = Depth(queued=1, oldest_wait_s=wait_s)
                of_project[command.priority] = of_project.get(command.priority, Depth()) + one
            elif command.status is Status.RUNNING:
                waiting.setdefault(command.project, {})
                running[command.project] = running.get(command.project, 0) + 1
        return Depths(
            projects={
                project: ProjectDepth(waiting=found, running=running.get(project, 0))
                for project, found in waiting.items()
            }
        )
