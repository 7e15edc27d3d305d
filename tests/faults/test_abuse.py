"""Clients that mean harm, all at once against one server: it stays up, and nothing of them is left.

Each kind does its worst while an honest client goes on asking; afterwards the server has as many
descriptors as before. What the others feel is measured by `bench`, not here.
"""

import contextlib
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.app.server import Api, Server, metric, open_api, open_server, until_async

HONEST_DEADLINE_S = 20.0
# As far as the machine's own limit lets a test and a server go; both are raised to the hard limit.
IDLE_CONNECTIONS = 10_000
SPARE_DESCRIPTORS = 500
IN_FLIGHT_MAX = 100

Attack = Callable[[Server], Awaitable[None]]


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        more = {"RDEV_IN_FLIGHT_MAX": str(IN_FLIGHT_MAX)}
        with open_server(quick_place, RDEV_RATE_LIMIT_ADDRESS="off", **more) as server:
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    """An honest client with a key of its own."""
    async with open_api(server) as api:
        await api.project()
        rate = {"requests": 1_000_000, "window_s": 60}
        body = {"name": "honest", "scopes": ["projects:read"], "rate_limit": rate}
        made = await api.post("/keys", body)
        assert made.status_code == 201, made.text
        api.http.headers["Authorization"] = f"Bearer {made.json()['data']['key']}"
        yield api


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


@asynccontextmanager
async def connection(server: Server) -> AsyncIterator[trio.SocketStream]:
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        yield stream


async def sent(server: Server, *pieces: bytes) -> bytes:
    """Send the pieces; all that comes back until the server closes."""
    answer = b""
    async with connection(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await stream.send_all(piece)
            async for data in stream:
                answer += data
    return answer


def head(server: Server, *lines: str, path: str = "/projects", method: str = "POST") -> bytes:
    own = ("Host: t", f"X-API-Key: {server.key}", "Content-Type: application/json", *lines)
    return "\r\n".join([f"{method} {path} HTTP/1.1", *own, "", ""]).encode()


async def slow_heads(server: Server) -> None:
    """A byte of a head, and silence: closed after the time of a head."""

    async def one() -> None:
        async with connection(server) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nX: ")
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some(65_536) == b""

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(one)


async def slow_bodies(server: Server) -> None:
    """A head that promises a body, a byte of it, and the client gives up. Twice as many as there
    are places for requests in work (`RDEV_IN_FLIGHT_MAX`), in waves of what one key may have."""
    refused = 0

    async def one() -> None:
        nonlocal refused
        async with connection(server) as stream:
            await stream.send_all(head(server, "Content-Length: 1000") + b"{")
            with trio.move_on_after(20):
                answer = await stream.receive_some(65_536)
                assert answer.startswith(b"HTTP/1.1 503 "), answer[:200]
                refused += 1

    async with trio.open_nursery() as nursery:
        for begun in range(50, 2 * IN_FLIGHT_MAX + 1, 50):
            for _ in range(50):
                nursery.start_soon(one)
            await until_async(
                lambda begun=begun: metric(server, "rdev_http_reading") + refused == begun,
                "the wave waits",
            )
        assert refused == IN_FLIGHT_MAX
        nursery.cancel_scope.cancel()


async def large_bodies(server: Server) -> None:
    """Announced and not announced."""
    for lines, body in (
        (("Content-Length: 50000000", "Connection: close"), b"x" * 2_000_000),
        (("Transfer-Encoding: chunked", "Connection: close"), b"100000\r\n" + b"x" * 0x100000),
    ):
        answer = await sent(server, head(server, *lines), body, b"\r\n10\r\n" + b"x" * 16)
        assert b" 413 " in answer.split(b"\r\n")[0], answer[:200]


async def header_bombs(server: Server) -> None:
    """A line without end, and lines without end."""
    for _ in range(20):
        for bomb in (b"X: " + b"a" * 200_000, b"X: a\r\n" * 40_000):
            answer = await sent(server, b"GET / HTTP/1.1\r\n" + bomb)
            assert answer.startswith(b"HTTP/1.1 431 ")


async def malformed(server: Server) -> None:
    """No HTTP at all, and nearly HTTP."""
    for bad in (
        b"\0" * 100 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: t\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: t\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ):
        answer = await sent(server, bad)
        assert not answer or answer.split(b" ")[1] in (b"400", b"505"), (bad, answer[:100])


async def pipelines(server: Server) -> None:
    """A thousand requests in one write, half of them abandoned."""
    one = head(server, method="GET", path="/health")
    last = head(server, "Connection: close", method="GET", path="/health")
    answer = await sent(server, one * 999 + last)
    assert answer.count(b"HTTP/1.1 200 ") == 1_000
    async with connection(server) as stream:
        await stream.send_all(one * 1_000)


async def vanishing_streams(server: Server) -> None:
    """Event streams whose clients go at once."""
    async with open_api(server) as api:
        command = await api.submit("sleep 60")
        for _ in range(100):
            async with connection(server) as stream:
                path = f"/commands/{command}/events"
                await stream.send_all(head(server, method="GET", path=path))
                await stream.receive_some(10)
        await api.http.delete(f"/commands/{command}")
        await api.ended(command)


QUICK = (large_bodies, header_bombs, malformed, pipelines)
PATIENT = (slow_heads, slow_bodies, vanishing_streams)


async def honest(api: Api, done: trio.Event) -> int:
    """Asks until it is told to stop; every answer is right and comes in time."""
    asked = 0
    while not done.is_set():
        with trio.fail_after(HONEST_DEADLINE_S):
            answer = await api.get("/projects/demo")
        assert answer.status_code == 200, answer.text
        asked += 1
        await trio.sleep(0.02)
    return asked


async def under(api: Api, attack: Callable[[], Awaitable[None]]) -> None:
    """The attack, with an honest client beside it from before its beginning to its end."""
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(honest, api, done)
        await attack()
        done.set()


@pytest.mark.parametrize(
    "attack",
    [
        *(pytest.param(attack, marks=pytest.mark.slow, id=attack.__name__) for attack in QUICK),
        *(pytest.param(attack, marks=pytest.mark.full, id=attack.__name__) for attack in PATIENT),
    ],
)
async def test_an_attack_leaves_nothing_behind_and_stops_nobody(
    server: Server, api: Api, attack: Attack
) -> None:
    assert (await api.get("/projects/demo")).status_code == 200
    before = descriptors(server)
    await under(api, lambda: attack(server))
    await until_async(lambda: descriptors(server) <= before, "its descriptors are closed")
    assert server.process is not None
    assert server.process.poll() is None


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_ten_thousand_idle_connections_are_held_and_let_go(server: Server, api: Api) -> None:
    """As many as the limit of descriptors allows here; they say nothing, and go at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(IDLE_CONNECTIONS, hard - SPARE_DESCRIPTORS)
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    before = descriptors(server)

    async def idle() -> None:
        opened = [await trio.open_tcp_stream(host, int(port)) for _ in range(wanted)]
        for stream in opened:
            await stream.aclose()

    await under(api, idle)
    await until_async(lambda: descriptors(server) <= before, "its descriptors are closed")
