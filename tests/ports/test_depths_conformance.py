"""Counting the queue, on the fake and on PostgreSQL."""

from rdev.domain.commands import Kind, Priority
from rdev.domain.depths import Depth, ProjectDepth
from rdev.domain.ids import ProjectId
from rdev.ports.commands import POSITION_MAX
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, Pools, World


async def test_an_empty_queue_has_no_depth(world: World) -> None:
    await world.project()
    depths = await world.depths.count()
    assert (depths.projects, depths.depth, depths.running) == ({}, Depth(), 0)


async def test_what_waits_is_counted_by_project_and_priority(world: World) -> None:
    await world.project("one")
    await world.project("two")
    for priority in (Priority.HIGH, Priority.LOW, Priority.LOW):
        await world.queued("one", priority=priority)
    await world.queued("two", kind=Kind.GIT)
    depths = await world.depths.count()
    counts = {
        project: {priority: depth.queued for priority, depth in found.waiting.items()}
        for project, found in depths.projects.items()
    }
    assert counts == {"one": {Priority.HIGH: 1, Priority.LOW: 2}, "two": {Priority.NORMAL: 1}}
    assert depths.depth.queued == 4
    assert depths.of_priority(Priority.LOW).queued == 2
    assert depths.of_priority(Priority.NORMAL).queued == 1


async def test_the_oldest_wait_is_that_of_the_first_accepted(world: World) -> None:
    await world.project()
    await world.queued(priority=Priority.LOW)
    await world.age(100)
    await world.queued(priority=Priority.HIGH)
    await world.age(20)
    await world.queued(priority=Priority.HIGH)
    depths = await world.depths.count()
    assert 120 <= depths.depth.oldest_wait_s < 180
    assert 120 <= depths.of_priority(Priority.LOW).oldest_wait_s < 180
    assert 20 <= depths.of_priority(Priority.HIGH).oldest_wait_s < 80


async def test_what_runs_is_counted_apart_and_what_ended_not_at_all(world: World) -> None:
    await world.running()
    ended = await world.queued()
    await world.queued()
    await world.commands.request_cancel(ended, ACTOR)
    depths = await world.depths.count()
    assert depths.running == 1
    found = depths.projects[PROJECT]
    assert (found.running, found.depth.queued) == (1, 1)


async def test_a_project_in_which_all_runs_is_told(world: World) -> None:
    await world.running()
    depths = await world.depths.count()
    assert depths.projects == {ProjectId(PROJECT): ProjectDepth(running=1)}


# Cost (only PostgreSQL can show it)

_HISTORY = """
insert into commands (id, project, kind, lane_class, status, level, reach, retry, key_id,
                      request_id, argv, rank, last_seq, finished_at)
select gen_random_uuid(), 'demo', 'shell', 'work', %(status)s, 1, 'local', 'never', 'k', 'r', '[]',
       extract(epoch from now()) - 100000 + g, 1,
       case when %(status)s = 'queued' then null else now() end
from generate_series(1, %(rows)s) g
"""


async def _fill(pools: Pools, status: str, rows: int) -> None:
    async with pools.requests.connection() as connection:
        await connection.execute(_HISTORY, {"status": status, "rows": rows})
        await connection.execute("analyze commands")


async def test_the_count_never_walks_over_history(real: World, pools: Pools) -> None:
    from rdev.adapters.postgres.depths import _COUNT

    await real.project()
    await _fill(pools, "succeeded", 20_000)
    await _fill(pools, "queued", 100)
    async with pools.requests.connection() as connection:
        cursor = await connection.execute("explain (costs off) " + _COUNT)
        plan = "\n".join([row[0] for row in await cursor.fetchall()])
    assert "commands_queued" in plan
    assert "Seq Scan" not in plan


async def test_a_position_counts_no_further_than_its_bound(real: World, pools: Pools) -> None:
    await real.project()
    await _fill(pools, "queued", 5_000)
    accepted = await real.commands.insert(real.new())
    assert accepted.queue_position == POSITION_MAX
    assert await real.commands.queue_position(accepted.command.id) == POSITION_MAX


async def test_an_insert_reads_no_more_of_its_lane_than_the_bound(
    real: World, pools: Pools
) -> None:
    from rdev.adapters.postgres.commands import _INSERT, _insert_parameters

    await real.project()
    await _fill(pools, "queued", 5_000)
    async with pools.requests.connection() as connection:
        cursor = await connection.execute(
            "explain (analyze, costs off, timing off, summary off) " + _INSERT,
            _insert_parameters(real.new()),
        )
        plan = [row[0] for row in await cursor.fetchall()]
    walked = [line for line in plan if "commands_queued" in line]
    assert walked, plan
    most = max(int(float(line.split("rows=")[1].split()[0])) for line in walked)
    assert most <= POSITION_MAX, plan
