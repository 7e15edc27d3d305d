"""What others feel while clients mean harm: an honest client's latency without and under each kind.

One server; two honest connections ask for a project every `PACE_S`. The harm comes from a process
of its own with the same key, at a pace that leaves the machine's cores to the server: what is
measured is what a client can take from others, not how many clients a machine has. Each kind has
`SETTLE_S` and `SLICE_S`; quiet is measured before, between and after. Bounded by that: some 75 s.
"""

import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

import hpack
import trio
from hyperframe.frame import HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from bench.client import Connection, create, open_connection
from bench.harness import Context, Figure, Measurement, Scenario, percentile
from bench.server import Server, open_server, open_state_dir

SLICE_S = 4.0
SETTLE_S = 2.0
PACE_S = 0.005
HONEST = 2
PATIENCE_S = 10.0

IDLE = 2_000
SLOW = 400
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Target:
    """Where the harm goes, with a key that is good."""

    def __init__(self, host: str, port: int, key: str) -> None:
        """Nothing is opened."""
        self.host, self.port, self.key = host, port, key

    def head(self, *lines: str, path: str = "/projects", method: str = "POST") -> bytes:
        """The head of a request."""
        own = ("Host: t", f"X-API-Key: {self.key}", "Content-Type: application/json", *lines)
        return "\r\n".join([f"{method} {path} HTTP/1.1", *own, "", ""]).encode()

    async def say(self, data: bytes, *, listen_s: float) -> None:
        """On a connection of its own: say it, and read on for so long."""
        with suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream(self.host, self.port) as stream:
                with trio.move_on_after(listen_s):
                    await stream.send_all(data)
                    while await stream.receive_some(65_536):
                        pass

    async def many(self, data: bytes, count: int) -> None:
        """So many connections that say it and stay."""
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(self._stay, data)
                await trio.sleep(0.001)

    async def often(self, data: bytes, *, each_s: float, listen_s: float = 1.0) -> None:
        """A new connection that says it, each so many seconds."""
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(lambda: self.say(data, listen_s=listen_s))
                await trio.sleep(each_s)

    async def _stay(self, data: bytes) -> None:
        while True:
            await self.say(data, listen_s=60.0)
            await trio.sleep(1.0)


def _request(target: Target, stream: int) -> HeadersFrame:
    fields = [
        (":method", "GET"), (":path", "/projects/demo"), (":scheme", "http"), (":authority", "t"),
        ("x-api-key", target.key),
    ]  # fmt: skip
    frame = HeadersFrame(stream, data=hpack.Encoder().encode(fields))
    frame.flags |= {"END_HEADERS", "END_STREAM"}
    return frame


def _resets(target: Target) -> bytes:
    pairs = [
        _request(target, n).serialize() + RstStreamFrame(n).serialize() for n in range(1, 99, 2)
    ]
    return _PREFACE + SettingsFrame(0).serialize() + b"".join(pairs)


def _pings() -> bytes:
    return _PREFACE + SettingsFrame(0).serialize() + PingFrame(0, b"12345678").serialize() * 5_000


KINDS: dict[str, Callable[[Target], Awaitable[None]]] = {
    "idle_connections": lambda to: to.many(b"", IDLE),
    "slow_heads": lambda to: to.many(b"GET / HTTP/1.1\r\nX: ", SLOW),
    "slow_bodies": lambda to: to.many(to.head("Content-Length: 1000") + b"{", SLOW),
    "large_bodies": lambda to: to.often(
        to.head("Content-Length: 2000000") + b"x" * 2_000_000, each_s=0.5
    ),
    "header_bombs": lambda to: to.often(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, each_s=0.1),
    "malformed": lambda to: to.often(b"\0" * 100 + b"\r\n\r\n", each_s=0.05),
    "pipelines": lambda to: to.often(to.head(path="/health", method="GET") * 50, each_s=0.5),
    "resets": lambda to: to.often(_resets(to), each_s=0.5),
    "pings": lambda to: to.often(_pings(), each_s=0.2),
}


def measure(context: Context) -> Measurement:
    """One run: its slices are what is repeated."""
    settings = {"RDEV_IN_FLIGHT_MAX": "200", "RDEV_RATE_LIMIT": "1000000/60s"}
    with open_state_dir() as state_dir, open_server(state_dir, **settings) as server:
        return trio.run(_measure, server)


async def _measure(server: Server) -> dict[str, float | list[float]]:
    found: dict[str, float | list[float]] = {}
    quiet_ms: list[float] = []
    async with open_connection(server) as first, open_connection(server) as second:
        await create(first, "/projects", {"id": "demo"})
        clients = (first, second)
        under: dict[str, list[float]] = {}
        await _asked(clients)  # warm
        for kind in KINDS:
            quiet_ms += await _asked(clients, for_s=SLICE_S / 4)
            under[kind] = await _under(kind, server, clients)
        quiet_ms += await _asked(clients, for_s=SLICE_S / 4)
    for name, took_ms in {"quiet": quiet_ms, **under}.items():
        found[f"{name}_p50"] = percentile(took_ms, 50)
        found[f"{name}_p99"] = percentile(took_ms, 99)
        found[f"{name}_ratio"] = percentile(took_ms, 99) / percentile(quiet_ms, 99)
    return found


async def _under(kind: str, server: Server, clients: tuple[Connection, ...]) -> list[float]:
    """Milliseconds of the honest requests while the harm is done; it ends with the block."""
    argv = [sys.executable, "-m", "bench.abuse", kind, server.host, str(server.port), server.key]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        await _asked(clients, for_s=SETTLE_S)
        return await _asked(clients)
    finally:
        process.kill()
        process.wait()


async def _asked(clients: tuple[Connection, ...], *, for_s: float = SLICE_S) -> list[float]:
    took_ms: list[float] = []
    until_s = trio.current_time() + for_s

    async def ask(client: Connection) -> None:
        while (began_s := trio.current_time()) < until_s:
            with trio.fail_after(PATIENCE_S):
                status, body = await client.request("GET", "/projects/demo")
            if status != 200:
                raise RuntimeError(f"an honest request was answered {status}: {body!r}")
            took_ms.append((trio.current_time() - began_s) * 1_000)
            await trio.sleep(PACE_S)

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(ask, client)
    return took_ms


SCENARIO = Scenario(
    name="abuse",
    what="an honest client's latency without and under each kind of abuse, in one run",
    figures=(
        Figure(name="quiet_p50", unit="ms"),
        Figure(name="quiet_p99", unit="ms"),
        *(
            figure
            for kind in KINDS
            for figure in (
                Figure(name=f"{kind}_p50", unit="ms"),
                Figure(name=f"{kind}_p99", unit="ms"),
                Figure(name=f"{kind}_ratio", unit="×", at_most=2.0),
            )
        ),
    ),
    measure=measure,
)


async def _harm(kind: str, target: Target) -> None:
    with trio.move_on_after(SETTLE_S + SLICE_S + PATIENCE_S):
        await KINDS[kind](target)


if __name__ == "__main__":
    trio.run(_harm, sys.argv[1], Target(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
