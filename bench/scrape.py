"""A scrape of many series beside an event loop: for how long nothing else runs.

The server's own registry and its own `render`, with labels up to a given number of series; beside
it a task that asks for every turn of the loop and notes the longest it waited.
"""

import time

import trio

from bench.harness import Context, Figure, Measurement, Scenario
from rdev import interpreter
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry

SERIES = 5_000
SCRAPES = 20
# `render` gives the same text for a second.
PAUSE_S = 1.05


def _filled() -> PrometheusTelemetry:
    """A registry with about `SERIES` series: a request counts one for each bucket and two more."""
    telemetry = PrometheusTelemetry()
    number = 0
    while _series(telemetry) < SERIES:
        for _ in range(20):
            path, status = f"/projects/{{project}}/{number % 40}", 200 + number // 40
            telemetry.request_started("GET", path)
            telemetry.request_finished("GET", path, status, 0.01)
            number += 1
    return telemetry


def _series(telemetry: PrometheusTelemetry) -> int:
    return sum(len(family.samples) for family in telemetry.registry.collect())


async def _scrapes(telemetry: PrometheusTelemetry) -> dict[str, float]:
    held_ms: list[float] = []
    took_ms: list[float] = []
    worst_s = 0.0

    async def turn() -> None:
        nonlocal worst_s
        last_s = time.perf_counter()
        while True:
            await trio.lowlevel.checkpoint()
            now_s = time.perf_counter()
            worst_s, last_s = max(worst_s, now_s - last_s), now_s

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        for _ in range(SCRAPES):
            await trio.sleep(PAUSE_S)
            worst_s, began_s = 0.0, time.perf_counter()
            await telemetry.render("")
            took_ms.append((time.perf_counter() - began_s) * 1_000)
            held_ms.append(worst_s * 1_000)
        nursery.cancel_scope.cancel()
    return {
        "scrape_series": _series(telemetry),
        "scrape_ms": sorted(took_ms)[len(took_ms) // 2],
        "scrape_held_ms": max(held_ms),
    }


def measure(context: Context) -> Measurement:
    """Some scrapes of one registry, twice the server's pace."""
    interpreter.give_way()
    interpreter.calm()
    return context.repeat(lambda: trio.run(_scrapes, _filled()))


SCENARIO = Scenario(
    name="scrape",
    what=f"{SCRAPES} scrapes of about {SERIES:,} series beside a task that wants every turn of the "
    "event loop: the longest that one waited.",
    figures=(
        Figure(name="scrape_series", unit=""),
        Figure(name="scrape_ms", unit="ms"),
        Figure(name="scrape_held_ms", unit="ms", at_most=10),
    ),
    measure=measure,
)
