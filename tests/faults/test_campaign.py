"""Hundreds of faults: several arenas at once, each with its own kinds, in an order that is drawn.

`RDEV_TEST_SEED` repeats an order (not an interleaving); `RDEV_TEST_ROUNDS` sets how often each
named point and each other fault comes (5: some twenty minutes, more than 500 injections).
"""

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.faults import faults
from tests.faults.arena import Arena, open_arena
from tests.faults.database import small_filesystem
from tests.faults.faults import Fault
from tests.faults.ledger import Tally
from tests.faults.points import POINTS

ROUNDS = int(os.environ.get("RDEV_TEST_ROUNDS", "5"))
SEED = int(os.environ.get("RDEV_TEST_SEED", str(random.randrange(1 << 30))))
# Most of a fault is waiting for a lease to run out.
ARENAS = 3
# Injections of a whole run with the rounds above.
INJECTIONS_MIN = 500
# Room for the cluster, a checkpoint's WAL and some minutes of output.
DISK_BYTES = 192 << 20
FULL_POINTS = tuple(point for point in POINTS if point.startswith("touch."))
# Where standing still past the lease is worst.
FREEZE_POINTS = (
    "claim.committed",
    "attach.before",
    "attach.opened",
    "attach.read",
    "append.before",
    "append.committed",
    "finish.before",
    "heartbeat.before",
)

pytestmark = [pytest.mark.full, pytest.mark.timeout(2_400)]


@asynccontextmanager
async def judged(
    place: Path, session_tally: Tally, seed: int, *, workers: int = 2, **more: object
) -> AsyncIterator[Arena]:
    """An arena under load, whose verdict is added to the session's and must be clean."""
    async with open_arena(place, seed=seed, **more) as arena:  # type: ignore[arg-type]
        await arena.begin(workers=workers)
        try:
            yield arena
            await arena.settle()
        finally:
            session_tally.add(arena.tally)
        arena.check()


async def run_all(
    plan: list[Fault], place: Path, session_tally: Tally, seed: int, **more: object
) -> None:
    """One arena that meets these faults in an order of its own."""
    random.Random(seed).shuffle(plan)
    async with judged(place, session_tally, seed, **more) as arena:
        for fault in plan:
            await fault(arena)


async def run_in_arenas(
    plan: list[Fault], place: Path, session_tally: Tally, *, arenas: int
) -> None:
    """Several arenas at once, each with a part of it."""
    random.Random(SEED).shuffle(plan)
    async with trio.open_nursery() as nursery:
        for number in range(arenas):
            part = plan[number::arenas]
            nursery.start_soon(run_all, part, place, session_tally, SEED + number)


async def test_dead_and_frozen_servers_lose_and_double_nothing(
    quick_place: Path, session_tally: Tally
) -> None:
    """kill -9 at every named point and anywhere, SIGSTOP past the lease; several arenas at once."""
    points = [point for point in POINTS if point not in FULL_POINTS]
    plan: list[Fault] = [partial(faults.kill_at, point=point) for point in points] * ROUNDS
    plan += [faults.kill] * (4 * ROUNDS) + [faults.freeze, faults.overtake] * (2 * ROUNDS)
    plan += [partial(faults.freeze_at, point=point) for point in FREEZE_POINTS] * (ROUNDS // 2)
    await run_in_arenas(plan, quick_place, session_tally, arenas=ARENAS)


async def test_a_dead_server_that_was_full_loses_and_doubles_nothing(
    quick_place: Path, session_tally: Tally
) -> None:
    """kill -9 where only a server without permits comes: it touches lanes apart from a claim."""
    plan: list[Fault] = [partial(faults.kill_at, point=point) for point in FULL_POINTS] * ROUNDS
    await run_all(plan, quick_place, session_tally, SEED, running_max=1)


async def test_a_database_that_crashes_and_hangs_up_loses_and_doubles_nothing(
    quick_place: Path, session_tally: Tally
) -> None:
    """Immediate restarts, killed backends, storms of terminated sessions."""
    plan: list[Fault] = [faults.restart_database, faults.kill_backend] * (3 * ROUNDS)
    plan += [faults.terminate_storm] * (6 * ROUNDS)
    await run_in_arenas(plan, quick_place, session_tally, arenas=2)


async def test_dead_networks_and_wrong_clocks_lose_and_double_nothing(
    quick_place: Path, session_tally: Tally
) -> None:
    """Half-open connections, lost notifications, clocks an hour off."""
    plan: list[Fault] = [faults.half_open, faults.deafen] * ROUNDS
    plan += [faults.step_clock] * (2 * ROUNDS)
    await run_all(plan, quick_place, session_tally, SEED, proxied=True)


async def test_a_full_disk_stops_the_database_and_loses_nothing(
    quick_place: Path, session_tally: Tally
) -> None:
    """rdev says 503 and reads nothing; when there is room again it goes on."""
    try:
        with small_filesystem(DISK_BYTES, quick_place) as disk:
            async with judged(quick_place, session_tally, SEED, data_place=disk) as arena:
                for _ in range(ROUNDS):
                    await faults.fill_disk(arena, disk)
    except PermissionError as error:
        pytest.skip(f"this needs a file system of its own: {error}")


def test_there_were_enough_of_them(session_tally: Tally) -> None:
    """The last test of a whole run."""
    if ROUNDS >= 5 and session_tally.injections["fill_disk"]:
        assert session_tally.injections.total() >= INJECTIONS_MIN
