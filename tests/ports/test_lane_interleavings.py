"""Every pair of what happens to a lane, in two connections, the first held before its commit.

The second one runs as far as it can while the first is not committed, so it decides on what was
there before; where it waits, it goes on at the commit. Afterwards the lanes must be where a claim
needs them, no cap exceeded, no stale row accepted, every change recorded. Deadlocks need two
statements that are both in the middle: the storm at the end looks for those.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

import pytest
import trio
from psycopg.rows import DictRow, dict_row

from rdev.adapters.postgres.commands import PostgresCommands
from rdev.adapters.postgres.connection import TrioConnection, open_connection
from rdev.adapters.postgres.lanes import PostgresLanes
from rdev.adapters.postgres.leases import PostgresLeases
from rdev.adapters.postgres.output import PostgresOutput
from rdev.domain.commands import Claimed, Kind, LaneClass, Outcome, Priority, Status
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.lanes import Lane, due
from rdev.domain.stream import status_line
from rdev.ports.output import AppendState
from tests.fakes.store import ACTOR
from tests.ports.conftest import LEASE_S, Pools, World, append_to, last_chunk, lines
from tests.ports.witness import check_record, install

SUCCEEDED = Outcome(status=Status.SUCCEEDED, exit_code=0)
NUMBERS = count(1)


class OneConnection:
    """Stands where a pool is expected: everything happens in one transaction."""

    def __init__(self, connection: TrioConnection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[TrioConnection]:
        yield self._connection


def inside(connection: TrioConnection, world: World) -> World:
    """The same ports in the connection's transaction."""
    pool = OneConnection(connection)
    return replace(
        world,
        commands=PostgresCommands(pool=pool),
        lanes=PostgresLanes(pool=pool, lease_s=LEASE_S),
        leases=PostgresLeases(pool=pool, heartbeats=pool, lease_s=LEASE_S),
        output=PostgresOutput(pool=pool, appends=pool),
    )


@dataclass(slots=True, kw_only=True)
class Scene:
    """One project: three shells run and one has room, an agent runs and another waits.

    `late` is a shell whose lease has run out; `first` of the queued ones has expired.
    """

    project: ProjectId
    reach: str
    shell: Claimed
    late: Claimed
    agent: Claimed
    queued: list[CommandId]
    # What the operations were told, in the order of their commits.
    applied: set[int] = field(default_factory=set)
    taken: list[Claimed] = field(default_factory=list)
    # What is to be done after the commit.
    touches: set[Lane] = field(default_factory=set)

    def lane(self, lane_class: LaneClass) -> Lane:
        return Lane(project=self.project, lane_class=lane_class)


async def set_scene(world: World) -> Scene:
    """A project of its own, in a reach of its own."""
    name = f"project-{next(NUMBERS)}"
    await world.project(name, reach=name)
    for kind in (Kind.SHELL, Kind.SHELL, Kind.SHELL, Kind.CLAUDE):
        await world.commands.insert(world.new(name, kind=kind))
    await world.lanes.repair(reach=name)
    claimed = await world.claim(reach=name)
    shells = [one for one in claimed if one.kind is Kind.SHELL]
    [agent] = [one for one in claimed if one.kind is Kind.CLAUDE]
    await world.leases.release([shells[1].lease])
    queued = [
        world.new(name, priority=Priority.HIGH, expires_in_s=0),
        world.new(name),
        world.new(name),
        world.new(name, kind=Kind.GIT),
    ]
    for new in queued:
        await world.commands.insert(new)
    await world.lanes.repair(reach=name)
    return Scene(
        project=ProjectId(name),
        reach=name,
        shell=shells[0],
        late=shells[1],
        agent=agent,
        queued=[new.id for new in queued],
    )


async def enqueue(world: World, scene: Scene) -> None:
    await world.commands.insert(world.new(scene.project, priority=Priority.HIGH))
    scene.touches.add(scene.lane(LaneClass.WORK))


async def touch(world: World, scene: Scene) -> None:
    await world.lanes.touch([scene.lane(LaneClass.WORK), scene.lane(LaneClass.AGENT)])


async def claim(world: World, scene: Scene) -> None:
    found = await world.lanes.claim(reach=scene.reach, instance="boot-1", holder="two", limit=2)
    scene.taken += found.claimed


async def claim_touched(world: World, scene: Scene) -> None:
    found = await world.lanes.claim(
        reach=scene.reach,
        instance="boot-1",
        holder="two",
        limit=2,
        touched=[scene.lane(LaneClass.WORK), scene.lane(LaneClass.AGENT)],
    )
    scene.taken += found.claimed


async def complete(world: World, scene: Scene) -> None:
    ends = [
        append_to(one, last_chunk(SUCCEEDED), outcome=SUCCEEDED)
        for one in (scene.agent, scene.late)
    ]
    for result, end in zip(await world.output.append(ends), ends, strict=True):
        if result.state is AppendState.APPLIED:
            scene.applied.add(end.lease.id)
    scene.touches |= {scene.lane(LaneClass.WORK), scene.lane(LaneClass.AGENT)}


async def append(world: World, scene: Scene) -> None:
    appends = [append_to(one, lines(2)) for one in (scene.shell, scene.late)]
    for result, one in zip(await world.output.append(appends), appends, strict=True):
        if result.state is AppendState.APPLIED:
            scene.applied.add(one.lease.id)


async def cancel_queued(world: World, scene: Scene) -> None:
    await world.commands.request_cancel(scene.queued[1], ACTOR)
    scene.touches.add(scene.lane(LaneClass.WORK))


async def cancel_running(world: World, scene: Scene) -> None:
    await world.commands.request_cancel(scene.late.lease.command, ACTOR)


async def expire(world: World, scene: Scene) -> None:
    await world.lanes.expire(holder="one", limit=10)
    scene.touches.add(scene.lane(LaneClass.WORK))  # the tick repairs behind it


async def heartbeat(world: World, scene: Scene) -> None:
    await world.leases.heartbeat([one.lease for one in (scene.shell, scene.agent, scene.late)])


async def take_over(world: World, scene: Scene) -> None:
    scene.taken += await world.leases.take_over(reach=scene.reach, holder="two", limit=10)


async def release(world: World, scene: Scene) -> None:
    await world.leases.release([scene.late.lease, scene.shell.lease])


async def release_holder(world: World, scene: Scene) -> None:
    await world.leases.release_holder("one")


async def repair(world: World, scene: Scene) -> None:
    await world.lanes.repair(reach=scene.reach)


Operation = Callable[[World, Scene], Awaitable[None]]
OPERATIONS: tuple[Operation, ...] = (
    enqueue,
    touch,
    claim,
    claim_touched,
    complete,
    append,
    cancel_queued,
    cancel_running,
    expire,
    heartbeat,
    take_over,
    release,
    release_holder,
    repair,
)


@pytest.mark.slow
@pytest.mark.parametrize("first", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_an_operation_that_meets_an_uncommitted_one_leaves_the_lanes_right(
    real: World, pools: Pools, first: Operation
) -> None:
    await install(pools)
    left, right = [await open_connection(pools.settings) for _ in range(2)]
    for second in OPERATIONS:
        scene = await set_scene(real)
        with trio.fail_after(60):
            await _interleaved(pools, (left, first), (right, second), real, scene)
        await real.lanes.touch(scene.touches)
        pair = f"{first.__name__}, {second.__name__}"
        await _check(pools, real, scene, pair)
        await real.lanes.repair(reach=scene.reach)
        await _check(pools, real, scene, f"{pair}, repaired")
        await _end_all(pools)
    await left.close()
    await right.close()


async def test_a_repair_finds_what_a_crash_left_untouched(real: World, pools: Pools) -> None:
    """Committed and not touched: room where an end was, in both lanes."""
    await install(pools)
    scene = await set_scene(real)
    await claim(real, scene)
    assert await real.lanes.repair(reach=scene.reach) == 0
    await complete(real, scene)
    assert await real.lanes.repair(reach="elsewhere") == 0
    assert await real.lanes.repair(reach=scene.reach) == 2
    await _check(pools, real, scene, "repaired")
    assert await real.lanes.repair(reach=scene.reach) == 0


async def test_many_at_once_do_not_deadlock(real: World, pools: Pools) -> None:
    """A storm of all operations over three projects; PostgreSQL names every deadlock."""
    await install(pools)
    scenes = [await set_scene(real) for _ in range(3)]
    chance = random.Random(5)

    async def act() -> None:
        async with await open_connection(pools.settings) as connection:
            await connection.set_autocommit(True)
            world = inside(connection, real)
            for _ in range(60):
                scene = chance.choice(scenes)
                await chance.choice(OPERATIONS)(world, scene)
                await world.lanes.touch([*scenes[0].touches, *scene.touches])

    with trio.fail_after(90):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(act)
    for scene in scenes:
        await real.lanes.touch(scene.touches)
        await _check(pools, real, scene, "storm")


async def _interleaved(
    pools: Pools,
    first: tuple[TrioConnection, Operation],
    second: tuple[TrioConnection, Operation],
    world: World,
    scene: Scene,
) -> None:
    """The first one's statements, then all of the second one that can run, then both commits."""
    done, committed = trio.Event(), trio.Event()

    async def follow() -> None:
        connection, operation = second
        async with connection.transaction():
            await operation(inside(connection, world), scene)
            done.set()
            await committed.wait()

    async with trio.open_nursery() as nursery:
        connection, operation = first
        async with connection.transaction():
            await operation(inside(connection, world), scene)
            nursery.start_soon(follow)
            await _until_blocked_or(pools, second[0].info.backend_pid, done)
        committed.set()


async def _until_blocked_or(pools: Pools, pid: int, done: trio.Event) -> None:
    query = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
    async with pools.requests.connection() as connection:
        while not done.is_set():
            row = await (await connection.execute(query, (pid,))).fetchone()
            if row is not None and row[0]:
                return
            await trio.sleep(0.001)


async def _check(pools: Pools, world: World, scene: Scene, what: str) -> None:
    commands = await _rows(pools, "select * from commands where project = %s", scene.project)
    lanes = await _rows(pools, "select * from lanes where project = %s", scene.project)
    for lane in lanes:
        mine = [row for row in commands if row["lane_class"] == lane["lane_class"]]
        running = sum(row["status"] == "running" for row in mine)
        assert running <= lane["cap"], what
        queued = [row for row in mine if row["status"] == "queued"]
        if queued and running < lane["cap"]:
            head = min(queued, key=lambda row: (row["rank"], row["id"]))
            exact = due(
                head_rank=head["rank"], head_level=head["level"], last_start_s=lane["last_start"]
            )
            assert lane["due"] is not None, what
            assert lane["due"] <= exact, what
    for row in commands:
        await _check_log(world, row, what)
    await check_record(pools, project=scene.project)
    now_of = {command_id(row["id"]): row["lease_id"] for row in commands}
    leases = [one.lease.id for one in scene.taken]
    assert len(set(leases)) == len(leases), what
    if scene.late.lease.id in scene.applied:
        # Accepted under the old lease: then whoever took over continues behind it.
        for one in scene.taken:
            if one.lease.command == scene.late.lease.command:
                assert one.last_seq > scene.late.last_seq, what
    for one in scene.taken:
        assert now_of[one.lease.command] >= one.lease.id, what


async def _check_log(world: World, row: DictRow, what: str) -> None:
    """Without a hole, with one end exactly where there is one, as long as the row says."""
    chunks = await world.log(command_id(row["id"]))
    assert all(left.last_seq + 1 == right.first_seq for left, right in pairwise(chunks)), what
    assert chunks[-1].last_seq == row["last_seq"], what
    ended = Status(row["status"]).is_terminal
    assert [chunk.is_final for chunk in chunks].count(True) == ended, what
    started = status_line(Status.RUNNING, attempt=1)
    assert [chunk.payload for chunk in chunks].count(started) == row["attempt"], what


async def _rows(pools: Pools, query: str, project: ProjectId) -> list[DictRow]:
    async with pools.requests.connection() as connection:
        cursor = connection.cursor(row_factory=dict_row)
        await cursor.execute(query, (project,))
        return await cursor.fetchall()


async def _end_all(pools: Pools) -> None:
    """The next scene is alone: expiry and a dead holder know no reach."""
    async with pools.requests.connection() as connection:
        await connection.execute(
            "update commands set status = 'lost' where status in ('queued', 'running')"
        )
