"""The order of lanes in the stores: the domain's functions, its bounds, and turns under a flood."""

import random
from collections.abc import Sequence
from uuid import UUID

import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row
from trio.testing import MockClock

from rdev.domain.commands import LANE_CAP, Kind, LaneClass, Outcome, Priority, Status
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.lanes import AGE_STEP_S, Lane, due, rank
from tests.fakes.store import ACTOR, Row, StoreState
from tests.ports.conftest import REACH, Pools, World, append_to, fake_world_on, last_chunk

PROJECTS = ("a", "b", "c")
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "serve", "serve", "end", "cancel", "crash"]),
        st.sampled_from(PROJECTS),
        st.sampled_from([Kind.SHELL, Kind.GIT]),
        st.sampled_from(list(Priority)),
        st.sampled_from([0.0, 0.0, 0.5, 7.0, 29.0, 40.0]),
    ),
    min_size=5,
    max_size=40,
)
Action = tuple[str, str, Kind, Priority, float]
WORK = LaneClass.WORK
LANES = [Lane(project=ProjectId(name), lane_class=one) for name in PROJECTS for one in LaneClass]
SUCCEEDED = Outcome(status=Status.SUCCEEDED, exit_code=0)


@pytest.mark.slow
@settings(max_examples=1_000, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(ACTIONS)
def test_the_fake_keeps_the_bounds_and_loses_no_lane(actions: list[Action]) -> None:
    trio.run(_act, actions, clock=MockClock())


async def _act(actions: list[Action]) -> None:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    state = StoreState()
    world = fake_world_on(state)
    running = []
    for name in PROJECTS:
        await world.project(name)
    for action, project, kind, priority, later_s in actions:
        clock.jump(later_s)
        match action:
            case "submit":
                await world.queued(project, kind=kind, priority=priority)
            case "crash":  # between the commit and the touch
                await world.commands.insert(world.new(project, kind=kind, priority=priority))
                await world.lanes.repair(reach=REACH)
            case "cancel":
                if queued := state.queued(Lane(project=ProjectId(project), lane_class=WORK)):
                    await world.commands.request_cancel(queued[0].command.id, ACTOR)
                    await world.lanes.touch([queued[0].lane])
            case "end" if running:
                claimed = running.pop(0)
                await world.output.append(
                    [append_to(claimed, last_chunk(SUCCEEDED), outcome=SUCCEEDED)]
                )
                await world.lanes.touch([state.rows[claimed.lease.command].lane])
            case "serve":
                running += await _serve(state, world)
        _check_lanes(state)


async def _serve(state: StoreState, world: World) -> list:  # type: ignore[type-arg]
    """Claim one, and hold it against the bounds: whom may it have overtaken?"""
    last_starts = {lane: row.last_start for lane, row in state.lanes.items()}
    heads = {
        lane: queued[0]
        for lane in state.lanes
        if (queued := state.queued(lane)) and state.has_room(lane)
    }
    waiting = {lane: state.queued(lane) for lane in heads}
    found = await world.lanes.claim(reach=REACH, instance="boot-1", holder="one", limit=1)
    assert len(found.claimed) == min(1, len(heads))
    for one in found.claimed:
        row = state.rows[one.lease.command]
        assert row is heads[row.lane]
        for other in waiting[row.lane]:
            assert _accepted_s(row) - _accepted_s(other) <= _aged_s(row, other)
        for lane, head in heads.items():
            since_s = max(_accepted_s(head), last_starts[lane])
            assert lane == row.lane or last_starts[row.lane] - _aged_s(row, head) <= since_s
    return found.claimed


def _accepted_s(row: Row) -> float:
    return row.rank + row.new.priority.level * AGE_STEP_S


def _aged_s(row: Row, other: Row) -> float:
    return (row.new.priority.level - other.new.priority.level) * AGE_STEP_S + 1e-6


def _check_lanes(state: StoreState) -> None:
    """Caps hold, and whoever can be served is due, not too late."""
    for lane, row in state.lanes.items():
        rows = [one for one in state.rows.values() if one.lane == lane]
        assert sum(one.command.status == "running" for one in rows) <= row.cap
        if (queued := state.queued(lane)) and state.has_room(lane):
            exact = due(
                head_rank=queued[0].rank,
                head_level=queued[0].new.priority.level,
                last_start_s=row.last_start,
            )
            assert row.due is not None
            assert row.due <= exact


@pytest.mark.parametrize("kind", [Kind.SHELL, Kind.GIT])
async def test_a_flood_costs_another_project_one_turn_of_each_lane(
    world: World, kind: Kind
) -> None:
    """Two noisy projects with much more waiting than can run; each end is touched."""
    for name in ("noisy", "loud", "quiet"):
        await world.project(name)
    noisy = [await world.queued(name, kind=kind) for name in ("noisy", "loud") for _ in range(12)]
    for _ in range(6):
        await _serve_and_end(world)
    command = await world.queued("quiet", kind=kind)
    turns: list[CommandId] = []
    while command not in turns:
        turns += await _serve_and_end(world)
    assert set(turns[:-1]) <= set(noisy)
    assert len(turns) <= 3


async def _serve_and_end(world: World) -> Sequence[CommandId]:
    """One claim of one lane; what it took ends at once."""
    found = await world.lanes.claim(reach=REACH, instance="boot-1", holder="one", limit=1)
    for one in found.claimed:
        await world.output.append([append_to(one, last_chunk(SUCCEEDED), outcome=SUCCEEDED)])
        lane_class = LaneClass.WORK if one.kind is Kind.SHELL else LaneClass.AGENT
        await world.lanes.touch([Lane(project=one.project, lane_class=lane_class)])
    return [one.lease.command for one in found.claimed]


async def test_the_arithmetic_of_postgresql_is_the_domains(real: World, pools: Pools) -> None:
    chance = random.Random(3)
    query = "select lane_due(%s, %s, %s, %s)"
    async with pools.requests.connection() as connection:
        for _ in range(200):
            head, start = chance.uniform(-1e9, 2e9), chance.uniform(0, 2e9)
            level = chance.randrange(3)
            cursor = await connection.execute(query, (head, start, level, AGE_STEP_S))
            expected = due(head_rank=head, head_level=level, last_start_s=start)
            assert await cursor.fetchone() == (expected,)
        await real.project()
        for priority in Priority:
            await real.queued(priority=priority)
        cursor = await connection.execute(
            "select rank, extract(epoch from created_at)::float8, level from commands"
        )
        for stored, created_at_s, level in await cursor.fetchall():
            # The rank is drawn within the statement that began at created_at.
            assert 0 <= stored - rank(accepted_at_s=created_at_s, level=level) < 60


async def test_postgresql_serves_what_the_domain_would(real: World, pools: Pools) -> None:
    """Random ages, levels and starts: each claim takes the head of the lane that stands first."""
    chance = random.Random(11)
    for name in PROJECTS:
        await real.project(name)
        for kind in (Kind.SHELL, Kind.GIT):
            for _ in range(8):
                await real.queued(name, kind=kind, priority=chance.choice(list(Priority)))
    async with pools.requests.connection() as connection:
        await connection.execute("update commands set rank = rank - random() * 100")
        await connection.execute(
            "update lanes set last_start = extract(epoch from now()) - random() * 100"
        )
    await real.lanes.touch(LANES)
    served = 0
    touched: list[Lane] = []
    while (expected := await _first(pools)) is not None:
        found = await real.lanes.claim(
            reach=REACH, instance=None, holder="one", limit=1, touched=touched
        )
        assert [one.lease.command for one in found.claimed] == [expected]
        served += 1
        touched = []
        if served % 3 == 0 and (gone := await _first(pools)) is not None:
            await real.commands.request_cancel(gone, ACTOR)
            if served % 2:
                await real.lanes.touch(LANES)
            else:
                touched = LANES
    assert served == len(PROJECTS) * sum(LANE_CAP.values())
    found = await real.lanes.claim(reach=REACH, instance=None, holder="one", limit=1)
    assert found.claimed == []


async def _first(pools: Pools) -> CommandId | None:
    """Whom the domain's functions would serve, from the rows alone."""
    async with pools.requests.connection() as connection:
        cursor = connection.cursor(row_factory=dict_row)
        commands = await (await cursor.execute("select * from commands")).fetchall()
        lanes = await (await cursor.execute("select * from lanes")).fetchall()
    best: tuple[float, UUID] | None = None
    for lane in lanes:
        key = (lane["project"], lane["lane_class"])
        mine = [row for row in commands if (row["project"], row["lane_class"]) == key]
        queued = [row for row in mine if row["status"] == "queued"]
        if not queued or sum(row["status"] == "running" for row in mine) >= lane["cap"]:
            continue
        head = min(queued, key=lambda row: (row["rank"], row["id"]))
        stands_at = due(
            head_rank=head["rank"], head_level=head["level"], last_start_s=lane["last_start"]
        )
        best = min(best or (stands_at, head["id"]), (stands_at, head["id"]))
    return None if best is None else command_id(best[1])
