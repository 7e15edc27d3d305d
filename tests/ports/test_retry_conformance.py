"""What the ports promise of a command that has another attempt, on the fake and on PostgreSQL."""

import pytest
import trio

from rdev.domain.commands import LANE_CLASS, Claimed, Kind, Lease, Outcome, Retry, Status
from rdev.domain.execution import LostReason, Offsets
from rdev.domain.ids import CommandId
from rdev.domain.lanes import Lane
from rdev.domain.stream import Source, final_lines, status_line
from rdev.ports.output import Append, AppendState, NewChunk
from tests.fakes.store import ACTOR
from tests.ports.conftest import (
    PROJECT,
    Pools,
    World,
    again_chunk,
    append_to,
    following,
    last_chunk,
    lines,
)
from tests.ports.test_interleavings import held, until_blocked

AGAIN = Outcome(status=Status.QUEUED)


def _ends(claimed: Claimed, *chunks: NewChunk) -> Append:
    """The append that ends an attempt which another one is to follow."""
    return append_to(claimed, *chunks, again_chunk(claimed.attempt), outcome=AGAIN)


async def _state(world: World, append: Append) -> AppendState:
    [result] = await world.output.append([append])
    return result.state


async def _claim(world: World, kind: Kind = Kind.SHELL) -> list[Claimed]:
    await world.lanes.touch([Lane(project=PROJECT, lane_class=LANE_CLASS[kind])])
    return await world.claim()


async def _second(world: World, *chunks: NewChunk) -> Claimed:
    """A command in its second attempt, whose first wrote these chunks."""
    first = await world.running()
    assert await _state(world, _ends(first, *chunks)) is AppendState.APPLIED
    [second] = await _claim(world)
    return second


async def test_an_attempt_that_did_not_finish_queues_its_command_again(world: World) -> None:
    claimed = await world.running()
    [result] = await world.output.append([_ends(claimed, lines(3))])
    assert result.state is AppendState.APPLIED
    command = await world.commands.get(claimed.lease.command)
    assert command is not None
    assert (command.status, command.attempt, command.finished_at) == ("queued", 1, None)
    assert (command.reason, command.exit_code, command.kill) == (None, None, None)
    assert (command.stdout_bytes, command.attempt_seq, command.last_seq) == (0, 6, 6)
    last = (await world.log(command.id))[-1]
    assert last == result.chunks[-1]
    assert last.payload == b's{"status":"queued","attempt":1,"reason":"supervisor_gone"}'
    assert not last.is_final
    assert await world.commands.queue_position(command.id) == 1


async def test_the_next_attempt_begins_anew_behind_the_last(world: World) -> None:
    first = await world.running()
    await world.output.append([_ends(first, lines(3), lines(2, source=Source.STDERR))])
    assert (await world.claim()) == []  # nobody touched its lane yet
    [second] = await _claim(world)
    assert (second.attempt, second.take_over, second.spec) == (2, False, first.spec)
    assert second.lease.id > first.lease.id
    assert (second.offsets, second.attempt_seq, second.last_seq) == (Offsets(), 8, 9)
    last = (await world.log(second.lease.command))[-1]
    assert last.payload == status_line(Status.RUNNING, attempt=2)
    append = append_to(second, lines(1))
    assert await _state(world, append) is AppendState.APPLIED
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    ended = following(append, last_chunk(outcome), outcome=outcome)
    assert await _state(world, ended) is AppendState.APPLIED
    command = await world.commands.get(second.lease.command)
    assert command is not None
    assert (command.status, command.attempt, command.stdout_bytes) == ("succeeded", 2, 10)


async def test_the_first_claim_says_that_it_is_the_first(world: World) -> None:
    claimed = await world.running()
    assert (claimed.attempt, claimed.attempt_seq) == (1, 0)
    assert (await world.log(claimed.lease.command))[-1].payload == status_line(
        Status.RUNNING, attempt=1
    )


async def test_a_claim_knows_what_its_command_allows(world: World) -> None:
    await world.project()
    for retry in Retry:
        await world.commands.insert(world.new(retry=retry))
    claimed = [*await _claim(world), *await _claim(world)]
    assert [one.retry for one in claimed] == list(Retry)


async def test_what_is_queued_again_keeps_its_place(world: World) -> None:
    first = await world.running(Kind.CLAUDE)
    later = await world.queued(kind=Kind.CLAUDE)
    assert await _claim(world, Kind.CLAUDE) == []
    await world.output.append([_ends(first)])
    assert await world.commands.queue_position(first.lease.command) == 1
    assert await world.commands.queue_position(later) == 2
    [second] = await _claim(world, Kind.CLAUDE)
    assert second.lease.command == first.lease.command


async def test_what_was_started_once_does_not_expire(world: World) -> None:
    await world.project()
    command = await world.queued(expires_in_s=1)
    [claimed] = await world.claim()
    await world.output.append([_ends(claimed)])
    await trio.sleep(1.1)
    assert await world.lanes.expire(holder="one", limit=10) == []
    [again] = await _claim(world)
    assert (again.lease.command, again.attempt) == (command, 2)


async def test_nobody_writes_for_what_is_queued_again(world: World) -> None:
    claimed = await world.running()
    end = _ends(claimed)
    await world.output.append([end])
    lease = claimed.lease
    assert await _state(world, following(end, lines(1))) is AppendState.STALE
    assert (await world.leases.heartbeat([lease])).stale == {lease}
    assert not await world.leases.record_instance(lease, "boot-1")
    await world.leases.release([lease])
    assert await world.leases.take_over(reach="local:machine:/projects", holder="x", limit=9) == []
    [second] = await _claim(world)
    assert await _state(world, append_to(claimed, lines(1))) is AppendState.STALE
    assert await _state(world, append_to(second, lines(1))) is AppendState.APPLIED


async def test_a_repeat_of_queueing_again_is_applied_once(world: World) -> None:
    claimed = await world.running()
    end = _ends(claimed, lines(2))
    [first] = await world.output.append([end])
    [repeat] = await world.output.append([end])
    assert repeat == first
    await _claim(world)
    assert await _state(world, end) is AppendState.STALE
    command = await world.commands.get(claimed.lease.command)
    assert command is not None
    assert (command.status, command.attempt) == (Status.RUNNING, 2)


async def test_of_what_is_queued_again_anybody_may_write_the_end(world: World) -> None:
    """A cancel by another server: its last holder must not take the stream for its own."""
    first = await world.running()
    command = first.lease.command
    assert await world.output.heads([command], written_by_others_than="one") == {}
    await world.output.append([_ends(first)])
    [seq] = (await world.output.heads([command], written_by_others_than="one")).values()
    assert seq == (await world.log(command))[-1].last_seq


async def test_a_stale_lease_queues_nothing_again(world: World) -> None:
    claimed = await world.running()
    await world.taken_over(claimed)
    assert await _state(world, _ends(claimed)) is AppendState.STALE
    command = await world.commands.get(claimed.lease.command)
    assert command is not None
    assert command.status is Status.RUNNING


async def test_after_a_cancel_nothing_is_queued_again(world: World) -> None:
    claimed = await world.running()
    await world.commands.request_cancel(claimed.lease.command, ACTOR)
    assert await _state(world, _ends(claimed, lines(2))) is AppendState.REFUSED
    command = await world.commands.get(claimed.lease.command)
    assert command is not None
    assert (command.status, command.stdout_bytes, command.last_seq) == ("running", 0, 2)
    outcome = Outcome(status=Status.LOST, reason=LostReason.SUPERVISOR_GONE)
    end = append_to(claimed, lines(2), last_chunk(outcome), outcome=outcome)
    assert await _state(world, end) is AppendState.APPLIED


async def test_a_refusal_concerns_its_own_command_only(world: World) -> None:
    refused, other = await world.running(), await world.running()
    await world.commands.request_cancel(refused.lease.command, ACTOR)
    batch = [_ends(refused), _ends(other)]
    states = [result.state for result in await world.output.append(batch)]
    assert states == [AppendState.REFUSED, AppendState.APPLIED]


async def test_a_locked_command_is_queued_again_later(world: World) -> None:
    claimed = await world.running()
    async with world.hold(claimed.lease.command):
        assert await _state(world, _ends(claimed)) is AppendState.LOCKED
    assert await _state(world, _ends(claimed)) is AppendState.APPLIED


async def test_a_cancel_ends_what_is_queued_again_and_names_its_attempt(world: World) -> None:
    claimed = await world.running()
    await world.output.append([_ends(claimed, lines(2))])
    result = await world.commands.request_cancel(claimed.lease.command, ACTOR)
    assert result is not None
    assert result.ended_now
    assert (result.command.status, result.command.attempt) == (Status.CANCELLED, 1)
    outcome = Outcome(status=Status.CANCELLED, reason="cancelled")
    expected = final_lines(outcome, attempt=1, truncated=False, stdout_bytes=0, stderr_bytes=0)
    assert (await world.log(claimed.lease.command))[-1].payload == expected
    assert await _claim(world) == []


async def test_a_take_over_knows_how_long_the_attempt_is_under_way(world: World) -> None:
    second = await _second(world)
    assert second.running_s < 60
    await world.age(1_000)
    taken = await world.taken_over(second)
    assert (taken.attempt, taken.attempt_seq) == (2, second.attempt_seq)
    assert 1_000 <= taken.running_s < 1_100


async def test_the_tail_is_that_of_the_last_attempt(world: World) -> None:
    claimed = await _second(world, lines(3))
    command = claimed.lease.command

    async def tail() -> list[int]:
        chunks = await world.output.read_tail(command, Source.STDOUT, tail_bytes=1_000)
        return [chunk.first_seq for chunk in chunks]

    assert await tail() == []
    await world.output.append([append_to(claimed, lines(1))])
    assert await tail() == [8]


async def test_each_attempt_is_trimmed_for_itself(world: World) -> None:
    first = await world.running()
    before = append_to(first, *[lines(1)] * 9)
    await world.output.append([before])
    dropped = await world.output.trim(first.lease, Source.STDOUT, head_bytes=30, tail_bytes=30)
    assert dropped == 30
    end = following(before, again_chunk(), outcome=AGAIN)
    assert await _state(world, end) is AppendState.APPLIED
    [second] = await _claim(world)
    assert second.dropped_bytes == 0
    stored = await world.log(second.lease.command)
    await world.output.append([append_to(second, *[lines(1)] * 7)])
    dropped = await world.output.trim(second.lease, Source.STDOUT, head_bytes=30, tail_bytes=30)
    assert dropped == 10
    log = await world.log(second.lease.command)
    assert log[: len(stored)] == stored
    assert [chunk.is_gap for chunk in log[len(stored) :]] == [False] * 3 + [True] + [False] * 3
    command = await world.commands.get(second.lease.command)
    assert command is not None
    assert (command.dropped_bytes, command.truncated) == (10, True)


# Races that only PostgreSQL can show

CANCEL = "update commands set cancel_requested_at = now() where id = %s"
HOLD_APPENDS = """
create function hold_appends() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock(4712);
    return null;
end
$$;
create trigger hold before update on commands for each statement execute function hold_appends();
"""


async def test_a_cancel_that_is_not_committed_is_waited_for(real: World, pools: Pools) -> None:
    claimed = await real.running()
    async with held(pools, CANCEL, claimed.lease.command):
        assert await _state(real, _ends(claimed)) is AppendState.LOCKED
    assert await _state(real, _ends(claimed)) is AppendState.REFUSED


async def test_a_cancel_that_commits_after_the_snapshot_is_heeded(
    real: World, pools: Pools
) -> None:
    claimed = await real.running()
    command = claimed.lease.command
    done: list[AppendState] = []

    async def append() -> None:
        done.append(await _state(real, _ends(claimed)))

    async with pools.requests.connection() as connection:
        await connection.execute(HOLD_APPENDS)
    async with pools.requests.connection() as gate:
        await gate.execute("select pg_advisory_lock(4712)")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(append)
            await until_blocked(pools)
            await gate.execute("set session_replication_role = replica")
            await gate.execute(CANCEL, (_uuid(command),))
            await gate.execute("set session_replication_role = origin")
            await gate.execute("select pg_advisory_unlock(4712)")
    assert done == [AppendState.REFUSED]


def _uuid(command: CommandId) -> str:
    return command.removeprefix("cmd_")


async def test_a_cancel_waits_for_queueing_again_and_is_not_lost(real: World, pools: Pools) -> None:
    """The end of the attempt came first and is not committed: the cancel finds a queued command,
    or asks again."""
    claimed = await real.running()
    again = "update commands set status = 'queued', attempt_seq = last_seq where id = %s"
    async with trio.open_nursery() as nursery, held(pools, again, claimed.lease.command):
        nursery.start_soon(real.commands.request_cancel, claimed.lease.command, ACTOR)
        await until_blocked(pools)
    command = await real.commands.get(claimed.lease.command)
    assert command is not None
    assert command.status is Status.CANCELLED


@pytest.mark.parametrize("lease_id", [0, 1 << 40])
async def test_another_lease_queues_nothing_again(world: World, lease_id: int) -> None:
    claimed = await world.running()
    end = _ends(claimed)
    other = Append(
        lease=Lease(command=claimed.lease.command, id=lease_id),
        start=end.start,
        start_seq=end.start_seq,
        end=end.end,
        chunks=end.chunks,
        outcome=end.outcome,
    )
    assert await _state(world, other) is AppendState.STALE
