"""`select 1` over one connection: psycopg on rdev's trio driver beside psycopg on asyncio.

Both run in this process, one after the other, in alternating order, against the same server; a
repetition is `operations` round trips. Only the client's CPU time is counted (the server is another
process); round trips per second depend on where the scheduler puts the two.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import trio

from bench.harness import Context, Figure, Measurement, Scenario
from rdev.adapters.postgres.connection import ConnectionSettings, open_connection
from rdev.adapters.postgres.embedded import open_embedded

# CPU of the trio driver for CPU of psycopg's own; above it the driver has become slower.
TARGET_CPU_RATIO = 0.85

_WARM_UP_OPERATIONS = 200


def measure(dsn: str, *, repetitions: int, operations: int) -> dict[str, float | list[float]]:
    """Medians of `repetitions`, and every single figure for the spread.

    `*_cpu_us`: client CPU per round trip in µs; `*_per_s`: round trips per second;
    `*_cpu_spread`: (largest − smallest) / median; `*_ratio`: trio / asyncio.
    """
    trio_runs: list[tuple[float, float]] = []
    asyncio_runs: list[tuple[float, float]] = []
    sides: list[tuple[Callable[[str, int], tuple[float, float]], list[tuple[float, float]]]] = [
        (_on_trio, trio_runs),
        (_on_asyncio, asyncio_runs),
    ]
    for repetition in range(repetitions):
        for run, results in sides if repetition % 2 == 0 else reversed(sides):
            results.append(run(dsn, operations))
    return _summary(trio_runs, asyncio_runs)


def _summary(
    trio_runs: list[tuple[float, float]], asyncio_runs: list[tuple[float, float]]
) -> dict[str, float | list[float]]:
    found: dict[str, float | list[float]] = {}
    medians: dict[str, float] = {}
    for side, runs in (("trio", trio_runs), ("asyncio", asyncio_runs)):
        cpu_us = [cpu for cpu, _ in runs]
        per_s = [rate for _, rate in runs]
        medians[f"{side}_cpu_us"] = statistics.median(cpu_us)
        medians[f"{side}_per_s"] = statistics.median(per_s)
        found[f"{side}_cpu_spread"] = (max(cpu_us) - min(cpu_us)) / medians[f"{side}_cpu_us"]
        found[f"{side}_cpu_us_each"] = cpu_us
        found[f"{side}_per_s_each"] = per_s
    found |= medians
    found["cpu_ratio"] = medians["trio_cpu_us"] / medians["asyncio_cpu_us"]
    found["per_s_ratio"] = medians["trio_per_s"] / medians["asyncio_per_s"]
    return found


def _on_trio(dsn: str, operations: int) -> tuple[float, float]:
    async def main() -> tuple[float, float]:
        async with await open_connection(ConnectionSettings(dsn=dsn)) as connection:
            cursor = connection.cursor()
            for _ in range(_WARM_UP_OPERATIONS):
                await cursor.execute("select 1")
            began = time.perf_counter(), time.process_time()
            for _ in range(operations):
                await cursor.execute("select 1")
                await cursor.fetchone()
            return _rates(operations, *began)

    return trio.run(main)


def _on_asyncio(dsn: str, operations: int) -> tuple[float, float]:
    async def main() -> tuple[float, float]:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            cursor = connection.cursor()
            for _ in range(_WARM_UP_OPERATIONS):
                await cursor.execute("select 1")
            began = time.perf_counter(), time.process_time()
            for _ in range(operations):
                await cursor.execute("select 1")
                await cursor.fetchone()
            return _rates(operations, *began)

    return asyncio.run(main())


def _rates(operations: int, wall_began: float, cpu_began: float) -> tuple[float, float]:
    """CPU µs per operation, operations per second."""
    cpu_s = time.process_time() - cpu_began
    wall_s = time.perf_counter() - wall_began
    return cpu_s / operations * 1e6, operations / wall_s


def _measure(context: Context) -> Measurement:
    """The scenario: a database of its own, in a folder of its own."""

    async def main() -> dict[str, float | list[float]]:
        with tempfile.TemporaryDirectory(prefix="rdev-bench-") as folder:
            async with open_embedded(Path(folder)) as dsn:
                # In a thread: each side of the comparison brings its own event loop.
                return await trio.to_thread.run_sync(
                    lambda: measure(dsn, repetitions=context.repetitions, operations=5_000)
                )

    return trio.run(main)


SCENARIO = Scenario(
    name="psycopg_roundtrip",
    what="`select 1` on one connection: rdev's trio driver beside psycopg's own asyncio.",
    figures=(Figure(name="cpu_ratio", unit="", at_most=TARGET_CPU_RATIO),),
    measure=_measure,
)
