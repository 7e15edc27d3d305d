"""Clients that mean harm over HTTP/2, against one server: what is not to be borne costs the client
its connection, and nobody else anything.

Frames are made by hand: a client's library refuses to send these.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import hpack
import pytest
import trio
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.app.server import Api, Server, until_async
from tests.faults import test_abuse
from tests.faults.test_abuse import connection, descriptors, under

server, api = test_abuse.server, test_abuse.api

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# How long a client that goes too far keeps its connection: the time of a head, and some.
CLOSED_DEADLINE_S = 60.0


def headers(
    server: Server, stream: int, *, path: str = "/health", method: str = "GET", **flags: bool
) -> HeadersFrame:
    """The head of a request, and its end unless `body` says that more comes."""
    fields = [
        (":method", method), (":path", path), (":scheme", "http"), (":authority", "t"),
        ("x-api-key", server.key), ("content-type", "application/json"),
    ]  # fmt: skip
    frame = HeadersFrame(stream, data=hpack.Encoder().encode(fields))
    frame.flags.add("END_HEADERS")
    if not flags.get("body"):
        frame.flags.add("END_STREAM")
    return frame


@asynccontextmanager
async def open_h2(server: Server) -> AsyncIterator[trio.SocketStream]:
    async with connection(server) as stream:
        await stream.send_all(PREFACE + SettingsFrame(0).serialize())
        yield stream


async def until_closed(stream: trio.SocketStream) -> None:
    """Read until the server has closed."""
    with trio.fail_after(CLOSED_DEADLINE_S), contextlib.suppress(trio.BrokenResourceError):
        async for _ in stream:
            pass


async def pour(server: Server, frames: bytes, *, times: int) -> None:
    """Send this again and again, reading what comes, until it is all sent or the server closes."""
    async with open_h2(server) as stream:

        async def send() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                for _ in range(times):
                    await stream.send_all(frames)
                await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await until_closed(stream)
            nursery.cancel_scope.cancel()


def joined(*frames: Frame) -> bytes:
    return b"".join(frame.serialize() for frame in frames)


async def rapid_resets(server: Server) -> None:
    """Requests that are given up in the same breath (CVE-2023-44487)."""
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(resets, server)


async def resets(server: Server) -> None:
    async with open_h2(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for first in range(1, 4_001, 200):
                pairs = [
                    joined(headers(server, n, path="/projects/demo"), RstStreamFrame(n))
                    for n in range(first, first + 200, 2)
                ]
                await stream.send_all(b"".join(pairs))


async def settings_flood(server: Server) -> None:
    """Each wants an acknowledgement (CVE-2019-9515)."""
    await pour(server, SettingsFrame(0, settings={4: 65_535}).serialize() * 1_000, times=50)


async def ping_flood(server: Server) -> None:
    """Each wants an answer (CVE-2019-9512)."""
    await pour(server, PingFrame(0, b"12345678").serialize() * 1_000, times=50)


async def empty_data(server: Server) -> None:
    """A body of nothing, over and over (CVE-2019-9518)."""
    start = headers(server, 1, path="/projects", method="POST", body=True).serialize()
    async with open_h2(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(start)
            for _ in range(50):
                await stream.send_all(DataFrame(1, b"").serialize() * 1_000)


async def continuations(server: Server) -> None:
    """A head without end (CVE-2024-27316)."""
    head = headers(server, 1)
    head.flags.discard("END_HEADERS")
    more = hpack.Encoder().encode([("x-more", "a" * 100)])
    async with open_h2(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(head.serialize())
            for _ in range(10_000):
                await stream.send_all(ContinuationFrame(1, more).serialize())
        await until_closed(stream)


async def too_many_streams(server: Server) -> None:
    """More at once than the server said it takes."""
    start = b"".join(
        headers(server, n, path="/projects", method="POST", body=True).serialize()
        for n in range(1, 1_001, 2)
    )
    async with open_h2(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(start)
        await until_closed(stream)


async def header_bombs(server: Server) -> None:
    """Little on the wire, much when it is unpacked."""
    encoder = hpack.Encoder()
    first = headers(server, 1)
    first.data += encoder.encode([("x-bomb", "a" * 3_000)])
    again = headers(server, 3)
    again.data += bytes([0x80 | 62]) * 10_000
    async with open_h2(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(joined(first, again))
        await until_closed(stream)


async def slow_bodies(server: Server) -> None:
    """A hundred in one connection, a byte of each."""
    start = b"".join(
        joined(headers(server, n, path="/projects", method="POST", body=True), DataFrame(n, b"{"))
        for n in range(1, 81, 2)
    )
    async with open_h2(server) as stream:
        await stream.send_all(start)
        with trio.move_on_after(3):
            async for _ in stream:
                pass


async def no_windows(server: Server) -> None:
    """Asks for everything and takes nothing (CVE-2019-9517)."""
    closed = SettingsFrame(0, settings={4: 0}).serialize()
    asked = b"".join(headers(server, n, path="/openapi.json").serialize() for n in range(1, 91, 2))
    async with open_h2(server) as stream:
        await stream.send_all(closed + asked)
        with trio.move_on_after(3):
            async for _ in stream:
                pass


async def faults(server: Server) -> None:
    """What a library's reader may not have thought of; each on a connection of its own."""
    odd = headers(server, 1)
    odd.data = hpack.Encoder().encode(
        [(":method", "G\xcbT"), (":path", "/"), (":scheme", "http"), (":authority", "t")]
    )
    connect = headers(server, 1)
    connect.data = hpack.Encoder().encode([(":method", "CONNECT"), (":authority", "t")])
    late = headers(server, 1, path="/nowhere", method="POST", body=True)
    priorities = joined(*(PriorityFrame(n, depends_on=0) for n in range(1, 4_001, 2)))
    for frames in (
        odd.serialize(),
        connect.serialize(),
        priorities,
        PriorityFrame(1, depends_on=1).serialize(),
        joined(PriorityFrame(1, depends_on=3), PriorityFrame(3, depends_on=1)),
        joined(PriorityFrame(1, depends_on=99), headers(server, 1)),
        WindowUpdateFrame(0, window_increment=2**31 - 1).serialize() * 3,
        WindowUpdateFrame(7, window_increment=1).serialize(),
        RstStreamFrame(9).serialize(),
        DataFrame(5, b"x").serialize(),
        b"\0\0\0\xff\0\0\0\0\1",
        b"\xff" * 1_000,
    ):
        async with open_h2(server) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(frames)
                await stream.send_eof()
            await until_closed(stream)
    async with open_h2(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(late.serialize())
            for _ in range(20):  # more of it after the answer
                await trio.sleep(0.01)
                await stream.send_all(DataFrame(1, b"x" * 1_000).serialize())
            await stream.send_eof()
        await until_closed(stream)


ATTACKS: list[Callable[[Server], Awaitable[None]]] = [
    rapid_resets,
    settings_flood,
    ping_flood,
    empty_data,
    continuations,
    too_many_streams,
    header_bombs,
    slow_bodies,
    no_windows,
    faults,
]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_an_attack_over_http2_leaves_nothing_behind_and_stops_nobody(
    server: Server,
    api: Api,
    attack: Callable[[Server], Awaitable[None]],
) -> None:
    """A fault that is logged with its trace ends the test: any client could fill the log."""
    async with trio.open_nursery() as warm:  # as many database connections as there will ever be
        for _ in range(100):
            warm.start_soon(api.get, "/projects/demo")
    before = descriptors(server)
    logged = len(server.log)
    await under(api, lambda: attack(server))
    await until_async(lambda: descriptors(server) <= before, "its descriptors are closed")
    assert "Traceback" not in server.log[logged:], server.log[logged:][-3_000:]
    assert '"level":"error"' not in server.log[logged:]
