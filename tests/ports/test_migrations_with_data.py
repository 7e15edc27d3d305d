"""The queue's migrations back and forth while there is something in the tables."""

import pytest
import trio

from rdev.adapters.postgres import migrate
from rdev.adapters.postgres.connection import open_connection
from rdev.domain.commands import Outcome, Retry, Status
from rdev.domain.execution import KillReport
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, REACH, Pools, World, again_chunk, append_to, last_chunk
from tests.ports.test_lane_interleavings import inside


async def back_and_forth(pools: Pools, version: str) -> None:
    """From the newest back to before the one named, and up again."""

    def run() -> None:
        dsn = pools.settings.dsn
        steps = sum(one.version >= version for one in migrate.status(dsn))
        migrate.down(dsn, steps)
        migrate.up(dsn)

    await trio.to_thread.run_sync(run)


@pytest.mark.parametrize("version", ["0016", "0012", "0006", "0005", "0004", "0003", "0002"])
async def test_what_was_queued_is_served_after_a_way_back_and_forth(
    real: World, pools: Pools, version: str
) -> None:
    await real.project()
    again = real.new(retry=Retry.SAFE)
    await real.commands.insert(again)
    await real.lanes.repair(reach=REACH)
    [claimed] = await real.claim()
    outcome = Outcome(status=Status.QUEUED)
    await real.output.append([append_to(claimed, again_chunk(), outcome=outcome)])
    running = await real.running()
    waiting = await real.queued()
    await back_and_forth(pools, version)
    async with await open_connection(pools.settings) as connection:
        await connection.set_autocommit(True)
        world = inside(connection, real)
        await world.lanes.repair(reach=REACH)
        claimed_now = [one.lease.command for one in await world.claim()]
        assert set(claimed_now) <= {again.id, waiting, running.lease.command}
        assert waiting in claimed_now
        beat = await world.leases.heartbeat([running.lease])
        assert beat.stale == frozenset()


async def test_what_a_kill_had_left_before_closes_its_project(real: World, pools: Pools) -> None:
    """Stored by a build that did not close projects."""
    claimed = await real.running()
    kill = KillReport(confirmed=False, survivors=(7, 8))
    outcome = Outcome(status=Status.CANCELLED, reason="cancelled", kill=kill)
    await real.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
    await real.queued()
    await back_and_forth(pools, "0006")
    async with await open_connection(pools.settings) as connection:
        await connection.set_autocommit(True)
        world = inside(connection, real)
        await world.lanes.repair(reach=REACH)
        assert await world.claim() == []
        row = await (await connection.execute("select status from projects")).fetchone()
        assert row == ("failed",)


async def test_a_column_that_comes_while_a_server_serves_disturbs_nobody(
    real: World, pools: Pools
) -> None:
    """The release before serves on while the next one's migration runs. Often enough that every
    statement is prepared, on connections that stay open."""
    await real.project()

    async def use() -> None:
        for _ in range(8):
            (new, cancelled) = (real.new(), real.new())
            await real.commands.insert(new)
            await real.lanes.repair(reach=REACH)
            (claimed,) = await real.claim()
            claimed = await real.taken_over(claimed)
            assert (await real.leases.heartbeat([claimed.lease])).stale == frozenset()
            outcome = Outcome(status=Status.SUCCEEDED)
            await real.output.append([append_to(claimed, last_chunk(outcome), outcome=outcome)])
            await real.commands.insert(cancelled)
            assert await real.commands.request_cancel(cancelled.id, ACTOR) is not None
            assert await real.commands.get(new.id) is not None
            await real.commands.list_for_project(
                PROJECT, status=None, kind=None, before=None, limit=2
            )

    await use()
    async with pools.requests.connection() as connection:
        await connection.execute("alter table commands add column later text")
    await use()


async def test_the_column_of_traces_is_added_in_an_instant(real: World, pools: Pools) -> None:
    """A table that is not written anew keeps its file."""
    await real.project()
    await real.queued()

    async def file() -> tuple[object, ...] | None:
        async with pools.requests.connection() as connection:
            found = await connection.execute("select pg_relation_filenode('commands')")
            return await found.fetchone()

    before = await file()
    await back_and_forth(pools, "0016")
    assert await file() == before
