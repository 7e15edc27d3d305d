"""Every sentence of `ports/projects.py` and `ports/upkeep.py`."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import trio

from rdev.adapters.postgres.upkeep import PostgresStoreDuties
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import IDEMPOTENCY_S, Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.projects import ProjectDefinition, ProjectStatus
from rdev.ports.projects import ProjectMade
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, REACH, Pools, World

DEFINITION = ProjectDefinition(id=PROJECT, image="debian", env={"A": "b"})


async def test_a_project_is_stored_and_found(world: World) -> None:
    made = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    project = made.project
    assert made.is_new
    assert (project.id, project.name, project.definition) == (PROJECT, PROJECT, DEFINITION)
    assert (project.executor, project.reach, project.image) == ("local", REACH, "debian")
    assert (project.status, project.queued, project.running) == (ProjectStatus.READY, 0, 0)
    assert await world.projects.get(PROJECT) == project


async def test_the_same_definition_again_gives_the_same_project(world: World) -> None:
    first = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    again = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    assert again == ProjectMade(project=first.project, is_new=False)


async def test_another_definition_of_the_same_id_is_a_conflict(world: World) -> None:
    first = await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    with pytest.raises(RdevError) as caught:
        await world.projects.insert(
            ProjectDefinition(id=PROJECT), ACTOR, executor="local", reach=REACH
        )
    assert caught.value.code is ErrorCode.CONFLICT
    assert await world.projects.get(PROJECT) == first.project


KEY = Idempotency(key_id="key_admin", key="once", digest=b"one request")


async def keyed(
    world: World, name: str = PROJECT, key: Idempotency = KEY, **more: str
) -> ProjectMade:
    definition = ProjectDefinition(id=ProjectId(name), **more)
    return await world.projects.insert(
        definition, ACTOR, executor="local", reach=REACH, idempotency=key
    )


async def test_a_repeat_with_its_key_tells_what_was_made(world: World) -> None:
    assert await world.projects.replay(KEY) is None
    made = await keyed(world)
    assert (made.is_new, made.is_replay) == (True, False)
    await world.queued()
    now = await world.projects.get(PROJECT)
    assert now is not None
    assert now.queued == 1
    told = ProjectMade(project=now, is_new=False, is_replay=True)
    assert await world.projects.replay(KEY) == told
    assert await keyed(world) == told


async def test_a_key_that_stands_for_another_request_is_a_mismatch(world: World) -> None:
    await keyed(world)
    other = replace(KEY, digest=b"another")
    for attempt in (keyed(world, "fresh", other), world.projects.replay(other)):
        with pytest.raises(RdevError) as caught:
            await attempt
        assert caught.value.code is ErrorCode.IDEMPOTENCY_MISMATCH
    assert await world.projects.get(ProjectId("fresh")) is None
    assert (await keyed(world, "fresh", replace(other, key_id="key_other"))).is_new


async def test_a_key_is_kept_only_with_the_project_it_made(world: World) -> None:
    """What was there already was not made by this request, nor what was refused."""
    await world.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)
    with pytest.raises(RdevError) as caught:
        await keyed(world, image="another")
    assert caught.value.code is ErrorCode.CONFLICT
    assert await world.projects.replay(KEY) is None
    again = await world.projects.insert(
        DEFINITION, ACTOR, executor="local", reach=REACH, idempotency=KEY
    )
    assert (again.is_new, again.is_replay) == (False, False)
    assert await world.projects.replay(KEY) is None
    assert (await keyed(world, "fresh")).is_new


async def test_a_key_of_a_project_is_forgotten_with_time(world: World) -> None:
    await keyed(world)
    await world.age(IDEMPOTENCY_S - 60)
    assert (await keyed(world)).is_replay
    await world.age(61)
    assert await world.projects.replay(KEY) is None
    assert not (await keyed(world)).is_replay


async def test_the_key_of_a_project_that_is_gone_is_gone(real: World, pools: Pools) -> None:
    await keyed(real)
    async with pools.requests.connection() as connection:
        await connection.execute("delete from lanes where project = %s", (PROJECT,))
        await connection.execute("delete from projects where id = %s", (PROJECT,))
    with pytest.raises(RdevError) as caught:
        await keyed(real)
    assert caught.value.code is ErrorCode.GONE


async def test_of_racing_requests_with_one_key_one_makes_the_project(real: World) -> None:
    made: list[ProjectMade] = []

    async def insert() -> None:
        made.append(await keyed(real))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(insert)
    assert sorted((one.is_new, one.is_replay) for one in made) == [(False, True)] * 9 + [
        (True, False)
    ]


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
            (await real.projects.insert(DEFINITION, ACTOR, executor="local", reach=REACH)).is_new
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
