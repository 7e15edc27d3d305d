"""What the ports promise of the record of changes, on the fake and on PostgreSQL."""

from rdev.domain.commands import Claimed, Outcome, Retry, Status
from rdev.domain.ids import CommandId
from rdev.domain.lanes import Lane
from rdev.domain.stream import Source
from tests.fakes.record import Entry
from tests.fakes.store import ACTOR
from tests.ports.conftest import (
    REACH,
    World,
    again_chunk,
    append_to,
    following,
    last_chunk,
    lines,
)
from tests.ports.test_idempotency_conformance import keyed

SUCCEEDED = Outcome(status=Status.SUCCEEDED, exit_code=0, duration_ms=7)
UNSTARTED = {
    "exit_code": None, "signal": None, "duration_ms": None,
    "truncated": False, "stdout_bytes": 0, "stderr_bytes": 0,
}  # fmt: skip


async def told(world: World, command: CommandId) -> list[tuple[str, int, int]]:
    """Type, attempt and number of each event of a command."""
    found = (await world.record()).events
    return [(one.type, one.attempt, one.seq) for one in found if one.command == command]


async def actions(world: World, command: CommandId) -> list[tuple[str, str]]:
    """Who did what to a command."""
    found = (await world.record()).entries
    return [(one.actor_name, one.action) for one in found if one.target == command]


async def test_a_life_is_told_with_the_numbers_of_its_stream(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, lines(3), lines(2, source=Source.STDERR))
    await world.output.append([append])
    await world.output.append([following(append, last_chunk(SUCCEEDED), outcome=SUCCEEDED)])
    command = claimed.lease.command
    assert await told(world, command) == [
        ("command.queued", 0, 1),
        ("command.started", 1, 2),
        ("command.completed", 1, 9),
    ]
    found = await world.commands.get(command)
    assert found is not None
    assert found.last_seq == 9
    last = (await world.record()).events[-1]
    assert last.detail == {
        "reason": None, "exit_code": 0, "signal": None, "duration_ms": 7, "truncated": False,
        "stdout_bytes": 30, "stderr_bytes": 20,
    }  # fmt: skip
    assert (await world.record()).entries == [
        Entry(
            actor=ACTOR.key_id,
            actor_name=ACTOR.key_name,
            action="command.submitted",
            target=command,
        ),
        Entry(actor="server", actor_name="one", action="command.started", target=command),
        Entry(actor="server", actor_name="one", action="command.finished", target=command),
    ]


async def test_every_end_has_its_own_type(world: World) -> None:
    for status in (Status.FAILED, Status.CANCELLED, Status.TIMED_OUT, Status.LOST):
        claimed = await world.running()
        outcome = Outcome(status=status, reason="why")
        await world.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
        last = (await world.record()).events[-1]
        assert (last.type, last.status) == (f"command.{status}", status)
        assert last.detail["reason"] == "why"


async def test_output_alone_is_no_change(world: World) -> None:
    claimed = await world.running()
    before = len((await world.record()).entries)
    append = append_to(claimed, lines(3))
    await world.output.append([append])
    await world.output.append([following(append, lines(3))])
    await world.leases.heartbeat([claimed.lease])
    await world.leases.release([claimed.lease])
    assert len(await told(world, claimed.lease.command)) == 2
    assert len((await world.record()).entries) == before


async def test_what_was_dropped_is_told_with_the_end(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, lines(1), lines(1), lines(1))
    await world.output.append([append])
    await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=10, tail_bytes=10)
    await world.output.append([following(append, last_chunk(SUCCEEDED), outcome=SUCCEEDED)])
    assert (await world.record()).events[-1].detail["truncated"] is True


async def test_a_cancel_is_recorded_under_who_asked(world: World) -> None:
    await world.project()
    command = await world.queued()
    for _ in range(2):
        await world.commands.request_cancel(command, ACTOR)
    assert await told(world, command) == [("command.queued", 0, 1), ("command.cancelled", 0, 3)]
    last = (await world.record()).events[-1]
    assert last.detail == UNSTARTED | {"reason": "cancelled"}
    assert await actions(world, command) == [
        ("bootstrap", "command.submitted"),
        ("bootstrap", "command.cancelled"),
    ]


async def test_a_request_for_a_cancel_is_recorded_once_and_is_no_change_of_status(
    world: World,
) -> None:
    claimed = await world.running()
    command = claimed.lease.command
    for _ in range(2):
        await world.commands.request_cancel(command, ACTOR)
    assert len(await told(world, command)) == 2
    assert (await actions(world, command))[2:] == [("bootstrap", "command.cancel_requested")]


async def test_what_expired_is_told_by_the_tick_and_by_a_claim(world: World) -> None:
    await world.project()
    first = await world.queued(expires_in_s=0)
    assert await world.lanes.expire(holder="ticking", limit=10) == [first]
    second = await world.queued(expires_in_s=0)
    found = await world.lanes.claim(reach=REACH, instance="boot-1", holder="claiming", limit=1)
    assert found.expired == [second]
    for command, holder in ((first, "ticking"), (second, "claiming")):
        expected = [("command.queued", 0, 1), ("command.expired", 0, 3)]
        assert await told(world, command) == expected
        assert (await actions(world, command))[1:] == [(holder, "command.expired")]
    last = (await world.record()).events[-1]
    assert last.detail == UNSTARTED | {"reason": "expired"}


async def test_a_take_over_is_recorded_under_the_new_holder(world: World) -> None:
    claimed = await world.running()
    taken = await world.taken_over(claimed)
    await world.output.append([append_to(taken, last_chunk(SUCCEEDED), outcome=SUCCEEDED)])
    command = claimed.lease.command
    assert [one for one, _, _ in await told(world, command)] == [
        "command.queued",
        "command.started",
        "command.completed",
    ]
    assert (await actions(world, command))[1:] == [
        ("one", "command.started"),
        ("two", "command.taken_over"),
        ("two", "command.finished"),
    ]


async def test_an_append_that_changes_nothing_records_nothing(world: World) -> None:
    """A repeat after a lost reply, and one under an old lease."""
    claimed = await world.running()
    taken = await world.taken_over(claimed)
    stale = append_to(claimed, last_chunk(SUCCEEDED), outcome=SUCCEEDED)
    await world.output.append([stale])
    assert len(await told(world, claimed.lease.command)) == 2
    end = append_to(taken, last_chunk(SUCCEEDED), outcome=SUCCEEDED)
    for _ in range(2):
        await world.output.append([end])
    assert len(await told(world, claimed.lease.command)) == 3
    assert len(await actions(world, claimed.lease.command)) == 4


async def _again(world: World) -> Claimed:
    """A command in its second attempt."""
    await world.project()
    new = world.new(retry=Retry.SAFE)
    await world.commands.insert(new)
    lane = Lane(project=new.project, lane_class="work")  # type: ignore[arg-type]
    await world.lanes.touch([lane])
    [first] = await world.claim()
    outcome = Outcome(status=Status.QUEUED, reason="supervisor_gone")
    await world.output.append([append_to(first, lines(1), again_chunk(), outcome=outcome)])
    await world.lanes.touch([lane])
    [second] = await world.claim()
    return second


async def test_what_is_queued_again_is_told_with_its_reason(world: World) -> None:
    second = await _again(world)
    command = second.lease.command
    assert await told(world, command) == [
        ("command.queued", 0, 1),
        ("command.started", 1, 2),
        ("command.queued", 1, 4),
        ("command.started", 2, 5),
    ]
    again = (await world.record()).events[2]
    assert again.detail == {"reason": "supervisor_gone"}
    assert [action for _, action in await actions(world, command)][2] == "command.queued"
    found = await world.commands.get(command)
    assert found is not None
    assert found.reason is None


async def test_a_repeated_request_with_one_key_is_recorded_once(world: World) -> None:
    await world.project()
    for _ in range(2):
        await world.commands.insert(keyed(world))
    found = await world.record()
    assert [one.type for one in found.events] == ["command.queued"]
    assert [one.action for one in found.entries] == ["command.submitted"]
