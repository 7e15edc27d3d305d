"""Every sentence of `ports/commands.py`, on the fake and on PostgreSQL."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio

from rdev.domain.commands import (
    LANE_CLASS,
    Claimed,
    Kind,
    LaneClass,
    Lease,
    Outcome,
    Priority,
    Status,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Offsets
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.pages import PAGE_BYTES
from rdev.domain.stream import Source, final_lines, queued_line, status_line
from rdev.domain.traces import TraceContext
from rdev.ports.commands import Claims
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, REACH, Pools, World, append_to, last_chunk, lines

WORK = Lane(project=PROJECT, lane_class=LaneClass.WORK)
AGENT = Lane(project=PROJECT, lane_class=LaneClass.AGENT)
TRACE = TraceContext(trace_id="4b" * 16, span_id="ab" * 8, is_sampled=True, state="a=1,b=2")
UNKNOWN = CommandId("cmd_" + "f" * 32)


def _ids(claimed: list[Claimed]) -> list[CommandId]:
    return [one.lease.command for one in claimed]


# Accepting


async def test_an_accepted_command_is_queued_with_its_first_event(world: World) -> None:
    await world.project()
    new = world.new(priority=Priority.HIGH)
    accepted = await world.commands.insert(new)
    assert accepted.queue_position == 1
    command = accepted.command
    assert (command.id, command.project, command.kind) == (new.id, PROJECT, Kind.SHELL)
    assert (command.status, command.priority) == (Status.QUEUED, Priority.HIGH)
    assert (command.attempt, command.last_seq, command.argv) == (0, 1, new.argv)
    assert (command.key_id, command.started_at, command.finished_at) == ("key_admin", None, None)
    assert await world.commands.get(new.id) == command
    [chunk] = await world.log(new.id)
    assert (chunk.first_seq, chunk.last_seq, chunk.source) == (1, 1, Source.LIFE)
    assert chunk.payload == queued_line(queue_position=1)


async def test_the_trace_of_a_command_is_told_to_whoever_has_it(world: World) -> None:
    """Stored with the command; of a take-over the former lease is told too."""
    await world.project()
    new, without = replace(world.new(), trace=TRACE), world.new()
    for one in (new, without):
        await world.commands.insert(one)
    await world.lanes.repair(reach=REACH)
    claimed = {one.lease.command: one for one in await world.claim()}
    assert claimed[new.id].trace == TRACE
    assert claimed[without.id].trace is None
    assert claimed[new.id].taken_from is None
    taken = await world.taken_over(claimed[new.id])
    assert (taken.trace, taken.taken_from) == (TRACE, claimed[new.id].lease.id)


async def test_a_command_of_an_unknown_project_is_not_found(world: World) -> None:
    new = world.new("nowhere")
    with pytest.raises(RdevError) as caught:
        await world.commands.insert(new)
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert await world.commands.get(new.id) is None
    assert await world.log(new.id) == []


async def test_the_position_counts_whoever_is_served_first(world: World) -> None:
    await world.project()
    await world.project("other")
    first = await world.commands.insert(world.new())
    low = await world.commands.insert(world.new(priority=Priority.LOW))
    high = await world.commands.insert(world.new(priority=Priority.HIGH))
    elsewhere = await world.commands.insert(world.new("other"))
    positions = [one.queue_position for one in (first, low, high, elsewhere)]
    assert positions == [1, 2, 1, 1]
    now = [await world.commands.queue_position(one.command.id) for one in (first, low, high)]
    assert now == [2, 3, 1]


async def test_only_a_queued_command_has_a_position(world: World) -> None:
    running = await world.running()
    assert await world.commands.queue_position(running.lease.command) is None
    assert await world.commands.queue_position(UNKNOWN) is None


# Reading


async def test_an_unknown_command_is_none(world: World) -> None:
    assert await world.commands.get(UNKNOWN) is None


async def test_commands_are_listed_newest_first_in_pages(world: World) -> None:
    await world.project()
    await world.project("other")
    ids = [await world.queued() for _ in range(5)]
    await world.queued("other")

    async def page(before: CommandId | None, limit: int) -> list[CommandId]:
        found = await world.commands.list_for_project(
            PROJECT, status=None, kind=None, before=before, limit=limit
        )
        assert found.has_more == (bool(found.items) and found.items[-1].id != ids[0])
        return [command.id for command in found.items]

    assert await page(None, 10) == ids[::-1]
    assert await page(None, 2) == [ids[4], ids[3]]
    assert await page(ids[3], 2) == [ids[2], ids[1]]
    assert await page(ids[0], 2) == []


async def test_a_page_ends_with_the_row_that_brings_it_to_its_bytes(world: World) -> None:
    """Each row once, at least one a page, and the last page knows that it is the last."""
    await world.project()
    ids = []
    for size_bytes in (10, 400_000, 400_000, 400_000, 10, 2 * PAGE_BYTES, 2 * PAGE_BYTES, 10):
        new = replace(world.new(PROJECT), argv=("x" * size_bytes,))
        await world.commands.insert(new)
        ids.append(new.id)

    pages: list[list[int]] = []
    before = None
    while True:
        page = await world.commands.list_for_project(
            PROJECT, status=Status.QUEUED, kind=None, before=before, limit=5
        )
        pages.append([ids.index(command.id) for command in page.items])
        if not page.has_more:
            break
        before = page.items[-1].id

    assert pages == [[7, 6], [5], [4, 3, 2, 1], [0]]


async def test_a_list_is_filtered_by_status_and_kind(world: World) -> None:
    await world.project()
    shell = await world.queued(kind=Kind.SHELL)
    git = await world.queued(kind=Kind.GIT)
    ended = await world.queued(kind=Kind.SHELL)
    await world.commands.request_cancel(ended, ACTOR)

    async def found(status: Status | None, kind: Kind | None) -> list[CommandId]:
        commands = await world.commands.list_for_project(
            PROJECT, status=status, kind=kind, before=None, limit=10
        )
        return [command.id for command in commands.items]

    assert await found(Status.QUEUED, None) == [git, shell]
    assert await found(None, Kind.SHELL) == [ended, shell]
    assert await found(Status.CANCELLED, Kind.SHELL) == [ended]
    assert await found(Status.CANCELLED, Kind.GIT) == []


# Cancelling


async def test_a_cancel_ends_a_queued_command_with_its_last_events(world: World) -> None:
    await world.project()
    command = await world.queued()
    result = await world.commands.request_cancel(command, ACTOR)
    assert result is not None
    assert result.ended_now
    assert (result.command.status, result.command.reason) == (Status.CANCELLED, "cancelled")
    assert result.command.finished_at is not None
    assert result.command.last_seq == 3
    [_, last] = await world.log(command)
    assert (last.first_seq, last.last_seq, last.is_final) == (2, 3, True)
    outcome = Outcome(status=Status.CANCELLED, reason="cancelled")
    assert last.payload == final_lines(
        outcome, attempt=0, truncated=False, stdout_bytes=0, stderr_bytes=0
    )
    assert await world.claim() == []


async def test_a_cancel_is_recorded_on_a_running_command(world: World) -> None:
    claimed = await world.running()
    result = await world.commands.request_cancel(claimed.lease.command, ACTOR)
    assert result is not None
    assert not result.ended_now
    assert result.command.status is Status.RUNNING
    beat = await world.leases.heartbeat([claimed.lease])
    assert beat.cancel_requested == {claimed.lease}
    assert beat.stale == frozenset()
    assert (await world.taken_over(claimed)).cancel_requested


async def test_an_ended_command_is_returned_as_it_is(world: World) -> None:
    claimed = await world.running()
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    before = await world.commands.get(claimed.lease.command)
    result = await world.commands.request_cancel(claimed.lease.command, ACTOR)
    assert result is not None
    assert not result.ended_now
    assert result.command == before


async def test_a_second_cancel_changes_nothing(world: World) -> None:
    await world.project()
    command = await world.queued()
    first = await world.commands.request_cancel(command, ACTOR)
    second = await world.commands.request_cancel(command, ACTOR)
    assert first is not None
    assert second is not None
    assert second.command == first.command
    assert not second.ended_now


async def test_a_cancel_of_an_unknown_command_is_none(world: World) -> None:
    assert await world.commands.request_cancel(UNKNOWN, ACTOR) is None


# Claiming


async def test_a_claim_starts_an_attempt_under_a_fresh_lease(world: World) -> None:
    await world.project()
    new = world.new()
    await world.commands.insert(new)
    await world.lanes.touch([WORK])
    [claimed] = await world.claim()
    assert claimed.lease.command == new.id
    assert (claimed.project, claimed.kind, claimed.spec) == (PROJECT, Kind.SHELL, new.spec)
    assert (claimed.attempt, claimed.take_over, claimed.instance) == (1, False, "boot-1")
    assert (claimed.offsets, claimed.last_seq) == (Offsets(), 2)
    assert (claimed.cancel_requested, claimed.dropped_bytes) == (False, 0)
    assert claimed.queue_wait_ms >= 0
    command = await world.commands.get(new.id)
    assert command is not None
    assert (command.status, command.attempt, command.last_seq) == (Status.RUNNING, 1, 2)
    assert command.started_at is not None
    assert command.started_at >= command.created_at
    [_, event] = await world.log(new.id)
    assert event.payload == status_line(Status.RUNNING, attempt=1)


async def test_a_claimed_command_is_not_claimed_again(world: World) -> None:
    await world.running()
    assert await world.claim(holder="two") == []


async def test_a_claim_takes_its_own_reach_only(world: World) -> None:
    await world.project("here", reach="local:a")
    await world.project("there", reach="local:b")
    here, there = await world.queued("here"), await world.queued("there")
    assert _ids(await world.claim(reach="local:b")) == [there]
    assert _ids(await world.claim(reach="local:a")) == [here]


async def test_a_claim_takes_at_most_its_limit(world: World) -> None:
    await world.project()
    ids = [await world.queued() for _ in range(3)]
    assert _ids(await world.claim(2)) == ids[:2]
    assert _ids(await world.claim(2)) == ids[2:]


async def test_a_lane_is_served_by_priority_then_in_order_of_acceptance(world: World) -> None:
    await world.project()
    order = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL, Priority.HIGH]
    ids = [await world.queued(kind=Kind.GIT, priority=priority) for priority in order]
    served = []
    for _ in ids:
        [claimed] = await world.claim()
        served.append(claimed.lease.command)
        await _end(world, claimed)
    assert served == [ids[2], ids[4], ids[1], ids[3], ids[0]]


async def test_agents_take_turns_and_four_shells_run_beside_them(world: World) -> None:
    await world.project()
    for kind in (Kind.CLAUDE, Kind.GIT, *[Kind.SHELL] * 6):
        await world.queued(kind=kind)
    claimed = await world.claim()
    kinds = Counter(one.kind for one in claimed)
    assert kinds == {Kind.CLAUDE: 1, Kind.SHELL: 4}
    assert await world.claim() == []
    await _end(world, next(one for one in claimed if one.kind is Kind.CLAUDE))
    assert [one.kind for one in await world.claim()] == [Kind.GIT]
    await _end(world, next(one for one in claimed if one.kind is Kind.SHELL))
    assert [one.kind for one in await world.claim()] == [Kind.SHELL]


async def test_the_caps_are_those_of_each_project(world: World) -> None:
    for name in ("one", "two"):
        await world.project(name)
        for _ in range(2):
            await world.queued(name, kind=Kind.GIT)
    assert sorted(one.project for one in await world.claim()) == ["one", "two"]


async def test_an_expired_lease_is_taken_over_with_its_attempt(world: World) -> None:
    first = await world.running()
    await world.output.append([append_to(first, lines(3))])
    second = await world.taken_over(first)
    assert second.take_over
    assert second.lease != first.lease
    assert (second.attempt, second.instance) == (1, "boot-1")
    assert (second.offsets, second.last_seq) == (Offsets(stdout=30), 5)
    assert second.spec == first.spec
    chunks = await world.log(first.lease.command)
    assert [chunk.last_seq for chunk in chunks] == [1, 2, 5]


async def test_a_take_over_comes_before_queued_commands(world: World) -> None:
    first = await world.running()
    await world.queued(priority=Priority.HIGH)
    await world.leases.release([first.lease])
    [claimed] = await world.claim(1)
    assert claimed.lease.command == first.lease.command


async def test_a_command_being_taken_over_counts_in_its_lane(world: World) -> None:
    first = await world.running(kind=Kind.GIT)
    await world.queued(kind=Kind.GIT)
    await world.leases.release([first.lease])
    assert _ids(await world.claim()) == [first.lease.command]


async def test_leases_are_never_drawn_twice(world: World) -> None:
    claimed = await world.running()
    seen = [claimed.lease.id]
    for _ in range(5):
        claimed = await world.taken_over(claimed)
        seen.append(claimed.lease.id)
    assert seen == sorted(set(seen))


async def test_an_expired_command_is_not_claimed(world: World) -> None:
    await world.project()
    await world.queued(expires_in_s=0)
    assert await world.claim() == []


async def test_a_row_held_by_another_connection_is_not_taken_over_now(world: World) -> None:
    first = await world.running()
    await world.leases.release([first.lease])
    async with world.hold(first.lease.command):
        assert await world.claim() == []
    assert _ids(await world.claim()) == [first.lease.command]


# Lanes


async def _claim_once(
    world: World, limit: int = 100, *, reach: str = REACH, touched: Sequence[str] = ()
) -> Claims:
    """`touched`: projects whose shells' lanes are touched with the claim."""
    lanes = [Lane(project=ProjectId(name), lane_class=LaneClass.WORK) for name in touched]
    return await world.lanes.claim(
        reach=reach, instance="boot-1", holder="one", limit=limit, touched=lanes
    )


async def _untouched(world: World, project: str, priority: Priority = Priority.NORMAL) -> CommandId:
    """A command of a new project, of which its lane was not told."""
    await world.project(project)
    new = world.new(project, priority=priority)
    await world.commands.insert(new)
    return new.id


async def test_a_claim_touches_lanes_first(world: World) -> None:
    ids = [await _untouched(world, name) for name in ("one", "two")]
    assert (await _claim_once(world)).claimed == []
    assert _ids((await _claim_once(world, touched=["two", "one"])).claimed) == ids
    assert (await _claim_once(world, touched=["two", "one", "unknown"])).claimed == []


async def test_a_touched_lane_waits_for_its_turn(world: World) -> None:
    """What is left of the touched lanes stands where it would after a touch."""
    await world.project("before")
    before = await world.queued("before")
    one, two = [await _untouched(world, name) for name in ("one", "two")]
    assert _ids((await _claim_once(world, 1, touched=["two", "one"])).claimed) == [before]
    assert _ids((await _claim_once(world, 1)).claimed) == [one]
    assert _ids((await _claim_once(world, 1)).claimed) == [two]
    assert (await _claim_once(world)).claimed == []


async def test_a_touched_lane_does_not_overtake_those_behind_one_that_stood_too_early(
    world: World,
) -> None:
    for name in ("cancelled", "waiting"):
        await world.project(name)
    head = await world.queued("cancelled", priority=Priority.HIGH)
    waiting = await world.queued("waiting")
    await world.commands.request_cancel(head, ACTOR)
    touched = await _untouched(world, "touched")
    assert _ids((await _claim_once(world, 1, touched=["touched"])).claimed) == [waiting]
    assert _ids((await _claim_once(world, 1)).claimed) == [touched]


async def test_a_touched_lane_of_another_reach_is_left_to_its_servers(world: World) -> None:
    await world.project("far", reach="elsewhere")
    new = world.new("far")
    await world.commands.insert(new)
    assert (await _claim_once(world, touched=["far"])).claimed == []
    assert _ids((await _claim_once(world, reach="elsewhere")).claimed) == [new.id]


async def test_a_touched_lane_is_served_behind_what_expired_in_it(world: World) -> None:
    await world.project()
    late, new = world.new(expires_in_s=0), world.new()
    for one in (late, new):
        await world.commands.insert(one)
    found = await _claim_once(world, 1, touched=[PROJECT])
    assert (found.expired, _ids(found.claimed)) == ([late.id], [new.id])


async def test_a_touched_lane_that_is_full_is_parked(world: World) -> None:
    await world.project()
    for _ in range(5):
        await world.queued()
    assert len(await world.claim()) == 4
    await world.lanes.touch([WORK])
    assert (await _claim_once(world, touched=[PROJECT])).claimed == []


async def test_what_nobody_touched_is_claimed_after_a_repair(world: World) -> None:
    await world.project()
    new = world.new()
    await world.commands.insert(new)
    assert (await _claim_once(world)).claimed == []
    assert await world.lanes.repair(reach="elsewhere") == 0
    assert await world.lanes.repair(reach=REACH) == 1
    assert await world.lanes.repair(reach=REACH) == 0
    assert _ids((await _claim_once(world)).claimed) == [new.id]


async def test_a_repair_finds_a_lane_that_stands_too_late(world: World) -> None:
    """A command of a higher level came in front, and nobody touched its lane."""
    for name in ("here", "there"):
        await world.project(name)
    low = await world.queued("here", priority=Priority.LOW)
    normal = await world.queued("there")
    high = world.new("here", priority=Priority.HIGH)
    await world.commands.insert(high)
    assert await world.lanes.repair(reach=REACH) == 1
    assert _ids((await _claim_once(world, 1)).claimed) == [high.id]
    assert set(_ids(await world.claim())) == {low, normal}


async def test_a_repair_leaves_full_and_empty_lanes_alone(world: World) -> None:
    await world.running(kind=Kind.GIT)
    await world.queued(kind=Kind.GIT)
    assert await world.lanes.repair(reach=REACH) == 0


async def test_touching_nothing_or_an_unknown_lane_is_fine(world: World) -> None:
    await world.lanes.touch([])
    await world.lanes.touch([WORK])


async def test_full_lanes_cost_a_claim_nothing_of_its_limit(world: World) -> None:
    for name in ("full", "free"):
        await world.project(name)
    for _ in range(5):
        await world.queued("full")
    assert len(await world.claim()) == 4
    free = await world.queued("free")
    await world.lanes.touch([Lane(project=ProjectId("full"), lane_class=LaneClass.WORK)])
    assert _ids((await _claim_once(world, 1)).claimed) == [free]


async def test_lanes_take_turns(world: World) -> None:
    for name in ("one", "two"):
        await world.project(name)
    ids = [await world.queued(name) for name in ("one", "one", "two", "two")]
    served = [_ids((await _claim_once(world, 1)).claimed)[0] for _ in ids]
    assert served == [ids[0], ids[2], ids[1], ids[3]]


async def test_a_claim_ends_what_expired_before_it_and_says_so(world: World) -> None:
    await world.project()
    late = [await world.queued(kind=Kind.GIT, expires_in_s=0) for _ in range(2)]
    command = await world.queued(kind=Kind.GIT)
    found = await _claim_once(world, 1)
    assert (found.expired, _ids(found.claimed)) == (late, [command])
    for one in late:
        ended = await world.commands.get(one)
        assert ended is not None
        assert (ended.status, ended.reason, ended.last_seq) == (Status.EXPIRED, "expired", 3)
        assert (await world.log(one))[-1].is_final


async def test_a_claim_may_find_nothing_but_what_expired(world: World) -> None:
    await world.project()
    late = await world.queued(expires_in_s=0)
    found = await _claim_once(world)
    assert (found.expired, found.claimed) == ([late], [])
    assert await _claim_once(world) == Claims(claimed=[], expired=[])


async def test_a_cancelled_head_leaves_its_turn_to_others(world: World) -> None:
    """The lane stood where its head was; the command behind it waits for its own turn."""
    for name in ("one", "two"):
        await world.project(name)
    head = await world.queued("one", priority=Priority.HIGH)
    normal = await world.queued("two")
    behind = await world.queued("one", priority=Priority.LOW)
    await world.commands.request_cancel(head, ACTOR)
    assert _ids((await _claim_once(world, 1)).claimed) == [normal]
    assert _ids((await _claim_once(world, 1)).claimed) == [behind]


async def test_a_lane_that_another_claim_holds_is_passed_by(real: World, pools: Pools) -> None:
    for name in ("held", "free"):
        await real.project(name)
    held, free = await real.queued("held"), await real.queued("free")
    async with pools.requests.connection() as connection, connection.transaction():
        await connection.execute("select 1 from lanes where project = 'held' for update")
        assert _ids((await _claim_once(real, 2)).claimed) == [free]
    assert _ids((await _claim_once(real, 2)).claimed) == [held]


async def test_a_full_lane_that_is_due_by_mistake_is_parked(real: World, pools: Pools) -> None:
    """`due` may be too early; the cap is counted under the lane's lock."""
    await real.running(kind=Kind.GIT)
    await real.queued(kind=Kind.GIT)
    async with pools.requests.connection() as connection:
        await connection.execute("update lanes set due = 1")
        assert await _claim_once(real) == Claims(claimed=[], expired=[])
        parked = await connection.execute("select count(*) from lanes where due is not null")
        assert await parked.fetchone() == (0,)


async def test_a_claim_holds_no_lane_that_it_does_not_take(real: World, pools: Pools) -> None:
    names = [f"project-{number}" for number in range(12)]
    for name in names:
        await real.project(name)
        await real.queued(name)
    query = "select * from claim_commands(%s, 'two', null, 60, 30, 1, 'r', 'e')"
    async with pools.requests.connection() as connection, connection.transaction():
        await connection.execute(query, (REACH,))
        assert len((await _claim_once(real)).claimed) == 11


# Leases


async def test_a_heartbeat_renews_what_is_ours_and_names_what_is_stale(world: World) -> None:
    first = await world.running()
    second = await world.taken_over(first)
    other = await world.running()
    unknown = Lease(command=UNKNOWN, id=1)
    beat = await world.leases.heartbeat([first.lease, second.lease, other.lease, unknown])
    assert beat.stale == {first.lease, unknown}
    assert beat.cancel_requested == frozenset()


async def test_a_renewed_lease_is_not_taken_over(world: World) -> None:
    claimed = await world.running()
    await world.leases.release([claimed.lease])
    await world.leases.heartbeat([claimed.lease])
    assert await world.claim(holder="two") == []


async def test_the_lease_of_an_ended_command_is_stale(world: World) -> None:
    claimed = await world.running()
    await _end(world, claimed)
    beat = await world.leases.heartbeat([claimed.lease])
    assert beat.stale == {claimed.lease}


async def test_a_heartbeat_without_leases_finds_nothing(world: World) -> None:
    beat = await world.leases.heartbeat([])
    assert (beat.stale, beat.cancel_requested) == (frozenset(), frozenset())


async def test_an_instance_is_recorded_under_the_lease(world: World) -> None:
    await world.project()
    await world.queued()
    found = await world.lanes.claim(reach=REACH, instance=None, holder="one", limit=1)
    [claimed] = found.claimed
    assert claimed.instance is None
    assert await world.leases.record_instance(claimed.lease, "boot-7")
    assert await world.leases.record_instance(claimed.lease, "boot-7")
    assert not await world.leases.record_instance(claimed.lease, "boot-8")
    taken = await world.taken_over(claimed)
    assert taken.instance == "boot-7"
    assert not await world.leases.record_instance(claimed.lease, "boot-8")


async def test_a_released_lease_is_taken_over_at_once(world: World) -> None:
    claimed = await world.running()
    await world.leases.release([claimed.lease])
    assert _ids(await world.claim(holder="two")) == [claimed.lease.command]


async def test_releasing_a_stale_lease_leaves_the_new_holder_alone(world: World) -> None:
    first = await world.running()
    await world.taken_over(first)
    await world.leases.release([first.lease])
    assert await world.claim() == []


async def test_releasing_nothing_is_fine(world: World) -> None:
    await world.leases.release([])


async def test_the_leases_of_a_dead_holder_expire_together(world: World) -> None:
    await world.project()
    dead = [await world.queued(), await world.queued()]
    await world.claim(holder="dead")
    await world.queued()
    await world.claim(holder="alive")
    assert await world.leases.release_holder("dead") == 2
    assert await world.leases.release_holder("dead") == 0
    assert await world.leases.release_holder("nobody") == 0
    assert sorted(_ids(await world.claim(holder="dead"))) == dead


async def test_what_waited_too_long_ends_as_expired(world: World) -> None:
    await world.project()
    due = await world.queued(expires_in_s=0)
    waiting = await world.queued(expires_in_s=10_000)
    forever = await world.queued()
    assert await world.lanes.expire(holder="one", limit=10) == [due]
    assert await world.lanes.expire(holder="one", limit=10) == []
    ended = await world.commands.get(due)
    assert ended is not None
    assert (ended.status, ended.reason, ended.last_seq) == (Status.EXPIRED, "expired", 3)
    assert ended.finished_at is not None
    last = (await world.log(due))[-1]
    assert (last.first_seq, last.last_seq, last.is_final) == (2, 3, True)
    assert sorted(_ids(await world.claim())) == [waiting, forever]


async def test_expiry_is_bounded(world: World) -> None:
    await world.project()
    for _ in range(3):
        await world.queued(expires_in_s=0)
    assert len(await world.lanes.expire(holder="one", limit=2)) == 2
    assert len(await world.lanes.expire(holder="one", limit=2)) == 1


# Races (only PostgreSQL can show them)


async def test_twenty_claimers_at_once_never_take_a_command_twice(real: World) -> None:
    taken: list[Claimed] = []
    for name in ("a", "b", "c", "d", "e"):
        await real.project(name)
        for kind in (Kind.GIT, Kind.SHELL, Kind.SHELL, Kind.SHELL):
            await real.queued(name, kind=kind)

    async def claimer(number: int) -> None:
        for _ in range(3):
            taken.extend(await real.claim(1, holder=f"server-{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(claimer, number)
    while more := await real.claim(3):
        taken.extend(more)
    assert len(taken) == 20
    assert len(set(_ids(taken))) == 20
    assert len({one.lease.id for one in taken}) == 20


async def test_claimers_at_once_do_not_exceed_the_cap_of_a_lane(real: World) -> None:
    await real.project()
    for _ in range(20):
        await real.queued(kind=Kind.SHELL)
        await real.queued(kind=Kind.GIT)
    taken: list[Claimed] = []

    async def claimer() -> None:
        taken.extend(await real.claim(3))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(claimer)
    # A lane that another one held was left out: whatever room is left, one alone finds it.
    while more := await real.claim(3):
        taken.extend(more)
    assert Counter(one.kind for one in taken) == {Kind.SHELL: 4, Kind.GIT: 1}


async def test_a_cancel_that_races_a_claim_is_never_lost(real: World) -> None:
    """Either it ended the command before the claim, or the claimed command knows of it."""
    for _ in range(30):
        await real.project()
        command = await real.queued()
        claimed: list[Claimed] = []

        async def claim(into: list[Claimed]) -> None:
            into.extend(await real.claim())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim, claimed)
            nursery.start_soon(real.commands.request_cancel, command, ACTOR)
        found = await real.commands.get(command)
        assert found is not None
        if not claimed:
            assert found.status is Status.CANCELLED
            continue
        assert found.status is Status.RUNNING
        beat = await real.leases.heartbeat([claimed[0].lease])
        assert beat.cancel_requested == {claimed[0].lease}
        await _end(real, claimed[0])


async def _end(world: World, claimed: Claimed) -> None:
    command = await world.commands.get(claimed.lease.command)
    assert command is not None
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    append = append_to(
        claimed,
        last_chunk(outcome),
        outcome=outcome,
        start=Offsets(stdout=command.stdout_bytes, stderr=command.stderr_bytes),
        start_seq=command.last_seq,
    )
    [result] = await world.output.append([append])
    assert result.state == "applied"
    await world.lanes.touch([Lane(project=claimed.project, lane_class=LANE_CLASS[claimed.kind])])
