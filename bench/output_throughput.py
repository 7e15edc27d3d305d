"""One command's output to one client: 100-byte lines, and that they are the same bytes.

The client only collects while the clock runs; afterwards every event is decoded, ids must have no
hole, and the lines' SHA-256 must be that of what the command wrote, in the stream and in
`…/output`. The size stays below what rdev keeps of a stream (64 MiB), so nothing may be dropped.
"""

import hashlib
import json
import time

import trio

from bench.client import Connection, create, open_connection
from bench.harness import Context, Figure, Measurement, Scenario
from bench.server import Server, open_server, open_state_dir

LINES = 600_000
LINE_BYTES = 100
PADDING = "x" * (LINE_BYTES - 11)
PROJECT = {"id": "bench"}
FILE = "lines.txt"
# Written once by awk; the measured command only copies it, so it is no part of the figure.
AWK = f'BEGIN {{ for (i = 0; i < {LINES}; i++) printf "%010d%s\\n", i, "{PADDING}" }}'
PREPARE = f"awk '{AWK}' > {FILE}"
COMPLETE = b"event: complete"


def measure(context: Context) -> Measurement:
    """Lines per second from the POST to `complete`, and what a line costs the server."""
    expected = hashlib.sha256(b"".join(_written(number) for number in range(LINES))).hexdigest()
    with open_state_dir() as state_dir, open_server(state_dir) as server:
        trio.run(_prepare, server)
        return context.repeat(lambda: trio.run(_once, server, expected))


def _written(number: int) -> bytes:
    return f"{number:010d}{PADDING}\n".encode()


async def _prepare(server: Server) -> None:
    async with open_connection(server) as connection:
        await create(connection, "/projects", PROJECT)
        command = await create(connection, "/projects/bench/shell", {"command": PREPARE})
        async with connection.stream(f"/commands/{command}/events") as body:
            while await body.receive():
                pass


async def _once(server: Server, expected: str) -> dict[str, float]:
    async with open_connection(server) as poster, open_connection(server) as watcher:
        cpu_began_s = server.cpu_s()
        began_s = time.perf_counter()
        command = await create(poster, "/projects/bench/shell", {"command": f"exec cat {FILE}"})
        received = await _collect(watcher, command)
        took_s = time.perf_counter() - began_s
        cpu_us = (server.cpu_s() - cpu_began_s) * 1e6
        status, stored = await poster.request("GET", f"/commands/{command}/output?stream=stdout")
    _compare("the stream", _sha256_of_lines(received), expected)
    if status != 200:
        raise RuntimeError(f"GET /commands/{command}/output: {status} {stored[:200]!r}")
    _compare("the output", hashlib.sha256(stored).hexdigest(), expected)
    return {
        "lines": LINES / took_s,
        "server_cpu": cpu_us / LINES,
        "server_peak_rss": server.rss_mib(peak=True),
    }


async def _collect(watcher: Connection, command: str) -> list[bytes]:
    """The stream to its end. Nothing is looked at: the client shares the cores with the server."""
    received = []
    async with watcher.stream(f"/commands/{command}/events") as body:
        while data := await body.receive():
            received.append(data)
    return received


def _sha256_of_lines(received: list[bytes]) -> str:
    """SHA-256 of the lines of all `output` events. Errors: RuntimeError for a hole in the ids, a
    gap, or an end without `complete`."""
    digest = hashlib.sha256()
    last_id = 0
    for block in b"".join(received).replace(b"\r\n", b"\n").split(b"\n\n"):
        fields = dict(_fields(block))
        if b"id" in fields:
            if int(fields[b"id"]) != last_id + 1:
                raise RuntimeError(f"event {fields[b'id']!r} follows {last_id}")
            last_id += 1
        if fields.get(b"event") == b"output":
            data = json.loads(fields[b"data"])
            digest.update(data["line"].encode() + (b"" if data.get("partial") else b"\n"))
    if COMPLETE not in received[-1] + (received[-2] if len(received) > 1 else b""):
        raise RuntimeError("the stream ended without complete")
    return digest.hexdigest()


def _fields(block: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of one event. Source: WHATWG HTML, "Server-sent events"."""
    split = (line.partition(b":") for line in block.split(b"\n") if line[:1] not in (b"", b":"))
    return [(name, value.removeprefix(b" ")) for name, _, value in split]


def _compare(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise RuntimeError(f"{what} is not what the command wrote ({found} for {expected})")


SCENARIO = Scenario(
    name="output_throughput",
    what=f"{LINES:,} lines of {LINE_BYTES} bytes of one command to one SSE client, from POST to "
    "`complete`.",
    figures=(
        Figure(name="lines", unit="/s", at_least=150_000),
        Figure(name="server_cpu", unit="µs a line"),
        Figure(name="server_peak_rss", unit="MiB"),
    ),
    measure=measure,
)
