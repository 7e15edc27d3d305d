"""What metrics, logs and traces cost: a server with all of them beside one with none.

Both stand for the whole run, each with its own database, and take turns; a figure is the ratio of
one turn of each. On: metrics, a line for each request, a tenth of the traces recorded and sent to a
collector in a process of its own. Off: nothing is counted, logged or traced.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean

import trio

from bench.client import create, open_connection
from bench.command_roundtrip import Load
from bench.harness import Context, Figure, Measurement, Scenario
from bench.server import Server, open_server, open_state_dir

WATCHERS = 20
LINES = 200_000
# Until everybody watches.
HEAD_START_S = 1.0
SINK_DEADLINE_S = 20.0
COMPLETE = b"event: complete"


def measure(context: Context) -> Measurement:
    """Both loads, on and off by turns."""
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(open_state_dir()) for _ in range(3)]
        sink = stack.enter_context(_open_sink(folders[2] / "sink"))
        on = stack.enter_context(
            open_server(
                folders[0],
                RDEV_LOG_LEVEL="info",
                RDEV_OTLP_ENDPOINT=sink,
                RDEV_TRACES_SAMPLE="0.1",
                RDEV_RATE_LIMIT_STARTS="off",
            )
        )
        off = stack.enter_context(
            open_server(
                folders[1],
                program="bench.silent_server",
                RDEV_LOG_LEVEL="error",
                RDEV_RATE_LIMIT_STARTS="off",
            )
        )
        loads = {name: Load(server) for name, server in (("on", on), ("off", off))}
        servers = {"on": on, "off": off}
        found = context.repeat(lambda: _by_turns("posts", lambda name: loads[name].once()))
        found |= context.repeat(
            lambda: _by_turns("stream", lambda name: trio.run(_stream, servers[name]))
        )
        for load in loads.values():
            trio.run(load.let_go)
    return found


def _by_turns(what: str, once: Callable[[str], Mapping[str, float]]) -> dict[str, float]:
    """Each way twice, so that neither is always the first, and how their means compare: what is
    kept of the throughput, what more it costs."""
    turns: dict[str, list[Mapping[str, float]]] = {"on": [], "off": []}
    for name in ("on", "off", "off", "on"):
        turns[name].append(once(name))
    on, off = (
        {key: fmean(turn[key] for turn in turns[way]) for key in turns[way][0]}
        for way in ("on", "off")
    )
    (rate, cpu) = on
    return {
        f"{what}_kept": on[rate] / off[rate],
        f"{what}_cpu": on[cpu] / off[cpu],
        **{f"{what}_{name}_on": value for name, value in on.items()},
        **{f"{what}_{name}_off": value for name, value in off.items()},
    }


async def _stream(server: Server) -> dict[str, float]:
    """Lines that all watchers receive, per second, and what one costs the server."""
    async with open_connection(server) as connection:
        await connection.request("POST", "/projects", {"id": "stream"})
        body = {"command": f"sleep {HEAD_START_S}; seq {LINES}"}
        command = await create(connection, "/projects/stream/shell", body)
    began_s, cpu_began_s = time.perf_counter(), server.cpu_s()
    async with trio.open_nursery() as nursery:
        for _ in range(WATCHERS):
            nursery.start_soon(_watch, server, command)
    took_s = time.perf_counter() - began_s - HEAD_START_S
    received = LINES * WATCHERS
    cpu_ns = (server.cpu_s() - cpu_began_s) * 1e9
    return {"received": received / took_s, "received_cpu": cpu_ns / received}


async def _watch(server: Server, command: str) -> None:
    tail = b""
    async with (
        open_connection(server) as connection,
        connection.stream(f"/commands/{command}/events") as body,
    ):
        while data := await body.receive():
            tail = tail[-len(COMPLETE) :] + data
            if COMPLETE in tail:
                return
    raise RuntimeError("the stream ended without complete")


@contextlib.contextmanager
def _open_sink(address: Path) -> Iterator[str]:
    """The collector's URL. Errors: RuntimeError when it does not start."""
    process = subprocess.Popen([sys.executable, "-m", "bench.otlp_sink", str(address)])
    try:
        deadline = time.monotonic() + SINK_DEADLINE_S
        while not address.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the collector did not start")
            time.sleep(0.05)
        yield address.read_text().strip()
    finally:
        process.terminate()
        process.wait()


SCENARIO = Scenario(
    name="telemetry",
    what="Metrics, logs and traces (a tenth recorded) against none of them, by turns: POSTs by 24 "
    f"clients, {LINES:,} lines to {WATCHERS} readers.",
    figures=(
        Figure(name="posts_kept", unit="", at_least=0.95),
        Figure(name="posts_cpu", unit=""),
        Figure(name="posts_accepted_on", unit="/s"),
        Figure(name="posts_accepted_off", unit="/s"),
        Figure(name="posts_accepted_cpu_on", unit="µs each"),
        Figure(name="posts_accepted_cpu_off", unit="µs each"),
        Figure(name="stream_kept", unit="", at_least=0.95),
        Figure(name="stream_cpu", unit=""),
        Figure(name="stream_received_on", unit="/s"),
        Figure(name="stream_received_off", unit="/s"),
    ),
    measure=measure,
)
