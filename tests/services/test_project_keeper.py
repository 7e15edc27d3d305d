"""The keeper's loop: a database that goes in the middle of a look ends nothing."""

from datetime import UTC, datetime
from typing import cast

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus
from rdev.ports.project_life import ProjectLife
from rdev.services.project_keeper import ProjectKeeper
from rdev.services.standing_places import StandingPlaces
from tests.fakes.executor import FakeExecutor


class GoneInTheMiddle:
    """Of `ProjectLife` what a start asks: it finds work, and cannot store what came of it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.looks = 0

    async def unsettled(self, *, reach: str, limit: int) -> list[Project]:
        await trio.lowlevel.checkpoint()
        self.looks += 1
        return [self.project]

    async def settle(self, project: Project) -> bool:
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database is away")

    async def doubt(self, project: Project) -> None:
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database is away")

    async def is_stored(self, project: Project) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def note(self, project: Project, trouble: str) -> None:
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database is away")


async def test_a_database_that_goes_between_a_step_and_its_note_does_not_end_the_loop(
    nursery: trio.Nursery,
) -> None:
    """Both failed, in a group that nobody caught, and the whole server ended."""
    project = Project(
        id=ProjectId("demo"),
        name="demo",
        status=ProjectStatus.READY,
        executor="fake",
        reach="here",
        image=None,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        definition=ProjectDefinition(id=ProjectId("demo")),
        is_settled=False,
    )
    life = GoneInTheMiddle(project)
    executor = FakeExecutor(nursery, {})
    keeper = ProjectKeeper(
        life=cast("ProjectLife", life),
        places=StandingPlaces(executor),
        executor="fake",
        reach=lambda: executor.reach,
        ended=lambda _: None,
        ask_to_end=lambda _: None,
        changed=lambda _: None,
    )
    await nursery.start(keeper.run)
    with trio.fail_after(30):
        while life.looks < 2:
            keeper.wake()
            await trio.sleep(0.01)
    keeper.stop()
