"""Two writers of one command's row, each held before its commit, in both orders.

Only PostgreSQL can show these: a fake has no statement that began before another one committed.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio

from rdev.adapters.postgres.connection import open_connection
from rdev.domain.commands import Claimed, Kind, Outcome, Status
from rdev.domain.ids import CommandId, command_uuid
from rdev.domain.stream import Source
from rdev.ports.output import AppendState
from tests.fakes.store import ACTOR
from tests.ports.conftest import REACH, Pools, World, append_to, last_chunk, lines

# What other servers do to a row, as they do it; `%s` is the command.
OTHERS = {
    "take over": "update commands set lease_id = nextval('lease_ids'), holder = 'two', "
    "lease_until = now() + interval '1 hour' where id = %s",
    "heartbeat": "update commands set lease_until = now() + interval '1 hour' where id = %s",
    "ask for a cancel": "update commands set cancel_requested_at = now() where id = %s",
    "end": "update commands set status = 'lost', spec = null where id = %s",
}
STILL_OURS = {"heartbeat", "ask for a cancel"}


@asynccontextmanager
async def held(pools: Pools, statement: str, command: CommandId) -> AsyncIterator[None]:
    """Another server's statement, not committed while the block runs, committed at its end."""
    connection = await open_connection(pools.settings)
    try:
        async with connection.transaction():
            await connection.execute(statement, (command_uuid(command),))
            yield
    finally:
        await connection.close()


async def until_blocked(pools: Pools, count: int = 1) -> None:
    """Until so many backends wait for a lock of another one."""
    query = (
        "select count(*) from pg_stat_activity "
        "where wait_event_type = 'Lock' and datname = current_database()"
    )
    with trio.fail_after(60):
        async with pools.requests.connection() as connection:
            while True:
                row = await (await connection.execute(query)).fetchone()
                if row is not None and row[0] >= count:
                    return
                await trio.sleep(0.005)


async def _log_is_whole(world: World, command: CommandId) -> None:
    chunks = await world.log(command)
    assert all(left.last_seq + 1 == right.first_seq for left, right in pairwise(chunks))
    found = await world.commands.get(command)
    assert found is not None
    assert chunks[-1].last_seq == found.last_seq
    raw_bytes = sum(chunk.raw_bytes for chunk in chunks if chunk.source is Source.STDOUT)
    assert raw_bytes == found.stdout_bytes


@pytest.mark.parametrize("other", OTHERS)
async def test_an_append_passes_by_a_row_that_is_being_changed(
    real: World, pools: Pools, other: str
) -> None:
    """The other's statement came first and commits after the append's answer."""
    claimed = await real.running()
    command = claimed.lease.command
    append = append_to(claimed, lines(2))
    async with held(pools, OTHERS[other], command):
        with trio.fail_after(30):
            [result] = await real.output.append([append])
        assert result.state is AppendState.LOCKED
    [result] = await real.output.append([append])
    expected = AppendState.APPLIED if other in STILL_OURS else AppendState.STALE
    assert result.state is expected
    await _log_is_whole(real, command)


SLOW_APPEND = """
create function hold_appends() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock(4711);
    return null;
end
$$;
create trigger hold before update on commands for each statement execute function hold_appends();
"""


@pytest.mark.parametrize("other", OTHERS)
async def test_an_append_that_began_before_a_commit_is_judged_by_the_newest_row(
    real: World, pools: Pools, other: str
) -> None:
    """The append's statement has its snapshot; the other one commits; the append goes on.

    The row is free by then, so it waits for nothing: only the update of the newest version, and
    not what the snapshot saw, can refuse it.
    """
    claimed = await real.running()
    command = claimed.lease.command
    gate = await open_connection(pools.settings)
    done: list[AppendState] = []

    async def append() -> None:
        [result] = await real.output.append([append_to(claimed, lines(2))])
        done.append(result.state)

    async with pools.requests.connection() as connection:
        await connection.execute(SLOW_APPEND)
    await gate.execute("select pg_advisory_lock(4711)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(append)
        await until_blocked(pools)
        # A change that fires no trigger: it is not held up by the gate.
        other_server = await open_connection(pools.settings)
        await other_server.execute("set session_replication_role = replica")
        await other_server.execute(OTHERS[other], (command_uuid(command),))
        await other_server.close()
        await gate.execute("select pg_advisory_unlock(4711)")
    await gate.close()
    expected = AppendState.APPLIED if other in STILL_OURS else AppendState.STALE
    assert done == [expected]
    await _log_is_whole(real, command)


async def test_a_take_over_waits_for_an_append_and_continues_behind_it(
    real: World, pools: Pools
) -> None:
    """The append came first and is not committed: the claim passes by, the next one sees it."""
    claimed = await real.running()
    await real.leases.release([claimed.lease])
    moved = (
        "update commands set out_offset = out_offset + 10, last_seq = last_seq + 1 where id = %s"
    )
    async with held(pools, moved, claimed.lease.command):
        assert await real.claim(holder="two") == []
    [taken] = await real.claim(holder="two")
    assert (taken.offsets.stdout, taken.last_seq) == (10, 3)


async def test_a_heartbeat_waits_for_an_append_and_finds_the_lease_ours(
    real: World, pools: Pools
) -> None:
    claimed = await real.running()
    await _while_held(pools, OTHERS["heartbeat"], claimed, _beat(real, claimed, is_stale=False))


async def test_a_heartbeat_that_waited_for_a_take_over_is_stale(real: World, pools: Pools) -> None:
    claimed = await real.running()
    await _while_held(pools, OTHERS["take over"], claimed, _beat(real, claimed, is_stale=True))


async def test_a_release_that_waited_for_a_take_over_releases_nothing(
    real: World, pools: Pools
) -> None:
    claimed = await real.running()

    async def release() -> None:
        await real.leases.release([claimed.lease])

    await _while_held(pools, OTHERS["take over"], claimed, release)
    assert await real.claim(holder="three") == []


async def test_a_trim_that_waited_for_a_take_over_drops_nothing(real: World, pools: Pools) -> None:
    claimed = await real.running()
    await real.output.append([append_to(claimed, lines(1), lines(1), lines(1))])

    async def trim() -> None:
        dropped = await real.output.trim(claimed.lease, Source.STDOUT, head_bytes=0, tail_bytes=0)
        assert dropped == 0

    await _while_held(pools, OTHERS["take over"], claimed, trim)
    await _log_is_whole(real, claimed.lease.command)


async def test_an_instance_recorded_behind_a_take_over_is_refused(
    real: World, pools: Pools
) -> None:
    await real.project()
    await real.queued()
    found = await real.lanes.claim(reach=REACH, instance=None, holder="one", limit=1)
    [claimed] = found.claimed

    async def record() -> None:
        assert not await real.leases.record_instance(claimed.lease, "boot-1")

    await _while_held(pools, OTHERS["take over"], claimed, record)


async def test_a_claim_that_waited_for_a_cancel_leaves_the_command_alone(
    real: World, pools: Pools
) -> None:
    await real.project()
    cancelled = await real.queued(kind=Kind.GIT)
    following = await real.queued(kind=Kind.GIT)
    taken: list[Claimed] = []

    async def claim() -> None:
        taken.extend(await real.claim())

    end = "update commands set status = 'cancelled', spec = null where id = %s"
    async with trio.open_nursery() as nursery, held(pools, end, cancelled):
        nursery.start_soon(claim)
        await until_blocked(pools)
    assert [one.lease.command for one in taken] == [following]


async def test_a_cancel_that_waited_for_a_claim_is_recorded(real: World, pools: Pools) -> None:
    await real.project()
    command = await real.queued()
    claim = (
        "update commands set status = 'running', attempt = 1, lease_id = 99, "
        "lease_until = now() + interval '1 hour', started_at = now() where id = %s"
    )
    async with trio.open_nursery() as nursery, held(pools, claim, command):
        nursery.start_soon(real.commands.request_cancel, command, ACTOR)
        await until_blocked(pools)
    found = await real.commands.get(command)
    assert found is not None
    assert (found.status, found.last_seq) == (Status.RUNNING, 1)
    async with pools.requests.connection() as connection:
        query = "select cancel_requested_at is not null from commands"
        assert await (await connection.execute(query)).fetchone() == (True,)


async def test_an_end_and_a_take_over_cannot_both_win(real: World, pools: Pools) -> None:
    """Forty rounds of a finish against a take-over at the same time."""
    for _ in range(40):
        claimed = await real.running()
        await real.leases.release([claimed.lease])
        outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
        end = append_to(claimed, last_chunk(outcome), outcome=outcome)
        states: list[AppendState] = []
        taken: list[Claimed] = []

        async def finish(end=end, states=states) -> None:  # type: ignore[no-untyped-def]
            [result] = await real.output.append([end])
            states.append(result.state)

        async def take(taken=taken) -> None:  # type: ignore[no-untyped-def]
            taken.extend(await real.claim(holder="two"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            nursery.start_soon(take)
        found = await real.commands.get(claimed.lease.command)
        assert found is not None
        if taken:
            assert found.status is Status.RUNNING
            assert states[0] in (AppendState.STALE, AppendState.LOCKED)
            other = append_to(taken[0], last_chunk(outcome), outcome=outcome)
            await real.output.append([other])
        elif states[0] is AppendState.APPLIED:
            assert found.status is Status.SUCCEEDED
        else:
            await real.output.append([end])
        await _log_is_whole(real, claimed.lease.command)


async def test_heartbeats_and_appends_of_many_commands_do_not_deadlock(
    real: World, pools: Pools
) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await real.project(name)
        for _ in range(4):
            await real.queued(name)
    claimed = await real.claim(20)
    appended: set[CommandId] = set()

    async def beat() -> None:
        for _ in range(20):
            found = await real.leases.heartbeat([one.lease for one in claimed[::-1]])
            assert found.stale == frozenset()

    async def append() -> None:
        while len(appended) < len(claimed):
            left = [one for one in claimed if one.lease.command not in appended]
            results = await real.output.append([append_to(one, lines(1)) for one in left])
            appended.update(
                result.command for result in results if result.state is AppendState.APPLIED
            )

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            nursery.start_soon(append)
    for one in claimed:
        await _log_is_whole(real, one.lease.command)


def _beat(world: World, claimed: Claimed, *, is_stale: bool) -> Callable[[], Awaitable[None]]:
    async def beat() -> None:
        found = await world.leases.heartbeat([claimed.lease])
        assert found.stale == (frozenset({claimed.lease}) if is_stale else frozenset())

    return beat


async def _while_held(
    pools: Pools, statement: str, claimed: Claimed, do: Callable[[], Awaitable[None]]
) -> None:
    """Start the action while another statement holds the row; it goes on at the commit."""
    async with trio.open_nursery() as nursery, held(pools, statement, claimed.lease.command):
        nursery.start_soon(do)
        await until_blocked(pools)
