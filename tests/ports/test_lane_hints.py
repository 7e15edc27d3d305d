"""Lanes whose hint is wrong when a claim touches them: nobody waits for a tick because of it."""

from collections.abc import Sequence

import pytest
import trio

from rdev.domain.commands import Claimed, Kind, LaneClass
from rdev.domain.ids import ProjectId
from rdev.domain.lanes import Lane
from tests.fakes.store import ACTOR
from tests.ports.conftest import REACH, Pools, World
from tests.ports.test_interleavings import held, until_blocked

CANCEL = "update commands set status = 'cancelled', spec = null where id = %s"


def lane_of(project: str, lane_class: LaneClass = LaneClass.WORK) -> Lane:
    return Lane(project=ProjectId(project), lane_class=lane_class)


async def claim(world: World, limit: int, touched: Sequence[Lane]) -> list[Claimed]:
    """One claim, as a server's."""
    found = await world.lanes.claim(
        reach=REACH, instance="boot-1", holder="one", limit=limit, touched=touched
    )
    return found.claimed


@pytest.mark.parametrize("expires_in_s", [None, 3_600])
async def test_a_touched_lane_that_stood_too_early_makes_way(
    world: World, expires_in_s: int | None
) -> None:
    """Its head was cancelled and another one waits, behind what waits elsewhere."""
    for name in ("first", "second"):
        await world.project(name)
    gone = await world.queued("first")
    waiting = await world.queued("second")
    await world.queued("first", expires_in_s=expires_in_s)
    await world.commands.request_cancel(gone, ACTOR)
    claimed = await claim(world, 1, [lane_of("first")])
    assert [one.lease.command for one in claimed] == [waiting]


async def test_a_touched_lane_with_nothing_queued_makes_way(world: World) -> None:
    for name in ("first", "second"):
        await world.project(name)
    gone = await world.queued("first")
    waiting = await world.queued("second")
    await world.commands.request_cancel(gone, ACTOR)
    claimed = await claim(world, 1, [lane_of("first")])
    assert [one.lease.command for one in claimed] == [waiting]


async def test_a_parked_lane_whose_head_is_cancelled_meanwhile_is_looked_at_again(
    real: World, pools: Pools
) -> None:
    """Nobody had touched it before, so it stands nowhere in the order of lanes."""
    await real.project()
    cancelled, following = real.new(kind=Kind.GIT), real.new(kind=Kind.GIT)
    for new in (cancelled, following):
        await real.commands.insert(new)
    taken: list[Claimed] = []

    async def claim_touched() -> None:
        taken.extend(await claim(real, 10, [lane_of("demo", LaneClass.AGENT)]))

    async with trio.open_nursery() as nursery, held(pools, CANCEL, cancelled.id):
        nursery.start_soon(claim_touched)
        await until_blocked(pools)
    assert [one.lease.command for one in taken] == [following.id]


async def test_a_claim_that_waited_for_a_touched_lane_finds_what_it_has_become(
    real: World, pools: Pools
) -> None:
    """The lane's row has moved while the claim waited for its lock."""
    await real.project()
    command = await real.queued()
    taken: list[Claimed] = []

    async def claim_touched() -> None:
        taken.extend(await claim(real, 10, [lane_of("demo")]))

    move = (
        "update lanes set due = null, last_start = 1 "
        "where project = (select project from commands where id = %s)"
    )
    async with trio.open_nursery() as nursery, held(pools, move, command):
        nursery.start_soon(claim_touched)
        await until_blocked(pools)
    assert [one.lease.command for one in taken] == [command]
