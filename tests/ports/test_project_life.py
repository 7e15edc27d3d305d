"""Every sentence of `ProjectLife` (`ports/project_life.py`), on PostgreSQL."""

import math
from dataclasses import replace
from typing import cast

import pytest
import trio

from rdev.adapters.postgres.project_life import PostgresProjectLife
from rdev.domain.commands import Claimed, Kind, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import KillReport
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.projects import Project, ProjectDefinition, Wanted
from rdev.ports.project_life import Asked, ProjectLife, Tried
from tests.fakes.project_life import FakeProjectLife
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, REACH, Pools, World, append_to, last_chunk

_RECORD = """
select action, actor, target, detail from audit_entries where project = 'demo' order by id
"""
_EVENTS = "select status, detail from events where command_id is null order by xid, position"


@pytest.fixture
async def life(pools: Pools, real: World) -> ProjectLife:
    await real.project()
    return PostgresProjectLife(pool=pools.requests, holder="one")


async def ask(life: ProjectLife, wanted: Wanted, *, force: bool = False) -> Asked:
    return await life.want(PROJECT, wanted, ACTOR, force=force, status="stopped")


async def stored(real: World) -> Project:
    found = await real.projects.get(PROJECT)
    assert found is not None
    return found


async def actions(pools: Pools) -> list[str]:
    async with pools.requests.connection() as connection:
        return [row[0] for row in await (await connection.execute(_RECORD)).fetchall()]


async def claimed(real: World) -> list[CommandId]:
    return [one.lease.command for one in await real.claim()]


async def run(life: ProjectLife, real: World) -> None:
    """Let it run, as the keeper does."""
    await ask(life, Wanted.RUNNING)
    assert await claimed(real) == []
    assert await life.settle(await stored(real))
    await real.lanes.repair(reach=REACH)


async def finish(real: World, one: Claimed, outcome: Outcome) -> None:
    await real.output.append([append_to(one, last_chunk(outcome), outcome=outcome)])


async def test_what_is_asked_is_stored_with_its_record(
    life: ProjectLife, real: World, pools: Pools
) -> None:
    assert await ask(life, Wanted.STOPPED) is Asked.CHANGED
    project = await stored(real)
    assert (project.wanted, project.is_settled) == (Wanted.STOPPED, False)
    assert await ask(life, Wanted.STOPPED) is Asked.UNCHANGED
    assert await ask(life, Wanted.RUNNING) is Asked.CHANGED
    assert await ask(life, Wanted.RUNNING) is Asked.CHANGED
    assert await actions(pools) == [
        "project.created",
        "project.stopped",
        "project.started",
        "project.started",
    ]
    async with pools.requests.connection() as connection:
        events = await (await connection.execute(_EVENTS)).fetchall()
    assert [(status, detail["wanted"]) for status, detail in events] == [
        ("stopped", "stopped"),
        ("stopped", "running"),
        ("stopped", "running"),
    ]


async def test_an_unknown_project_is_nobodys(life: ProjectLife) -> None:
    asked = await life.want(ProjectId("no"), Wanted.STOPPED, ACTOR, force=True, status="stopped")
    assert asked is Asked.UNKNOWN


@pytest.mark.parametrize("wanted", [Wanted.STOPPED, Wanted.DELETED])
async def test_while_a_command_runs_it_takes_force(
    life: ProjectLife, real: World, wanted: Wanted
) -> None:
    claimed = await real.running()
    assert await ask(life, wanted) is Asked.BUSY
    assert (await stored(real)).wanted is Wanted.RUNNING
    assert await ask(life, wanted, force=True) is Asked.CHANGED
    assert await life.ask_running_to_end(PROJECT) == [claimed.lease.command]
    assert await life.ask_running_to_end(PROJECT) == [claimed.lease.command]
    record = await real.record()
    assert [one.action for one in record.entries].count("command.cancel_requested") == 1


async def test_a_stopped_project_keeps_its_commands_and_runs_none(
    life: ProjectLife, real: World
) -> None:
    before = await real.queued()
    await ask(life, Wanted.STOPPED)
    behind = await real.queued(kind=Kind.GIT)
    assert await claimed(real) == []
    await run(life, real)
    assert set(await claimed(real)) == {before, behind}


async def test_what_a_kill_left_keeps_a_started_project_closed_and_a_stopped_one_too(
    life: ProjectLife, real: World
) -> None:
    """Whichever ends first: its lanes open when neither is a reason."""
    one = await real.running()
    outcome = Outcome(status=Status.CANCELLED, kill=KillReport(confirmed=False, survivors=(7,)))
    await finish(real, one, outcome)
    await real.queued()
    await ask(life, Wanted.STOPPED)
    await run(life, real)
    assert await claimed(real) == []
    await ask(life, Wanted.STOPPED)
    async with real.upkeep.place_turn(REACH) as places:
        assert places is not None
        await places.confirm_kill(one.lease.command)
    await real.lanes.repair(reach=REACH)
    assert await claimed(real) == []
    await run(life, real)
    assert len(await claimed(real)) == 1


async def test_a_project_that_is_being_deleted_takes_nothing_and_cannot_be_kept(
    life: ProjectLife, real: World
) -> None:
    await ask(life, Wanted.DELETED)
    with pytest.raises(RdevError) as caught:
        await real.commands.insert(real.new())
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert await ask(life, Wanted.RUNNING) is Asked.DELETING
    assert await ask(life, Wanted.STOPPED) is Asked.DELETING
    assert await ask(life, Wanted.DELETED) is Asked.UNCHANGED
    with pytest.raises(RdevError) as caught:
        await real.project()
    assert caught.value.code is ErrorCode.CONFLICT


async def test_what_waits_in_a_deleted_project_ends_with_its_record(
    life: ProjectLife, real: World
) -> None:
    commands = [await real.queued() for _ in range(5)]
    await ask(life, Wanted.DELETED)
    project = await stored(real)
    assert not await life.remove(project)
    ended = await life.end_queued(PROJECT, limit=3)
    ended += await life.end_queued(PROJECT, limit=3)
    assert sorted(ended) == commands
    assert await life.end_queued(PROJECT, limit=3) == []
    for command in commands:
        found = await real.commands.get(command)
        assert found is not None
        assert (found.status, found.reason) == (Status.CANCELLED, "project_deleted")
        chunks = await real.output.read(command, after=0, limit_bytes=10_000)
        assert b'"reason":"project_deleted"' in chunks[-1].payload
        assert chunks[-1].last_seq == found.last_seq
    record = await real.record()
    assert [one.action for one in record.entries].count("command.cancelled") == 5
    assert await life.remove(project)


async def test_a_project_goes_when_nothing_of_it_runs_and_its_commands_stay(
    life: ProjectLife, real: World, pools: Pools
) -> None:
    one = await real.running()
    await ask(life, Wanted.DELETED, force=True)
    project = await stored(real)
    assert not await life.remove(project)
    outcome = Outcome(status=Status.CANCELLED, kill=KillReport(confirmed=False, survivors=(7,)))
    await finish(real, one, outcome)
    assert await life.remove(project)
    assert await life.remove(project)
    assert await real.projects.get(PROJECT) is None
    found = await real.commands.get(one.lease.command)
    assert found is not None
    assert found.kill == KillReport(confirmed=True)
    assert (await actions(pools))[-1] == "project.removed"
    await real.project()
    assert (await stored(real)).uid != project.uid


async def test_a_late_removal_does_not_touch_a_successor(life: ProjectLife, real: World) -> None:
    await ask(life, Wanted.DELETED)
    first = await stored(real)
    await life.remove(first)
    await real.project()
    await ask(life, Wanted.DELETED)
    assert await life.remove(first)
    assert await real.projects.get(PROJECT) is not None
    assert not await life.is_stored(first)
    assert await life.is_stored(await stored(real))


async def test_who_acted_for_what_is_no_longer_wanted_leaves_it_unsettled(
    life: ProjectLife, real: World
) -> None:
    await ask(life, Wanted.STOPPED)
    stopping = await stored(real)
    await ask(life, Wanted.RUNNING)
    starting = await stored(real)
    assert await life.settle(starting)
    assert not await life.settle(stopping)
    assert [one.id for one in await life.unsettled(reach=REACH, tried=(), limit=10)] == [PROJECT]
    assert await life.settle(starting)
    assert await life.unsettled(reach=REACH, tried=(), limit=10) == []


@pytest.fixture(params=["real", "fake"])
def wishes(request: pytest.FixtureRequest, life: ProjectLife) -> ProjectLife:
    return life if request.param == "real" else cast("ProjectLife", FakeProjectLife(reach=REACH))


async def wished(wishes: ProjectLife, real: World, *names: str) -> dict[str, Project]:
    """Projects that are to be stopped, asked for in this order, as they are found."""
    for name in names:
        if isinstance(wishes, PostgresProjectLife):
            await real.project(ProjectId(name))
        await wishes.want(ProjectId(name), Wanted.STOPPED, ACTOR, force=False, status="stopped")
    return {one.id: one for one in await wishes.unsettled(reach=REACH, tried=(), limit=100)}


def tried(project: Project, wait_s: float, *, in_hand: bool = False) -> Tried:
    wanted_at = None if in_hand else project.wanted_at
    return Tried(project=project.id, wanted_at=wanted_at, wait_s=wait_s)


async def test_what_was_not_tried_comes_first_and_then_who_is_due_the_longest(
    wishes: ProjectLife, real: World
) -> None:
    found = await wished(wishes, real, "c", "e", "a", "b", "d")
    assert list(found) == ["c", "e", "a", "b", "d"]

    async def due(*tried: Tried, limit: int = 100) -> list[str]:
        rows = await wishes.unsettled(reach=REACH, tried=tried, limit=limit)
        return [one.id for one in rows]

    waits = tried(found["c"], 0.5), tried(found["e"], -1.0), tried(found["a"], -2.0)
    assert await due(*waits) == ["b", "d", "a", "e"]
    assert await due(*waits, limit=3) == ["b", "d", "a"]
    assert await due(*waits, tried(found["b"], math.inf, in_hand=True)) == ["d", "a", "e"]
    # Another wish was not tried, unless the project is in hand.
    for name in ("c", "b"):
        await wishes.want(ProjectId(name), Wanted.RUNNING, ACTOR, force=False, status="pending")
    assert await due(*waits, tried(found["b"], math.inf, in_hand=True)) == ["d", "c", "a", "e"]
    assert await wishes.unsettled(reach="elsewhere", tried=(), limit=100) == []
    for one in await wishes.unsettled(reach=REACH, tried=(), limit=100):
        await wishes.settle(one)
    assert await due() == []


async def test_a_trouble_is_kept_until_it_is_settled(life: ProjectLife, real: World) -> None:
    await ask(life, Wanted.STOPPED)
    project = await stored(real)
    await life.note(project, "the cluster is away " * 50)
    trouble = (await stored(real)).trouble
    assert trouble is not None
    assert len(trouble) == 200
    await life.note(replace(project, wanted_at=None), "of another wish")
    assert (await stored(real)).trouble == trouble
    await life.settle(project)
    assert (await stored(real)).trouble is None


async def test_what_was_found_is_adopted_once_and_can_only_be_deleted(
    life: ProjectLife, real: World
) -> None:
    found = ProjectId("found")
    assert await life.missing([PROJECT, found]) == [found]
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(_adopt, life, found)
    assert await life.missing([PROJECT, found]) == []
    project = await real.projects.get(found)
    assert project is not None
    assert project.is_adopted
    assert await life.want(found, Wanted.STOPPED, ACTOR, force=False, status="s") is Asked.ADOPTED
    assert await life.want(found, Wanted.DELETED, ACTOR, force=False, status="s") is Asked.CHANGED
    await real.queued()


async def _adopt(life: ProjectLife, project: ProjectId) -> None:
    await life.adopt(project, executor="kubernetes", reach=REACH, image="busybox")


async def test_a_request_that_is_refused_after_all_keeps_no_key(
    life: ProjectLife, real: World
) -> None:
    key = Idempotency(key_id="key_admin", key="once", digest=b"d" * 32)
    definition = ProjectDefinition(id=ProjectId("new"))
    made = await real.projects.insert(
        definition, ACTOR, executor="k", reach=REACH, is_settled=False, idempotency=key
    )
    assert not made.project.is_settled
    await life.withdraw(made.project, key)
    assert await real.projects.replay(key) is None
    (project,) = await life.unsettled(reach=REACH, tried=(), limit=10)
    assert (project.id, project.wanted) == ("new", Wanted.DELETED)
    assert await life.remove(project)


async def test_a_stop_and_a_claim_at_once_never_leave_a_command_running_in_a_stopped_project(
    life: ProjectLife, real: World
) -> None:
    """Whoever comes first: either nothing was begun, or the stop is refused."""
    for _ in range(20):
        await real.queued()
        asked: list[Asked] = []
        begun: list[Claimed] = []

        async def stop(asked: list[Asked] = asked) -> None:
            asked.append(await ask(life, Wanted.STOPPED))

        async def claim(begun: list[Claimed] = begun) -> None:
            begun += await real.claim()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim)
            nursery.start_soon(stop)
        assert asked == [Asked.BUSY if begun else Asked.CHANGED]
        assert (await stored(real)).running == len(begun)
        await run(life, real)
        for one in begun or await real.claim():
            await finish(real, one, Outcome(status=Status.SUCCEEDED, exit_code=0))


async def test_a_doubt_unsettles_what_something_else_was_wanted_of_and_nothing_more(
    life: ProjectLife, real: World
) -> None:
    await ask(life, Wanted.STOPPED)
    stopping = await stored(real)
    await ask(life, Wanted.RUNNING)
    starting = await stored(real)
    assert await life.settle(starting)
    await life.doubt(starting)
    await life.doubt(replace(stopping, uid="00000000-0000-4000-8000-000000000000"))
    assert await life.unsettled(reach=REACH, tried=(), limit=10) == []
    await life.doubt(stopping)
    assert [one.id for one in await life.unsettled(reach=REACH, tried=(), limit=10)] == [PROJECT]
