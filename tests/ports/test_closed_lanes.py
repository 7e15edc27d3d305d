"""Claims that pass by projects: those keep their place, and nobody waits behind them."""

import random
from collections.abc import Collection

import pytest

from rdev.domain.commands import Kind, LaneClass
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from tests.fakes.store import StoreState
from tests.ports.conftest import REACH, World, fake_world_on


async def claim(
    world: World, limit: int, closed: Collection[str] = (), touched: Collection[str] = ()
) -> list[CommandId]:
    """One claim; `touched` names projects whose shells are."""
    found = await world.lanes.claim(
        reach=REACH,
        instance="boot-1",
        holder="one",
        limit=limit,
        touched=[Lane(project=ProjectId(one), lane_class=LaneClass.WORK) for one in touched],
        closed=[ProjectId(one) for one in closed],
    )
    return [one.lease.command for one in found.claimed]


async def test_a_closed_project_is_passed_by_and_keeps_its_place(world: World) -> None:
    for name in ("bad", "good"):
        await world.project(name)
    shell, agent = await world.queued("bad"), await world.queued("bad", kind=Kind.GIT)
    first = await world.queued("good")
    assert await claim(world, 10, closed=["bad"]) == [first]
    assert await claim(world, 10, closed=["bad"]) == []
    await world.queued("good")
    assert await claim(world, 2) == [shell, agent]


async def test_closed_lanes_do_not_fill_a_claim(world: World) -> None:
    """However many stand before the open one."""
    closed = [f"bad-{number}" for number in range(12)]
    for name in closed:
        await world.project(name)
        await world.queued(name)
    await world.project("good")
    command = await world.queued("good")
    assert await claim(world, 1, closed=closed) == [command]
    assert await claim(world, 1, closed=closed[1:]) != []


async def test_what_is_queued_in_a_closed_project_is_there_when_it_opens(world: World) -> None:
    """Its lane is touched by a claim that passes it by, with what is open and without."""
    for name in ("bad", "good"):
        await world.project(name)
    new = world.new("bad")
    await world.commands.insert(new)
    other = await world.queued("good")
    assert await claim(world, 1, closed=["bad"], touched=["bad"]) == [other]
    assert await claim(world, 1) == [new.id]
    late = world.new("bad")
    await world.commands.insert(late)
    assert await claim(world, 1, closed=["bad"], touched=["bad"]) == []
    assert await claim(world, 1) == [late.id]


async def test_what_expired_in_a_closed_project_is_in_nobodys_way(world: World) -> None:
    for name in ("bad", "good"):
        await world.project(name)
    await world.queued("bad", expires_in_s=0)
    waiting = await world.queued("bad")
    other = await world.queued("good")
    assert await claim(world, 1, closed=["bad"], touched=["bad"]) == [other]
    await world.lanes.expire(holder="one", limit=10)
    assert await claim(world, 1) == [waiting]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_closed_the_open_ones_are_served_in_their_order(
    real: World, seed: int
) -> None:
    """The same requests to PostgreSQL and to the fake, which sorts."""
    chance = random.Random(seed)
    fake = fake_world_on(StoreState())
    names = [f"project-{number}" for number in range(6)]
    for name in names:
        await real.project(name)
        await fake.project(name)
    for _ in range(60):
        closed = chance.sample(names, chance.randrange(5))
        for _ in range(chance.randrange(4)):
            name = chance.choice(names)
            for world in (real, fake):
                await world.commands.insert(world.new(name))
                await world.lanes.repair(reach=REACH)
        limit = chance.randrange(1, 5)
        found = [set(await claim(world, limit, closed)) for world in (real, fake)]
        assert found[0] == found[1]


async def test_what_others_left_in_a_closed_project_stays_for_the_next_take_over(
    world: World,
) -> None:
    """It is not leased, and nothing says that it was taken over."""
    for name in ("bad", "good"):
        await world.project(name)
        await world.queued(name)
    held = await world.claim()
    await world.leases.release([one.lease for one in held])

    async def take_over(*closed: str) -> list[str]:
        names = [ProjectId(one) for one in closed]
        found = await world.leases.take_over(reach=REACH, holder="two", limit=10, closed=names)
        return [one.project for one in found]

    assert await take_over("bad", "good") == []
    assert await take_over("bad") == ["good"]
    assert await take_over("bad") == []
    assert await take_over() == ["bad"]
