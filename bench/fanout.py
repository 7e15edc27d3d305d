"""Event streams: how many events reach how many clients, beside nchan and sse-starlette.

The server is pinned to one core; the clients, the publisher of a peer and the database have the
others. The first rows hand out what is published, without a database, because peers have none; the
others are the whole server. A machine that others use spoils rates, so what an event costs in CPU
stands beside them, and what the client took: where that is as much as the server, it is the client
that was measured.
"""

import contextlib
import json
import math
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from bench.client import create, open_connection
from bench.harness import Context, Figure, Measurement, Scenario, ratios
from bench.peers import streams
from bench.peers.streams import StreamServer
from bench.queue import PEERS_FOLDER
from bench.server import Server, open_server, open_state_dir

HERE = Path(__file__).parents[1]
KEY = "bench-" + secrets.token_hex(24)
COMMAND = "cmd_" + "0" * 31 + "1"
STREAM = f"/commands/{COMMAND}/events"
SERVER_CORE = 0
SETTINGS = {"RDEV_STREAMS_MAX": "20000", "RDEV_IN_FLIGHT_MAX": "1000", "RDEV_LOG_LEVEL": "warn"}
PER_PROJECT = 4  # the cap of a project's shells
LIFE = 4  # events of a command besides its output: queued, running, its end, complete

Step = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    readers: int = 1_000
    events: int = 600
    commands: int = 50
    readers_each: int = 20
    lines: int = 1_000
    lines_per_s: float = 100.0
    idle: int = 3_000
    connects: int = 10_000
    history: int = 100_000
    stalled: int = 100
    paced_per_s: int = 50
    paced_s: int = 8


class Talk:
    """Lines in, JSON lines out."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Step:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")
        told: Step = json.loads(line)
        return told


@contextlib.contextmanager
def _process(argv: tuple[str, ...], plan: Mapping[str, object], core: int | None) -> Iterator[Talk]:
    """A program that is spoken to line by line; it ends with its input."""
    prefix = ("taskset", "-c", str(core)) if core is not None else ()
    process = subprocess.Popen(
        [*prefix, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE
    )
    talk = Talk(process)
    try:
        talk.say(json.dumps(plan))
        yield talk
    finally:
        try:
            with contextlib.suppress(BrokenPipeError):
                process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()


def _load(plan: Mapping[str, object]) -> contextlib.AbstractContextManager[Talk]:
    argv = (sys.executable, "-m", "bench.sse_load")
    return _process(argv, plan, _other_core())


def _other_core() -> int | None:
    cores = sorted(os.sched_getaffinity(0) - {SERVER_CORE})
    return cores[0] if len(cores) == 1 else None


# Without a database


def hand_out(server: StreamServer, sizes: Sizes, burst: int) -> Step:
    """Events to all readers of one stream, burst after burst."""
    plan = {
        "clients": sizes.readers,
        "events": sizes.events if burst > 1 else sizes.events // 2,
        "burst": burst,
        "key": KEY,
        "core": SERVER_CORE,
    }
    with _process(server.argv, plan, None if server.pins_itself else SERVER_CORE) as serving:
        load = {
            "port": serving.hear()["port"],
            "paths": [server.path],
            "clients": sizes.readers,
            "headers": {"X-API-Key": KEY},
            "events": plan["events"],
            "marker": server.marker,
        }
        with _load(load) as clients:
            clients.hear()
            serving.say("go")
            found = clients.hear()
            cost = serving.hear()
            clients.say("end")
        serving.say("end")
    return {
        "per_s": found["events"] / found["took_s"],
        "cpu_us": cost["cpu_s"] / found["events"] * 1e6,
        "client_cpu_us": found["client_cpu_s"] / found["events"] * 1e6,
    }


def paced(sizes: Sizes, *, stalled: int) -> Step:
    """Events at an even pace to readers that read, beside others that do not and have megabytes
    before them."""
    events = sizes.paced_per_s * sizes.paced_s
    plan = {
        "clients": sizes.readers + stalled,
        "events": events,
        "burst": 1,
        "key": KEY,
        "per_s": sizes.paced_per_s,
        "history_mib": 16,
    }
    server = streams.rdev(STREAM)
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(_process(server.argv, plan, SERVER_CORE))
        told = serving.hear()
        load = {"port": told["port"], "headers": {"X-API-Key": KEY}, "events": events}
        fast = load | {
            "paths": [f"{STREAM}?after={told['last_seq']:.0f}"],
            "clients": sizes.readers,
            "stamps": r'"line":"(\d+) ',
        }
        clients = stack.enter_context(_load(fast))
        clients.hear()
        before = _rss_mib(serving.pid)
        if stalled:
            slow = load | {"paths": [STREAM], "clients": stalled, "stalled": stalled}
            stack.enter_context(_load(slow)).hear()
        serving.say("go")
        found = clients.hear()
        growth = _rss_mib(serving.pid) - before
        serving.hear()
    return {"p99_ms": found["p99_ms"], "growth_mib": growth}


def _rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


# The whole server


def whole(sizes: Sizes) -> Step:
    """The rows of the whole server, one after the other."""
    with open_state_dir() as state_dir, open_server(state_dir, **SETTINGS) as server:
        os.sched_setaffinity(server.pid, {SERVER_CORE})
        trio.run(_make_projects, server, sizes)
        return _replay(server, sizes) | _shells(server, sizes, state_dir) | _connects(server, sizes)


async def _make_projects(server: Server, sizes: Sizes) -> None:
    async with open_connection(server) as connection:
        for number in range(-(-sizes.commands // PER_PROJECT)):
            await create(connection, "/projects", {"id": f"bench-{number}"})


async def _submit(server: Server, scripts: list[str]) -> list[str]:
    """The commands' ids when all of them run."""
    async with open_connection(server) as connection:
        ids = [
            await create(
                connection,
                f"/projects/bench-{number // PER_PROJECT}/shell",
                {"command": script, "timeout_s": 3_600},
            )
            for number, script in enumerate(scripts)
        ]
        for command in ids:
            status = b""
            while b'"status":"queued"' in (status or b'"status":"queued"'):
                _, status = await connection.request("GET", f"/commands/{command}")
                await trio.sleep(0.01)
    return ids


async def _cancel(server: Server, ids: list[str]) -> None:
    async with open_connection(server) as connection:
        for command in ids:
            await connection.request("DELETE", f"/commands/{command}")
            await connection.request("GET", f"/commands/{command}")


def _plan(server: Server, ids: list[str], clients: int, **more: object) -> dict[str, object]:
    return {
        "port": server.port,
        "paths": [f"/commands/{command}/events" for command in ids],
        "clients": clients,
        "headers": {"X-API-Key": server.key},
        **more,
    }


def _replay(server: Server, sizes: Sizes) -> Step:
    """A client that was away comes back to a long history; then twenty at once."""
    script = f"seq -f %060.0f {sizes.history}"
    ids = trio.run(_submit, server, [script])
    events = sizes.history + LIFE
    found: Step = {}
    trio.run(_until_ended, server, ids[0])
    for name, clients in (("replay", 1), ("replay_20", 20)):
        cpu_began_s = server.cpu_s()
        with _load(_plan(server, ids, clients, events=events)) as load:
            load.hear()
            told = load.hear()
            load.say("end")
        found[f"{name}_per_s"] = told["events"] / told["since_connect_s"]
        found[f"{name}_cpu_us"] = (server.cpu_s() - cpu_began_s) / told["events"] * 1e6
    return found


def _keep_commands_off_the_servers_core(projects: Path) -> None:
    """Children inherit the server's core; where rdev is used, commands run on other machines."""
    others = os.sched_getaffinity(0) - {SERVER_CORE}
    while inside := [pid for pid in _processes_in(projects) if SERVER_CORE in _cores_of(pid)]:
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(pid, others)


def _processes_in(folder: Path) -> Iterator[int]:
    """Whose working directory is in the folder: commands, and what supervises and follows them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                if (entry / "cwd").readlink().is_relative_to(folder):
                    yield int(entry.name)


def _cores_of(pid: int) -> set[int]:
    try:
        return os.sched_getaffinity(pid)
    except ProcessLookupError:
        return set()


async def _until_ended(server: Server, command: str) -> None:
    async with open_connection(server) as connection:
        answer = b"running"
        while b'"status":"succeeded"' not in answer:
            _, answer = await connection.request("GET", f"/commands/{command}")
            await trio.sleep(0.02)


def lines(sizes: Sizes) -> Step:
    """Lines of many commands, which are one program, to many readers each."""
    with open_state_dir() as folder:
        path = str(folder / "writer")
        with _writer(sizes, socket=path, commands=sizes.commands) as writer:
            writer.hear()
            more = SETTINGS | {"BENCH_WRITER": path}
            with open_server(folder, program="bench.lines_server", **more) as server:
                os.sched_setaffinity(server.pid, {SERVER_CORE})
                trio.run(_make_projects, server, sizes)
                ids = trio.run(_submit, server, ["true"] * sizes.commands)
                before = trio.run(_loop_lags, server)
                found = _watched("lines", writer, server, sizes, ids)
                after = trio.run(_loop_lags, server)
    late = {bound_s: count - before[bound_s] for bound_s, count in after.items()}
    return found | {"lines_loop_lag_p99_ms": _quantile(late, 0.99) * 1_000}


async def _loop_lags(server: Server) -> dict[float, float]:
    """How often the event loop was at most so late (seconds), as the server tells."""
    async with open_connection(server) as connection:
        _, body = await connection.request("GET", "/metrics")
    found = re.findall(r'rdev_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', body.decode())
    return {float(bound_s): float(count) for bound_s, count in found}


def _quantile(counts: Mapping[float, float], share: float) -> float:
    """As `histogram_quantile`: linear within its bucket; the last bound where it is beyond."""
    wanted, below, below_s = counts[math.inf] * share, 0.0, 0.0
    for bound_s, count in counts.items():
        if count >= wanted:
            part = (wanted - below) / (count - below) if count > below else 1.0
            return below_s if math.isinf(bound_s) else below_s + (bound_s - below_s) * part
        below, below_s = count, bound_s
    return below_s


def _shells(server: Server, sizes: Sizes, folder: Path) -> Step:
    """The same with commands that are shells of this machine, which take most of it."""
    paths = [str(folder / f"fifo-{number}") for number in range(sizes.commands)]
    for path in paths:
        os.mkfifo(path)
    ids = trio.run(_submit, server, [f"exec cat {path}" for path in paths])
    _keep_commands_off_the_servers_core(folder / "projects")
    with _writer(sizes, fifos=paths) as writer:
        return _watched("shells", writer, server, sizes, ids)


def _writer(sizes: Sizes, **commands: object) -> contextlib.AbstractContextManager[Talk]:
    argv = (sys.executable, "-m", "bench.line_writer")
    plan = {"lines": sizes.lines, "per_s": sizes.lines_per_s, **commands}
    return _process(argv, plan, _other_core())


def _watched(name: str, writer: Talk, server: Server, sizes: Sizes, ids: list[str]) -> Step:
    """What the clients say when they have seen all, and what it cost."""
    clients = sizes.commands * sizes.readers_each
    plan = _plan(server, ids, clients, events=sizes.lines + LIFE, stamps=r'"line":"(\d+) ')
    with _load(plan) as load:
        load.hear()
        cpu_began_s = server.cpu_s()
        writer.say("go")
        told = load.hear()
        cpu_s = server.cpu_s() - cpu_began_s
        load.say("end")
    return {
        f"{name}_p50_ms": told["p50_ms"],
        f"{name}_p99_ms": told["p99_ms"],
        f"{name}_delivered": told["events"] - LIFE * clients,
        f"{name}_cpu_us": cpu_s / told["events"] * 1e6,
        f"{name}_server_busy": cpu_s / told["took_s"] * 100,
        f"{name}_client_busy": told["client_cpu_s"] / told["took_s"] * 100,
    }


def _connects(server: Server, sizes: Sizes) -> Step:
    """Clients that only watch: what each costs, and how fast they come."""
    ids = trio.run(_submit, server, ["sleep 3600"] * sizes.commands)
    found: Step = {}
    with _load(_plan(server, ids, sizes.commands)) as warm:
        warm.hear()
    for name, clients in (("idle", sizes.idle), ("connects", sizes.connects)):
        descriptors = _descriptors(server)
        before, cpu_began_s = server.rss_mib(), server.cpu_s()
        with _load(_plan(server, ids, clients)) as load:
            found[f"{name}_per_s"] = load.hear()["connects_per_s"]
            found[f"{name}_cpu_us"] = (server.cpu_s() - cpu_began_s) / clients * 1e6
            found[f"{name}_kib"] = (server.rss_mib() - before) * 1024 / clients
            load.say("end")
        _until_left(server, descriptors)
    trio.run(_cancel, server, ids)
    return found


def _until_left(server: Server, descriptors: int) -> None:
    """Wait until the server has closed what the clients left."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and _descriptors(server) > descriptors + 10:
        time.sleep(0.1)


def _descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def once(sizes: Sizes, peers: list[StreamServer]) -> Step:
    """All rows, the peers beside rdev."""
    found: Step = {}
    for name, burst in (("bursts", 10), ("singles", 1)):
        for server in (streams.rdev(STREAM), *peers):
            step = hand_out(server, sizes, burst)
            found |= {f"{name}_{server.name}_{key}": value for key, value in step.items()}
    without, with_stalled = paced(sizes, stalled=0), paced(sizes, stalled=sizes.stalled)
    found["paced_p99_ms"] = without["p99_ms"]
    found["stalled_p99_ms"] = with_stalled["p99_ms"]
    found["stalled_to_without"] = with_stalled["p99_ms"] / without["p99_ms"]
    found["stalled_growth_mib"] = with_stalled["growth_mib"]
    return found | lines(sizes) | whole(sizes)


def measure(context: Context) -> Measurement:
    """Every row, repetition by repetition, with ratios of what was measured in the same one."""
    peers = streams.install(PEERS_FOLDER)
    found: dict[str, list[float]] = context.repeat(lambda: once(Sizes(), peers))
    missing = float("nan")
    for name in ("bursts", "singles"):
        mine = found[f"{name}_rdev_per_s"]
        for peer in _PEERS:
            theirs = found.get(f"{name}_{peer}_per_s")
            found[f"{name}_to_{peer}"] = ratios(mine, theirs) if theirs else [missing]
            found.setdefault(f"{name}_{peer}_per_s", [missing])
            found.setdefault(f"{name}_{peer}_cpu_us", [missing])
    return found


_PEERS = ("nchan", "sse_starlette")
_BUFFERS_MIB = 100 * 262_144 / 2**20 + 64


def _handed_out(name: str, *, at_least: float, to: tuple[float, float]) -> tuple[Figure, ...]:
    return (
        Figure(name=f"{name}_rdev_per_s", unit="/s", at_least=at_least),
        *(Figure(name=f"{name}_{peer}_per_s", unit="/s") for peer in _PEERS),
        *(
            Figure(name=f"{name}_to_{peer}", unit="×", at_least=least)
            for peer, least in zip(_PEERS, to, strict=True)
        ),
        Figure(name=f"{name}_rdev_cpu_us", unit="µs an event"),
        *(Figure(name=f"{name}_{peer}_cpu_us", unit="µs an event") for peer in _PEERS),
        Figure(name=f"{name}_rdev_client_cpu_us", unit="µs an event"),
    )


# So little that it only shows that the rows can be measured.
SMALL = Sizes(
    readers=20,
    events=40,
    commands=2,
    readers_each=3,
    lines=20,
    idle=20,
    connects=20,
    history=500,
    stalled=2,
    paced_s=1,
)

SCENARIO = Scenario(
    name="fanout",
    what="Events to 1,000 readers of one stream in bursts of 10 and one by one, beside nchan and "
    "sse-starlette; 50 commands with 100 lines/s and 20 readers each through the whole server, "
    "as one program (`lines`) and as shells of this machine (`shells`); idle, stalled, connecting "
    "and returning clients. The server has one core.",
    figures=(
        *_handed_out("bursts", at_least=800_000, to=(3, 10)),
        *_handed_out("singles", at_least=150_000, to=(0.8, 2.5)),
        Figure(name="lines_p50_ms", unit="ms"),
        Figure(name="lines_p99_ms", unit="ms", at_most=150),
        Figure(name="lines_delivered", unit="", at_least=50 * 20 * 1_000),
        Figure(name="lines_cpu_us", unit="µs an event"),
        Figure(name="lines_server_busy", unit="% of a core"),
        Figure(name="lines_client_busy", unit="% of a core"),
        Figure(name="lines_loop_lag_p99_ms", unit="ms", at_most=20),
        Figure(name="shells_p50_ms", unit="ms"),
        Figure(name="shells_p99_ms", unit="ms"),
        Figure(name="shells_delivered", unit="", at_least=50 * 20 * 1_000),
        Figure(name="shells_cpu_us", unit="µs an event"),
        Figure(name="shells_server_busy", unit="% of a core"),
        Figure(name="shells_client_busy", unit="% of a core"),
        Figure(name="idle_kib", unit="KiB a client", at_most=35),
        Figure(name="paced_p99_ms", unit="ms"),
        Figure(name="stalled_p99_ms", unit="ms"),
        Figure(name="stalled_to_without", unit="×", at_most=1.2),
        Figure(name="stalled_growth_mib", unit="MiB", at_most=_BUFFERS_MIB),
        Figure(name="connects_per_s", unit="/s", at_least=1_000),
        Figure(name="connects_cpu_us", unit="µs a connect"),
        Figure(name="replay_per_s", unit="/s", at_least=500_000),
        Figure(name="replay_20_per_s", unit="/s"),
        Figure(name="replay_cpu_us", unit="µs an event"),
    ),
    measure=measure,
)
