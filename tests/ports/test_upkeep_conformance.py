"""Every sentence of `ports/upkeep.py`, on the fake and on PostgreSQL."""

from dataclasses import replace
from datetime import date

import psycopg
import pytest
import trio

from rdev.adapters.postgres.limiter import PostgresRateLimits
from rdev.domain.commands import Kind, LaneClass, Outcome, Status
from rdev.domain.execution import KillReport
from rdev.domain.idempotency import IDEMPOTENCY_S, Idempotency
from rdev.domain.ids import CommandId
from rdev.domain.lanes import Lane
from rdev.domain.limiter import Hit, Policy, RateLimit
from rdev.domain.projects import ProjectStatus
from rdev.ports.upkeep import Upkeep
from rdev.services.housekeeper import DAYS_AHEAD
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, REACH, Pools, World, append_to, last_chunk

DAY_S = 86_400

# Windows with one hit each, so many seconds old.
MAKE_OLD = """
insert into rate_windows (policy, subject, window_us, cells, hits, used)
select 'key', 's' || n, w,
       array[((extract(epoch from clock_timestamp()) - age) * 1000000)::bigint * 60 / w], '{1}', 1
from (select %s::bigint as w, %s::float8[] as ages) given,
     unnest(ages) with ordinality old (age, n)
"""


async def ended(world: World) -> CommandId:
    """A command that was started and has ended."""
    claimed = await world.running(kind=Kind.SHELL)
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    return claimed.lease.command


async def untidied(world: World, *, older_s: float = 0, limit: int = 10) -> list[CommandId]:
    async with world.upkeep.place_turn(REACH) as places:
        assert places is not None
        found = await places.untidied(older_s=older_s, limit=limit)
        if found:
            await places.mark_tidied(found[-1])
        return [one.command for one in found]


async def prunable(world: World, *, older_s: float = 0, reach: str = REACH) -> list[CommandId]:
    async with world.upkeep.place_turn(reach) as places:
        assert places is not None
        return [one.command for one in await places.prunable(older_s=older_s, limit=10)]


async def test_a_turn_is_one_servers_at_a_time(world: World) -> None:
    """The second server's upkeep is another one, on the same store."""
    other = world.other_upkeep()
    async with world.upkeep.store_turn() as first, other.store_turn() as second:
        assert first is not None
        assert second is None
    async with other.store_turn() as again:
        assert again is not None


async def test_turns_of_different_names_are_independent(world: World) -> None:
    async with world.upkeep.place_turn("here") as here:
        assert here is not None
        other: Upkeep = world.other_upkeep()
        async with other.place_turn("there") as there:
            assert there is not None
        async with other.place_turn("here") as second:
            assert second is None


async def test_a_turn_that_was_cancelled_is_over(world: World) -> None:
    with trio.CancelScope() as scope:
        async with world.upkeep.store_turn() as turn:
            assert turn is not None
            scope.cancel()
            await trio.lowlevel.checkpoint()
    async with world.other_upkeep().store_turn() as turn:
        assert turn is not None


async def test_a_turn_that_failed_is_over(world: World) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with world.upkeep.store_turn():
            raise ValueError("mine")
    async with world.other_upkeep().store_turn() as turn:
        assert turn is not None


async def test_partitions_are_made_for_today_and_the_days_that_follow(world: World) -> None:
    async with world.upkeep.store_turn() as store:
        assert store is not None
        await store.ensure_partitions(days_ahead=4)
        await store.ensure_partitions(days_ahead=4)
        ages = [one.age_days for one in await store.output_days()]
    assert ages == [0, -1, -2, -3, -4]


async def test_a_day_is_settled_when_all_its_commands_have_ended(world: World) -> None:
    await world.project()

    async def today() -> tuple[bool, bool]:
        async with world.upkeep.store_turn() as store:
            assert store is not None
            await store.ensure_partitions(days_ahead=0)
            found = next(one for one in await store.output_days() if one.age_days == 0)
            return found.is_settled, found.size_bytes > 0

    assert (await today())[0] is True
    queued = await world.queued()
    assert await today() == (False, True)
    [claimed] = await world.claim()
    assert (await today())[0] is False
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    assert claimed.lease.command == queued
    assert (await today())[0] is True


async def test_a_dropped_day_takes_its_events_and_leaves_its_commands(world: World) -> None:
    command = await ended(world)
    found = await world.commands.get(command)
    assert found is not None
    async with world.upkeep.store_turn() as store:
        assert store is not None
        today = found.created_at.date()
        assert await store.drop_output(today)
        assert await store.drop_output(today)
    assert await world.output.oldest_seq(command) is None
    assert await world.log(command) == []
    assert await world.commands.get(command) == found


async def test_keys_go_when_they_stand_for_nothing_any_more(world: World) -> None:
    await world.project()
    key = Idempotency(key_id="key_admin", key="0", digest=b"")
    for number in range(3):
        mine = replace(key, key=str(number))
        await world.commands.insert(replace(world.new(), idempotency=mine))
    async with world.upkeep.store_turn() as store:
        assert store is not None
        await world.age(IDEMPOTENCY_S - 60)
        assert await store.forget_keys(limit=10) == 0
        await world.age(2 * 3_600)
        assert await store.forget_keys(limit=2) == 2
        assert await store.forget_keys(limit=2) == 1
        assert await store.forget_keys(limit=2) == 0


async def test_old_events_go_and_audit_entries_stay(world: World) -> None:
    old = await ended(world)
    await world.age(8 * DAY_S)
    young = await ended(world)
    async with world.upkeep.store_turn() as store:
        assert store is not None
        assert await store.forget_events(older_s=7 * DAY_S, limit=1) == 1
        assert await store.forget_events(older_s=7 * DAY_S, limit=2) == 1
        assert await store.forget_events(older_s=7 * DAY_S, limit=2) == 0
    record = await world.record()
    assert [one.command for one in record.events] == [old, young, young, young]
    assert {one.target for one in record.entries} == {old, young}


async def test_a_record_is_kept_behind_the_next_midnights(real: World, pools: Pools) -> None:
    """What the housekeeper makes ahead takes the entries of those days, and no more than those."""
    async with real.upkeep.store_turn() as store:
        assert store is not None
        await store.ensure_partitions(days_ahead=DAYS_AHEAD)
    insert = """
        insert into audit_entries (day, actor, actor_name, action, target)
        values ((now() at time zone 'utc')::date + %s, 'server', 'one', 'ping', 'x')
    """
    async with pools.requests.connection() as connection:
        for days in range(DAYS_AHEAD + 1):
            await connection.execute(insert, (days,))
        with pytest.raises(psycopg.errors.CheckViolation):
            await connection.execute(insert, (DAYS_AHEAD + 1,))


async def test_old_commands_go_whatever_their_reach_and_living_ones_stay(world: World) -> None:
    old = [await ended(world)]
    await world.project("there", reach="local:b")
    old.append(await world.queued("there"))
    await world.commands.request_cancel(old[1], ACTOR)
    living = await world.queued()
    await world.age(10 * DAY_S)
    young = await ended(world)
    async with world.upkeep.store_turn() as store:
        assert store is not None
        assert await store.forget_commands(older_s=9 * DAY_S, limit=1) == 1
        assert await store.forget_commands(older_s=9 * DAY_S, limit=10) == 1
        assert await store.forget_commands(older_s=9 * DAY_S, limit=10) == 0
    assert [await world.commands.get(command) for command in old] == [None, None]
    assert await world.commands.get(living) is not None
    assert await world.commands.get(young) is not None


async def test_what_ended_is_tidied_once_in_the_order_of_its_end(world: World) -> None:
    first, second, third = [await ended(world) for _ in range(3)]
    assert await untidied(world, older_s=60) == []
    await world.age(1)
    assert await untidied(world, limit=2) == [first, second]
    assert await untidied(world, limit=2) == [third]
    assert await untidied(world) == []


async def test_what_never_started_has_nothing_to_tidy(world: World) -> None:
    await world.project()
    await world.commands.request_cancel(await world.queued(), ACTOR)
    await world.queued()
    await world.age(1)
    assert await untidied(world) == []


async def test_what_is_old_is_prunable_in_its_reach_and_forgotten_on_demand(world: World) -> None:
    command = await ended(world)
    running = (await world.running()).lease.command
    await world.age(100)
    young = await ended(world)
    assert await prunable(world, older_s=200) == []
    assert await prunable(world, older_s=50) == [command]
    assert await prunable(world, older_s=50, reach="elsewhere") == []
    async with world.upkeep.place_turn(REACH) as places:
        assert places is not None
        await places.forget([command, running])
        await places.forget([])
    assert await world.commands.get(command) is None
    left = await world.commands.list_for_project(
        PROJECT, status=None, kind=None, before=None, limit=10
    )
    assert {found.id for found in left.items} == {running, young}


# Only PostgreSQL can show this.


async def test_a_day_in_use_is_not_waited_for(real: World, pools: Pools) -> None:
    command = await ended(real)
    found = await real.commands.get(command)
    assert found is not None
    day: date = found.created_at.date()
    async with real.upkeep.store_turn() as store:
        assert store is not None
        async with pools.requests.connection() as reader, reader.transaction():
            await reader.execute("select count(*) from output")
            assert not await store.drop_output(day)
        assert await real.output.oldest_seq(command) == 1
        assert await store.drop_output(day)
    assert await real.output.oldest_seq(command) is None


async def test_windows_are_forgotten_when_their_last_hit_has_left(
    real: World, pools: Pools
) -> None:
    limits = PostgresRateLimits(pool=pools.requests)

    def hit(subject: str, window_s: int) -> Hit:
        limit = RateLimit(requests=1, window_s=window_s)
        return Hit(policy=Policy(name="key", limit=limit), subject=subject)

    async with pools.requests.connection() as connection:
        await connection.execute(MAKE_OLD, (60_000_000, [62.9, 62.9, 62.9, 20.0]))
    await limits.take([hit("used", 60)])

    async with real.upkeep.store_turn() as store:
        assert store is not None
        async with pools.requests.connection() as asking, asking.transaction():
            await asking.execute("select 1 from rate_windows where subject = 's1' for update")
            assert await store.forget_windows(limit=1) == 1
            assert await store.forget_windows(limit=5) == 1
        assert await store.forget_windows(limit=5) == 1
        assert await store.forget_windows(limit=5) == 0
    async with pools.requests.connection() as connection:
        cursor = await connection.execute("select subject from rate_windows order by 1")
        assert await cursor.fetchall() == [("s4",), ("used",)]


async def test_a_window_that_goes_while_it_is_asked_for_is_made_again(
    real: World, pools: Pools
) -> None:
    limits = PostgresRateLimits(pool=pools.requests)
    hit = Hit(policy=Policy(name="key", limit=RateLimit(requests=1, window_s=60)), subject="s1")
    answers: list[bool] = []

    async def ask() -> None:
        answers.append((await limits.take([hit]))[0].is_admitted)

    async with pools.requests.connection() as connection, trio.open_nursery() as nursery:
        await connection.execute(MAKE_OLD, (60_000_000, [90.0]))
        async with connection.transaction():
            await connection.execute("delete from rate_windows")
            nursery.start_soon(ask)
            await until_blocked(pools)

    assert answers == [True]
    assert not (await limits.take([hit]))[0].is_admitted


async def until_blocked(pools: Pools) -> None:
    """Until a connection of this database waits for a lock."""
    waiting = """
        select count(*) from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock'
    """
    with trio.fail_after(30):
        while True:
            async with pools.requests.connection() as connection:
                row = await (await connection.execute(waiting)).fetchone()
            if row != (0,):
                return
            await trio.sleep(0.005)


# Kills that left something


async def unkilled(world: World) -> CommandId:
    """A command whose kill left two processes."""
    claimed = await world.running()
    kill = KillReport(confirmed=False, survivors=(7, 8))
    outcome = Outcome(status=Status.CANCELLED, reason="cancelled", kill=kill)
    await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    return claimed.lease.command


async def status_of_project(world: World) -> ProjectStatus:
    project = await world.projects.get(PROJECT)
    assert project is not None
    return project.status


async def survivors(world: World) -> list[CommandId]:
    async with world.upkeep.place_turn(REACH) as places:
        assert places is not None
        return [one.command for one in await places.unkilled(limit=10)]


async def confirm(world: World, command: CommandId) -> None:
    async with world.upkeep.place_turn(REACH) as places:
        assert places is not None
        await places.confirm_kill(command)


async def test_a_project_in_which_a_kill_left_something_starts_nothing(world: World) -> None:
    command = await unkilled(world)
    waiting = await world.queued()
    assert await status_of_project(world) is ProjectStatus.FAILED
    await world.lanes.touch([Lane(project=PROJECT, lane_class=lane) for lane in LaneClass])
    await world.lanes.repair(reach=REACH)
    assert await world.claim() == []
    assert await survivors(world) == [command]
    await confirm(world, command)
    assert await status_of_project(world) is ProjectStatus.READY
    assert await survivors(world) == []
    await world.lanes.repair(reach=REACH)
    assert [claimed.lease.command for claimed in await world.claim()] == [waiting]


async def test_a_project_serves_again_when_nothing_is_left_of_all_its_kills(world: World) -> None:
    first, second = await unkilled(world), None
    assert await status_of_project(world) is ProjectStatus.FAILED
    await confirm(world, first)
    first = await unkilled(world)
    await confirm(world, first)
    running = [await world.running(), await world.running()]
    kill = KillReport(confirmed=False)
    outcome = Outcome(status=Status.TIMED_OUT, reason="timeout", kill=kill)
    for claimed in running:
        await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    first, second = (claimed.lease.command for claimed in running)
    await confirm(world, first)
    assert await status_of_project(world) is ProjectStatus.FAILED
    await confirm(world, second)
    assert await status_of_project(world) is ProjectStatus.READY


async def test_what_becomes_of_a_project_is_told_and_by_whom(real: World, pools: Pools) -> None:
    first = await unkilled(real)
    second = real.new()
    await confirm(real, first)
    await real.commands.insert(second)
    await real.lanes.repair(reach=REACH)
    [claimed] = await real.claim(holder="two")
    kill = KillReport(confirmed=False)
    outcome = Outcome(status=Status.TIMED_OUT, reason="timeout", kill=kill)
    await real.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    query = """
        select e.project, e.status, e.detail ->> 'command_id', a.actor_name, a.detail ->> 'status'
        from events e
        join audit_entries a on a.xid = e.xid and a.action = e.type
        where e.type = 'project.status'
        order by e.xid, e.position
    """
    async with pools.requests.connection() as connection:
        found = await (await connection.execute(query)).fetchall()
    assert found == [
        (PROJECT, "failed", first, "one", "failed"),
        (PROJECT, "ready", first, "keeper", "ready"),
        (PROJECT, "failed", second.id, "two", "failed"),
    ]


async def test_a_kill_that_left_nothing_closes_nothing(world: World) -> None:
    claimed = await world.running()
    outcome = Outcome(status=Status.CANCELLED, kill=KillReport(confirmed=True))
    await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    assert await status_of_project(world) is ProjectStatus.READY
    assert await survivors(world) == []


async def test_what_must_be_killed_again_is_neither_tidied_nor_pruned(world: World) -> None:
    command = await unkilled(world)
    await world.age(seconds=30 * DAY_S)
    assert await untidied(world) == []
    assert await prunable(world) == []
    async with world.upkeep.store_turn() as store:
        assert store is not None
        assert await store.forget_commands(older_s=0, limit=10) == 0
    assert await survivors(world) == [command]
