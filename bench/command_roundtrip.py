"""The main road: from `POST` to `complete`, how many are accepted, how soon a line is seen.

One client process beside one server process with its own database. Percentiles are those of one
repetition; the table shows their median over the repetitions.
"""

import re
import shlex
import sys
import time
from pathlib import Path

import trio

from bench.client import Connection, create, open_connection
from bench.harness import Context, Figure, Measurement, Scenario, percentile
from bench.server import Server, open_server, open_state_dir

ROUND_TRIPS = 100
LINES = 200
LINE_PAUSE_S = 0.02
CLIENTS = 24
POSTS = 2_400
# The cap of a project's lane for shells: so many commands that sleep hold back all that follow.
LANE_CAP = 4
HOLD_S = 600
SETTLE_S = 3.0
END_DEADLINE_S = 60.0

COMPLETE = b"event: complete"
STAMP = re.compile(rb'"line":"(\d+)"')
# Each line says when it was written, by the clock that all processes of a machine share.
WRITE_STAMPS = f"""
import time
for _ in range({LINES}):
    print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), flush=True)
    time.sleep({LINE_PAUSE_S})
"""


def measure(context: Context) -> Measurement:
    """Every figure of the main road; a database of its own for what must not disturb."""
    found: dict[str, list[float]] = {}
    with open_state_dir() as state_dir:
        with open_server(state_dir) as server:
            trio.run(_create_project, server, "bench")
            found |= context.repeat(lambda: trio.run(_round_trips, server))
            found |= context.repeat(lambda: trio.run(_lines, server))
        found |= context.repeat(lambda: _start_and_rest(state_dir))
    with open_state_dir() as state_dir, open_server(state_dir) as server:
        load = Load(server)
        found |= context.repeat(load.once)
        trio.run(load.let_go)
    return found


async def _create_project(server: Server, project: str) -> None:
    async with open_connection(server) as connection:
        await create(connection, "/projects", {"id": project})


async def _round_trips(server: Server) -> dict[str, float]:
    """`true` again and again: request sent → `complete` received, in ms."""
    took_ms = []
    async with open_connection(server) as poster:
        for _ in range(ROUND_TRIPS):
            async with open_connection(server) as watcher:
                began = time.perf_counter()
                await _see_complete(poster, watcher)
                took_ms.append((time.perf_counter() - began) * 1e3)
    return {"complete_p50": percentile(took_ms, 50), "complete_p95": percentile(took_ms, 95)}


async def _see_complete(poster: Connection, watcher: Connection) -> None:
    command = await create(poster, "/projects/bench/shell", {"command": "true"})
    seen = b""
    async with watcher.stream(f"/commands/{command}/events") as body:
        while COMPLETE not in seen:
            data = await body.receive()
            if not data:
                raise RuntimeError(f"the stream ended without complete: {seen!r}")
            seen += data


async def _lines(server: Server) -> dict[str, float]:
    """A line every 20 ms: written by the command → received from the stream, in ms."""
    argv = shlex.join([sys.executable, "-c", WRITE_STAMPS])
    late_ms: list[float] = []
    unread = b""
    async with open_connection(server) as poster, open_connection(server) as watcher:
        command = await create(poster, "/projects/bench/shell", {"command": argv})
        async with watcher.stream(f"/commands/{command}/events") as body:
            while data := await body.receive():
                now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                whole, _, unread = (unread + data).rpartition(b"\n\n")
                late_ms += [(now_ns - int(stamp)) / 1e6 for stamp in STAMP.findall(whole)]
    if len(late_ms) != LINES:
        raise RuntimeError(f"{len(late_ms)} lines came of {LINES}")
    return {"line_p50": percentile(late_ms, 50), "line_p99": percentile(late_ms, 99)}


def _start_and_rest(state_dir: Path) -> dict[str, float]:
    """A start on a state folder that was used before, and the memory when all is quiet."""
    with open_server(state_dir) as server:
        time.sleep(SETTLE_S)
        return {"start_to_ready": server.start_to_ready_s, "rest_rss": server.rss_mib()}


class Load:
    """Commands that are accepted and then wait: their lane is held by commands that sleep.

    Each repetition has a project of its own, so that no queue is deeper than another.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._projects = 0
        self._holding: list[str] = []

    def once(self) -> dict[str, float]:
        """Accepted commands per second and what one costs the server, with CLIENTS at once."""
        return trio.run(self._once)

    async def let_go(self) -> None:
        """End what holds the lanes, so that nothing outlives the measurement."""
        async with open_connection(self._server) as connection:
            for command in self._holding:
                await connection.request("DELETE", f"/commands/{command}")
            with trio.fail_after(END_DEADLINE_S):
                for command in self._holding:
                    await _wait_for_end(connection, command)

    async def _once(self) -> dict[str, float]:
        self._projects += 1
        project = f"load-{self._projects}"
        path = f"/projects/{project}/shell"
        await _create_project(self._server, project)
        async with open_connection(self._server) as connection:
            body = {"command": f"exec sleep {HOLD_S}", "timeout_s": HOLD_S}
            held = [await create(connection, path, body) for _ in range(LANE_CAP)]
            self._holding += held
            with trio.fail_after(END_DEADLINE_S):
                for command in held:
                    await _wait_until_running(connection, command)
        began_s, cpu_began_s = time.perf_counter(), self._server.cpu_s()
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(self._post, path, POSTS // CLIENTS)
        took_s = time.perf_counter() - began_s
        cpu_us = (self._server.cpu_s() - cpu_began_s) * 1e6
        return {"accepted": POSTS / took_s, "accepted_cpu": cpu_us / POSTS}

    async def _post(self, path: str, times: int) -> None:
        async with open_connection(self._server) as connection:
            for _ in range(times):
                await create(connection, path, {"command": "true"})


async def _wait_until_running(connection: Connection, command: str) -> None:
    while b'"status":"queued"' in await _get(connection, command):
        await trio.sleep(0.02)


async def _wait_for_end(connection: Connection, command: str) -> None:
    while b'"status":"running"' in await _get(connection, command):
        await trio.sleep(0.05)


async def _get(connection: Connection, command: str) -> bytes:
    status, body = await connection.request("GET", f"/commands/{command}")
    if status != 200:
        raise RuntimeError(f"GET /commands/{command}: {status} {body!r}")
    return body.replace(b": ", b":")


SCENARIO = Scenario(
    name="command_roundtrip",
    what="`true` from POST to `complete`; POSTs accepted by 24 keep-alive clients; a line's way to "
    "the SSE client; start and rest.",
    figures=(
        Figure(name="complete_p50", unit="ms", at_most=30),
        Figure(name="complete_p95", unit="ms", at_most=60),
        Figure(name="accepted", unit="/s", at_least=500),
        Figure(name="accepted_cpu", unit="µs each"),
        Figure(name="line_p50", unit="ms", at_most=20),
        Figure(name="line_p99", unit="ms", at_most=100),
        Figure(name="start_to_ready", unit="s", at_most=3),
        Figure(name="rest_rss", unit="MiB", at_most=120),
    ),
    measure=measure,
)
