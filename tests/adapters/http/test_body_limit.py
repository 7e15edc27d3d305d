"""The body limit, on the wire."""

import pytest
import trio
from quart import Blueprint, request

from rdev.adapters.http.app import HttpLimits
from rdev.adapters.http.envelope import success

KEY_LINE = "X-API-Key: rdev_sk_test\r\n"
LIMIT_BYTES = 100_000


def resident_bytes() -> int:
    """The memory this process has now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def routes() -> Blueprint:
    made = Blueprint("made", __name__)

    @made.post("/read")
    async def read():
        return success(len(await request.get_data()))

    @made.post("/ignore")
    async def ignore():
        return success("ignored")

    @made.post("/wait")
    async def wait():
        await trio.sleep_forever()

    return made


async def chunked(wire, path: str, total_bytes: int) -> None:
    """Send a chunked body, until the server does not want it any more."""
    await wire.send(
        f"POST {path} HTTP/1.1\r\nHost: x\r\n{KEY_LINE}Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    piece = b"10000\r\n" + b"z" * 65536 + b"\r\n"
    try:
        for _ in range(total_bytes // 65536 + 1):
            await wire.send(piece)
        await wire.send(b"0\r\n\r\n")
    except trio.BrokenResourceError:
        pass


async def test_an_announced_body_over_the_limit_is_refused_before_it_comes(serve):
    site = await serve(routes(), limits=HttpLimits(body_bytes=LIMIT_BYTES))

    async with site.connect() as wire:
        await wire.send(
            f"POST /read HTTP/1.1\r\nHost: x\r\n{KEY_LINE}Content-Length: 100001\r\n\r\n".encode()
        )
        reply = await wire.reply()

    assert reply.status == 413
    assert "100000 bytes" in reply.json()["detail"]
    assert reply.header("x-request-id") == "req-1"
    assert site.telemetry.refused == ["body"]
    assert site.telemetry.finished == [("POST", "unknown", 413)]


async def test_a_body_of_exactly_the_limit_is_taken(serve):
    site = await serve(routes(), limits=HttpLimits(body_bytes=LIMIT_BYTES))

    plain = await site.request("POST", "/read", body=b"x" * LIMIT_BYTES)
    async with site.connect() as wire:
        await wire.send(
            f"POST /read HTTP/1.1\r\nHost: x\r\n{KEY_LINE}Transfer-Encoding: chunked\r\n\r\n"
            f"{LIMIT_BYTES:x}\r\n{'x' * LIMIT_BYTES}\r\n0\r\n\r\n".encode()
        )
        pieces = await wire.reply()

    assert plain.json()["data"] == pieces.json()["data"] == LIMIT_BYTES


@pytest.mark.parametrize("path", ["/read", "/wait", "/nowhere"])
async def test_a_chunked_body_over_the_limit_is_refused_and_the_answer_arrives(serve, path):
    site = await serve(routes(), limits=HttpLimits(body_bytes=LIMIT_BYTES))

    async with site.connect() as wire:
        await chunked(wire, path, LIMIT_BYTES * 3)
        reply = await wire.reply()

    assert reply.status == (404 if path == "/nowhere" else 413)
    assert reply.header("content-type") == "application/problem+json"


async def test_an_early_answer_survives_the_rest_of_the_body(serve):
    site = await serve(routes(), limits=HttpLimits(body_bytes=4_000_000))

    async with site.connect() as wire:
        head = f"POST /ignore HTTP/1.1\r\nHost: x\r\n{KEY_LINE}Content-Length: 3000000\r\n\r\n"
        await wire.send(head.encode())
        await wire.head()
        for _ in range(30):
            await wire.send(b"x" * 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/read", "/wait"])
async def test_a_huge_chunked_body_costs_no_memory(serve, path):
    site = await serve(routes())
    base = resident_bytes()
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, resident_bytes() - base)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async with site.connect() as wire:
            await chunked(wire, path, 200_000_000)
        nursery.cancel_scope.cancel()

    # Two million for the limit itself on both sides, the rest for buffers and for the runtime.
    assert peak < 20_000_000
