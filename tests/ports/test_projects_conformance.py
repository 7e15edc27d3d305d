"""Every sentence of `ports/projects.py` and `ports/upkeep.py`."""

from datetime import UTC, datetime, timedelta

import pytest
import trio

from rdev.adapters.postgres.upkeep import PostgresStoreDuties
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import ProjectDefinition, ProjectStatus
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, REACH, Pools, World

DEFINITION = ProjectDefinition(id=PROJECT, image="debian", env={"A": "b"})


async def test_a_project_is_stored_and_found(world: World) -> None:
    project, is_new = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    assert is_new
    assert (project.id, project.name, project.definition) == (PROJECT, PROJECT, DEFINITION)
    assert (project.executor, project.reach, project.image) == ("local", REACH, "debian")
    assert (project.status, project.queued, project.running) == (ProjectStatus.READY, 0, 0)
    assert await world.projects.get(PROJECT) == project


async def test_the_same_definition_again_gives_the_same_project(world: World) -> None:
    first, _ = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    again, is_new = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    assert (again, is_new) == (first, False)


async def test_another_definition_of_the_same_id_is_a_conflict(world: World) -> None:
    first, _ = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    with pytest.raises(RdevError) as caught:
        await world.projects.insert(
            ProjectDefinition(id=PROJECT), ACTOR, executor="local", reach=REACH
        )
    assert caught.value.code is ErrorCode.CONFLICT
    assert await world.projects.get(PROJECT) == first


async def test_an_unknown_project_is_none(world: World) -> None:
    assert await world.projects.get(ProjectId("nowhere")) is None


async def test_a_project_counts_its_commands(world: World) -> None:
    await world.running()
    await world.project("other")
    await world.queued("other")
    await world.queued()
    cancelled = await world.queued()
    await world.commands.request_cancel(cancelled, ACTOR)
    found = await world.projects.get(PROJECT)
    assert found is not None
    assert (found.queued, found.running) == (1, 1)


async def test_projects_are_listed_by_id_in_pages(world: World) -> None:
    for name in ("c", "a", "d", "b"):
        await world.project(name)

    async def page(after: str | None, limit: int) -> list[str]:
        last = None if after is None else ProjectId(after)
        found = await world.projects.list_all(within=None, after=last, limit=limit)
        return [one.id for one in found]

    assert await page(None, 10) == ["a", "b", "c", "d"]
    assert await page(None, 2) == ["a", "b"]
    assert await page("b", 2) == ["c", "d"]
    assert await page("d", 2) == []


async def test_within_some_projects_only_these_are_listed(world: World) -> None:
    for name in ("c", "a", "d", "b"):
        await world.project(name)
    within = [ProjectId("d"), ProjectId("a"), ProjectId("nowhere")]
    found = await world.projects.list_all(within=within, after=None, limit=10)
    assert [one.id for one in found] == ["a", "d"]
    rest = await world.projects.list_all(within=within, after=ProjectId("a"), limit=10)
    assert [one.id for one in rest] == ["d"]
    assert await world.projects.list_all(within=[], after=None, limit=10) == []


async def test_of_racing_requests_for_one_project_one_makes_it(real: World) -> None:
    made: list[bool] = []

    async def insert() -> None:
        made.append(
            (await real.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH))[1]
        )

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(insert)
    assert sorted(made) == [False] * 9 + [True]


async def _partitions(pools: Pools) -> list[str]:
    query = "select inhrelid::regclass::text from pg_inherits where inhparent = 'output'::regclass"
    async with pools.requests.connection() as connection:
        rows = await (await connection.execute(query)).fetchall()
    return sorted(row[0] for row in rows)


def _names(days: int) -> set[str]:
    today = datetime.now(UTC).date()
    return {f"output_{today + timedelta(days=n):%Y%m%d}" for n in range(days + 1)}


async def _make_partitions(pools: Pools, days_ahead: int) -> None:
    async with pools.requests.connection() as connection:
        await PostgresStoreDuties(connection).ensure_partitions(days_ahead=days_ahead)


async def test_partitions_are_made_for_today_and_the_days_ahead(pools: Pools) -> None:
    await _make_partitions(pools, 5)
    made = await _partitions(pools)
    assert set(made) >= _names(5)
    await _make_partitions(pools, 5)
    assert await _partitions(pools) == made


async def test_partitions_may_be_made_by_many_servers_at_once(pools: Pools) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(_make_partitions, pools, 7)
    assert set(await _partitions(pools)) >= _names(7)
