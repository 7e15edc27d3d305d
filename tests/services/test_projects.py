"""What a server remembers of projects: two servers on one store in memory."""

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import ProjectDefinition
from rdev.services.cached import TTL_S
from rdev.services.projects import Projects
from tests.fakes.lives import standing_lives
from tests.fakes.projects import FakeProjects
from tests.fakes.store import ACTOR, StoreState
from tests.services.scripted import Server


@pytest.fixture
def pair(server: Server) -> tuple[Projects, Projects]:
    """What the first one makes is told to the second."""
    state = StoreState()

    def told(project: ProjectId) -> None:
        two.heed([project])

    one, two = (
        Projects(
            store=FakeProjects(state),
            executor=server.place,
            executor_name="fake",
            lives=standing_lives(server.place),
            tell_replicas=tell,
        )
        for tell in (told, lambda _: None)
    )
    return one, two


async def is_known(projects: Projects, name: str = "fresh") -> bool:
    try:
        await projects.check_known(name)
    except RdevError as error:
        if error.code is not ErrorCode.NOT_FOUND:
            raise
        return False
    return True


FRESH = ProjectDefinition(id=ProjectId("fresh"))


async def test_a_project_is_known_at_once_here_and_where_it_is_heard(
    pair: tuple[Projects, Projects],
) -> None:
    assert [await is_known(each) for each in pair] == [False, False]
    await pair[0].create(FRESH, ACTOR)
    assert [await is_known(each) for each in pair] == [True, True]


async def test_a_server_that_did_not_hear_knows_it_after_the_ttl(
    pair: tuple[Projects, Projects],
) -> None:
    one, two = pair
    assert not await is_known(one)
    await two.create(FRESH, ACTOR)
    assert [await is_known(each) for each in pair] == [False, True]
    await trio.sleep(TTL_S)
    assert await is_known(one)


async def test_a_server_that_hears_again_looks_again(pair: tuple[Projects, Projects]) -> None:
    one, two = pair
    assert not await is_known(one)
    await two.create(FRESH, ACTOR)
    one.flush()
    assert await is_known(one)


async def test_what_is_no_project_id_asks_nobody(pair: tuple[Projects, Projects]) -> None:
    assert not await is_known(pair[0], "Not/An/Id")
    assert pair[0].statistics().loads == 0


async def test_the_counts_of_a_project_are_never_remembered(
    pair: tuple[Projects, Projects],
) -> None:
    one, _ = pair
    await one.create(FRESH, ACTOR)
    await is_known(one)
    loads = one.statistics().loads
    await one.get("fresh")
    assert one.statistics().loads == loads
