"""The queue at full speed, beside other queues, and under what slows queues down.

One PostgreSQL 15 with fsync for everything. A command does nothing, so what is measured is the
queue: claims, leases, events, the command's row; audit and outbox do not exist yet. Every side
runs one process. `--long` holds the snapshot as long as the target says.
"""

import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import psycopg
import trio

from bench.harness import Context, Figure, Measurement, Scenario, percentile, ratios
from bench.peers.databases import Databases, open_databases
from bench.peers.databases import cpu_s as database_cpu_s
from bench.peers.installed import Peer, PeerError, install
from bench.peers.load import BUSY, Work, fill, make_projects, project, takes_s
from bench.peers.rig import RUNNING_MAX, NoopExecutor, Rig, open_rig
from bench.server import open_state_dir
from rdev.domain.ids import CommandId, ProjectId

PROJECTS = 500
BACKLOG = 100_000
# So many that no side is done before the window is over.
SERIAL = Work(name="serial", projects=PROJECTS, each=60)
BEHIND = Work(name="behind", projects=PROJECTS, each=60, backlog=BACKLOG)
BUSY_ONLY = Work(name="busy_only", projects=PROJECTS, each=0, backlog=BACKLOG)
EMPTY = Work(name="empty", projects=PROJECTS, each=0)

WARM_S = 0.5
WINDOW_S = 3.0
PATIENCE_S = 10.0
RATE_PER_S = 500
STEADY_S = 6.0
IDLE_COMMANDS = 200
NOISY = 10_000
NOISY_TAKES_S = 0.02
TURNS = 20
HELD_S = 20.0
HELD_LONG_S = 60.0
# What is judged is the end of the time, when most has piled up.
HELD_JUDGED_S = 5.0

# Peers get what rdev has by default: connections, and commands at once. Each runs one command of a
# project at a time, in the order of acceptance (what ran beside another is counted, `overlaps`):
# procrastinate by its `lock`, graphile-worker by its `queue_name`, pgqueuer by an entrypoint for
# each project with `concurrency_limit=1`, which its database enforces for all workers (a unique
# index over its slots). Each batches as it does by default; all their tables are durable.
# graphile-worker's local queue stays off: with it two commands of a project ran at once (4,080
# times in one window).
PEER_SETTINGS = {
    "warm_s": WARM_S,
    "window_s": WINDOW_S,
    "patience_s": PATIENCE_S,
    "connections": 12,
    "concurrency": RUNNING_MAX,
    "graphile": {"completeJobBatchDelay": 0},
}

# Kept between runs; not below the project, whose checks read every file there.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
PEERS_FOLDER = CACHE / "rdev-bench"

Once = Callable[[], Awaitable[Mapping[str, float]]]


def measure(context: Context) -> Measurement:
    """Everything in one run, one repetition of every side after the other."""
    peers = install(PEERS_FOLDER)
    with open_state_dir() as state_dir:
        return trio.run(_measure, context, peers, state_dir)


async def _measure(context: Context, peers: list[Peer], state_dir: Path) -> Measurement:
    found: dict[str, list[float]] = {}
    repetitions = min(context.repetitions, 3)
    async with open_databases(state_dir) as databases:
        sides = [partial(_drain, databases), *(partial(_peer, databases, p) for p in peers)]
        for work in (SERIAL, BEHIND):
            once = [partial(side, work) for side in sides]
            await _repeat(found, once, repetitions, warm_ups=min(1, context.warm_ups))
            for peer in peers:
                theirs = found[f"{work.name}_{peer.name}"]
                found[f"{work.name}_to_{peer.name}"] = ratios(found[f"{work.name}_rdev"], theirs)
        waits = [partial(_behind_busy, databases), partial(_idle, databases)]
        await _repeat(found, [*waits, partial(_noisy, databases)], repetitions, warm_ups=0)
        held_s = HELD_LONG_S if context.long else HELD_S
        await _repeat(found, [partial(_held, databases, held_s)], 1, warm_ups=0)
    for name in {figure.name for figure in SCENARIO.figures} - found.keys():
        found[name] = [math.nan]  # a peer that is left out
    return found


async def _repeat(
    found: dict[str, list[float]], sides: Sequence[Once], repetitions: int, warm_ups: int
) -> None:
    """Each side in turn, so that all sides meet the same hour."""
    for repetition in range(-warm_ups, repetitions):
        for once in sides:
            for name, value in (await once()).items():
                if repetition >= 0:
                    found.setdefault(name, []).append(value)


@asynccontextmanager
async def _rig_on(
    databases: Databases, work: Work, executor: NoopExecutor, running_max: int = RUNNING_MAX
) -> AsyncIterator[tuple[str, Rig]]:
    """rdev on a fresh copy of the work; its conninfo, and the services."""
    async with (
        databases.filled(f"rdev_{work.name}", lambda dsn: fill(dsn, work)) as dsn,
        open_rig(dsn, executor, running_max=running_max) as rig,
    ):
        yield dsn, rig


async def _drain(databases: Databases, work: Work) -> dict[str, float]:
    """Commands per second in the window, and how they came in batches."""
    async with _rig_on(databases, work, NoopExecutor(takes_s=takes_s)) as (dsn, rig):
        await rig.until_finished(1)
        await trio.sleep(WARM_S)
        rig.lanes.forget()
        theirs_s = await trio.to_thread.run_sync(database_cpu_s, dsn)
        before, batches = rig.queue.statistics().finished, rig.appender.statistics().batches
        began_s, cpu_s = time.perf_counter(), time.process_time()
        await trio.sleep(WINDOW_S)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        done = rig.queue.statistics().finished - before
        theirs_s = await trio.to_thread.run_sync(database_cpu_s, dsn) - theirs_s
        batches = rig.appender.statistics().batches - batches
        return {
            f"{work.name}_rdev": done / took_s,
            f"{work.name}_cpu": cpu_s / done * 1e6,
            f"{work.name}_database_cpu": theirs_s / done * 1e6,
            f"{work.name}_per_claim": sum(rig.lanes.claims_found) / len(rig.lanes.claims_found),
            f"{work.name}_per_append": done / batches,
        }


async def _peer(databases: Databases, peer: Peer, work: Work) -> dict[str, float]:
    """The same for another queue. Zeros, and the reason printed, where it fails."""
    shape = {"projects": work.projects, "each": work.each, "busy": BUSY, "backlog": work.backlog}
    given = {**PEER_SETTINGS, **shape}
    name = f"{work.name}_{peer.name}"
    try:
        async with databases.filled(name, lambda dsn: peer.fill(dsn, given)) as dsn:
            result = await peer.run(dsn, given)
    except (PeerError, trio.TooSlowError) as error:
        print(f"{name}: {error}", flush=True)
        result = {"per_s": 0.0, "overlaps": 0.0}
    if result["overlaps"]:
        print(f"{name}: two commands of a project ran at once", flush=True)
    # What did almost nothing is not divided by.
    return {name: max(result["per_s"], 0.1), f"{name}_overlaps": result["overlaps"]}


class _Waits:
    """From the acceptance of a command to its start, in ms; how many were accepted."""

    def __init__(self) -> None:
        self.waits_ms: list[float] = []
        self.accepted = 0
        self._accepted_at: dict[CommandId, float] = {}
        self._started_at: dict[CommandId, float] = {}

    def started(self, _: ProjectId, command: CommandId) -> None:
        """May come before the answer to its submission is read."""
        self._started_at[command] = time.perf_counter()
        self._pair(command)

    async def submit(self, rig: Rig, name: ProjectId) -> None:
        """Accept one."""
        command = await rig.submit(name)
        self.accepted += 1
        self._accepted_at[command] = time.perf_counter()
        self._pair(command)

    def _pair(self, command: CommandId) -> None:
        if command in self._accepted_at and command in self._started_at:
            waited_s = self._started_at.pop(command) - self._accepted_at.pop(command)
            self.waits_ms.append(max(0.0, waited_s) * 1e3)


async def _submit_steadily(rig: Rig, waits: _Waits, per_s: float, for_s: float) -> None:
    """One after the other to all projects in turn, at the times the rate says. What is late is made
    up for; at most 200 are on their way."""
    began, number = trio.current_time(), 0
    on_their_way = trio.CapacityLimiter(200)

    async def one(name: ProjectId) -> None:
        async with on_their_way:
            await waits.submit(rig, name)

    async with trio.open_nursery() as nursery:
        while (due_s := number / per_s) < for_s:
            await trio.sleep_until(began + due_s)
            nursery.start_soon(one, project(number % PROJECTS))
            number += 1


async def _behind_busy(databases: Databases) -> dict[str, float]:
    """RATE_PER_S commands beside 100,000 that wait for two busy projects."""
    waits = _Waits()
    executor = NoopExecutor(takes_s=takes_s, started=waits.started)
    async with _rig_on(databases, BUSY_ONLY, executor) as (_, rig):
        await _submit_steadily(rig, _Waits(), RATE_PER_S, WARM_S)
        rig.lanes.forget()
        await _submit_steadily(rig, waits, RATE_PER_S, STEADY_S)
        return {
            "busy_claim_p50": percentile(rig.lanes.claims_ms, 50),
            "busy_claim_p99": percentile(rig.lanes.claims_ms, 99),
            "busy_wait_p99": percentile(waits.waits_ms, 99),
        }


async def _idle(databases: Databases) -> dict[str, float]:
    """One command at a time, with pauses: accepted → started."""
    waits = _Waits()
    executor = NoopExecutor(started=waits.started)
    async with _rig_on(databases, EMPTY, executor) as (_, rig):
        for number in range(IDLE_COMMANDS):
            await waits.submit(rig, project(number % PROJECTS))
            await rig.until_finished(number + 1)
            await trio.sleep(0.01)
    return {"idle_p50": percentile(waits.waits_ms, 50), "idle_p99": percentile(waits.waits_ms, 99)}


async def _noisy(databases: Databases) -> dict[str, float]:
    """With one permit and NOISY commands of one project in front: how many of them start between
    the acceptance of another project's command and its start. One is a lane's turn."""
    order: deque[ProjectId] = deque()
    executor = NoopExecutor(
        takes_s=lambda _: NOISY_TAKES_S, started=lambda name, _: order.append(name)
    )
    work = Work(name="noisy", projects=1, each=NOISY)
    turns = []
    async with _rig_on(databases, work, executor, running_max=1) as (dsn, rig):
        await trio.to_thread.run_sync(make_projects, dsn, [project(1)])
        await rig.until_finished(1)
        for _ in range(TURNS):
            await rig.submit(project(1))
            order.clear()
            with trio.move_on_after(PATIENCE_S / TURNS * 4):
                while project(1) not in order:
                    await trio.sleep(0.001)
            turns.append(len([name for name in order if name != project(1)]))
    return {"noisy_turns": float(max(turns))}


async def _held(databases: Databases, held_s: float) -> dict[str, float]:
    """RATE_PER_S commands while a transaction holds its snapshot: at the end of that time, how many
    end, for as many as did before, and how long a claim takes."""
    waits = _Waits()
    async with (
        _rig_on(databases, EMPTY, NoopExecutor(started=waits.started)) as (dsn, rig),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(
            _submit_steadily, rig, waits, RATE_PER_S, WARM_S + HELD_JUDGED_S + held_s + WARM_S
        )
        await trio.sleep(WARM_S)
        free = await _done_in(rig, HELD_JUDGED_S)
        with psycopg.connect(dsn) as holder:
            holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            holder.execute("select count(*) from lanes")
            await trio.sleep(held_s - HELD_JUDGED_S)
            rig.lanes.forget()
            held = await _done_in(rig, HELD_JUDGED_S)
            claims_ms = list(rig.lanes.claims_ms)
    return {
        "held_rate": held / HELD_JUDGED_S,
        "held_kept": held / free * 100,
        "held_claim_p99": percentile(claims_ms, 99),
    }


async def _done_in(rig: Rig, for_s: float) -> int:
    before = rig.queue.statistics().finished
    await trio.sleep(for_s)
    return rig.queue.statistics().finished - before


def _rate(name: str, **target: float) -> Figure:
    return Figure(name=name, unit="/s", **target)


_PEERS = ("procrastinate", "pgqueuer", "graphile_worker")

SCENARIO = Scenario(
    name="queue",
    what=f"Commands that do nothing, one at a time in each of {PROJECTS} projects (`serial`), and "
    f"behind {BUSY} busy projects with {BACKLOG:,} commands (`behind`); rdev beside other queues "
    "on the same PostgreSQL, one process each.",
    figures=(
        _rate("serial_rdev", at_least=2_000),
        *(_rate(f"serial_{peer}") for peer in _PEERS),
        *(Figure(name=f"serial_to_{peer}", unit="×", at_least=1) for peer in _PEERS),
        Figure(name="serial_per_claim", unit="commands"),
        Figure(name="serial_per_append", unit="commands"),
        Figure(name="serial_cpu", unit="µs each"),
        Figure(name="serial_database_cpu", unit="µs each"),
        _rate("behind_rdev", at_least=2_000),
        *(_rate(f"behind_{peer}") for peer in _PEERS),
        *(Figure(name=f"behind_to_{peer}", unit="×", at_least=1) for peer in _PEERS),
        Figure(name="busy_claim_p50", unit="ms"),
        Figure(name="busy_claim_p99", unit="ms", at_most=10),
        Figure(name="busy_wait_p99", unit="ms"),
        Figure(name="idle_p50", unit="ms", at_most=5),
        Figure(name="idle_p99", unit="ms", at_most=25),
        Figure(name="noisy_turns", unit="commands", at_most=1),
        Figure(name="held_rate", unit="/s"),
        Figure(name="held_kept", unit="%", at_least=90),
        Figure(name="held_claim_p99", unit="ms", at_most=50),
    ),
    measure=measure,
)
