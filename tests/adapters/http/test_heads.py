"""Heads that not every server reads alike: refused with words, closed, and reach no route."""

import pytest
from quart import Blueprint

from rdev.adapters.http.envelope import success
from tests.adapters.http.conftest import KEY, Serve

PROBED = b"GET /smuggled HTTP/1.1\r\nHost: t\r\nX-API-Key: " + KEY.encode() + b"\r\n\r\n"


def routes(seen: list[str]) -> Blueprint:
    found = Blueprint("found", __name__)

    @found.get("/smuggled")
    async def smuggled():
        seen.append("smuggled")
        return success("reached")

    @found.post("/front")
    async def front():
        seen.append("front")
        return success("reached")

    return found


def head(*lines: bytes, method: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    own = (b"Host: t", b"X-API-Key: " + KEY.encode(), *lines)
    return method + b" /front HTTP/" + version + b"\r\n" + b"\r\n".join(own) + b"\r\n\r\n"


CHUNKED_END = b"0\r\n\r\n"
# What a server in front may take for one request and one behind for two, or the other way round.
SMUGGLED = {
    "CL.TE": head(b"Content-Length: 5", b"Transfer-Encoding: chunked") + CHUNKED_END + PROBED,
    "TE.CL": head(b"Transfer-Encoding: chunked", b"Content-Length: 4") + b"0\r\n\r\n" + PROBED,
    "CL.CL": head(b"Content-Length: 0", b"Content-Length: 9") + PROBED,
    "CL list": head(b"Content-Length: 0, 9") + PROBED,
    "CL sign": head(b"Content-Length: +0") + PROBED,
    "CL hex": head(b"Content-Length: 0x0") + PROBED,
    "CL underscore": head(b"Content-Length: 0_0") + PROBED,
    "CL negative": head(b"Content-Length: -1") + PROBED,
    "TE.TE": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")
    + CHUNKED_END
    + PROBED,
    "TE other": head(b"Transfer-Encoding: xchunked") + CHUNKED_END + PROBED,
    "TE list": head(b"Transfer-Encoding: gzip, chunked") + CHUNKED_END + PROBED,
    "TE space": head(b"Transfer-Encoding : chunked") + CHUNKED_END + PROBED,
    "TE in 1.0": head(b"Transfer-Encoding: chunked", version=b"1.0") + CHUNKED_END + PROBED,
    "TE and CL in 1.0": head(b"Content-Length: 5", b"Transfer-Encoding: chunked", version=b"1.0")
    + CHUNKED_END
    + PROBED,
    "chunk size sign": head(b"Transfer-Encoding: chunked") + b"+0\r\n\r\n" + PROBED,
    "chunk size hex": head(b"Transfer-Encoding: chunked") + b"0x0\r\n\r\n" + PROBED,
    "NUL in a value": head(b"X: a\0b") + PROBED,
    "space before the colon": head(b"X : a") + PROBED,
    "no name": head(b": a") + PROBED,
    "space in front": b" " + head() + PROBED,
    "CR alone": head(b"X: a\rContent-Length: 9") + PROBED,
    "no host": b"POST /front HTTP/1.1\r\n\r\n" + PROBED,
    "two hosts": head(b"Host: u") + PROBED,
}


@pytest.mark.parametrize("how", SMUGGLED)
async def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(
    serve: Serve, how: str
) -> None:
    seen: list[str] = []
    site = await serve(routes(seen))
    async with site.connect() as wire:
        await wire.send(SMUGGLED[how])
        reply = await wire.reply()
        rest = await wire.closed()
    assert reply.status in (400, 501), reply
    assert reply.header("content-type") == "application/problem+json"
    assert reply.header("connection") == "close"
    assert reply.json()["error"]["code"] == "BAD_REQUEST"
    assert reply.json()["meta"]["request_id"] == reply.header("x-request-id")
    assert rest == b""
    # A route has its request before its body is read.
    assert seen == (["front"] if how.startswith("chunk") and seen else [])


async def test_a_head_that_is_too_large_is_431_with_words(serve: Serve) -> None:
    site = await serve(routes([]))
    for bomb in (b"X: " + b"a" * 70_000, b"\r\n".join(b"X%d: a" % n for n in range(9_000))):
        async with site.connect() as wire:
            await wire.send(head(bomb))
            reply = await wire.reply()
            assert await wire.closed() == b""
        assert reply.status == 431
        assert reply.header("content-type") == "application/problem+json"
        assert "too large" in reply.json()["detail"]


async def test_an_upgrade_to_cleartext_http2_is_not_heeded(serve: Serve) -> None:
    seen: list[str] = []
    site = await serve(routes(seen))
    async with site.connect() as wire:
        upgrade = (b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMA")
        await wire.send(head(*upgrade))
        reply = await wire.reply()
        assert reply.status == 200
        await wire.send(PROBED)
        assert (await wire.reply()).status == 200
    assert seen == ["front", "smuggled"]


async def test_a_refused_head_request_gets_no_body(serve: Serve) -> None:
    site = await serve(routes([]))
    async with site.connect() as wire:
        await wire.send(head(b"Content-Length: 5", b"Transfer-Encoding: chunked", method=b"HEAD"))
        answer = await wire.closed()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")


async def test_pipelined_requests_are_answered_in_order(serve: Serve) -> None:
    seen: list[str] = []
    site = await serve(routes(seen))
    async with site.connect() as wire:
        await wire.send((head(b"Content-Length: 0") + PROBED) * 20)
        statuses = [(await wire.reply()).status for _ in range(40)]
    assert statuses == [200] * 40
    assert seen == ["front", "smuggled"] * 20


async def test_a_client_that_goes_on_sending_after_a_refusal_is_let_go(serve: Serve) -> None:
    site = await serve(routes([]))
    async with site.connect() as wire:
        await wire.send(head(b"X: " + b"a" * 70_000))
        reply = await wire.reply()
        assert reply.status == 431
        await wire.send(b"b" * 500_000)
    again = await site.request("POST", "/front")
    assert again.status == 200
