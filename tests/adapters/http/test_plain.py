"""Routes without Quart: a body that nobody asked for holds nothing up."""

import pytest
import trio
from hyperframe.frame import DataFrame, RstStreamFrame, SettingsFrame

from rdev.adapters.http.plain import Asked, PlainRoute
from rdev.adapters.http.server import ConnectionTimes
from tests.adapters.http.conftest import KEY
from tests.adapters.http.test_frames import PREFACE, joined, request

pytestmark = pytest.mark.slow  # the time that the rest of a body is read

CHUNKS = b"1\r\nx\r\n" * 40


async def nothing(asked: Asked) -> None:
    await asked.send({"type": "http.response.start", "status": 204, "headers": []})
    await asked.send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("end", [b"", b"0\r\n\r\n"], ids=["goes_on", "ends"])
async def test_a_body_that_no_plain_route_wants_ends_with_the_connection(
    serve, eventually, method, end
):
    """In many pieces it filled the queue that nobody read, and the end of the answer waited behind
    it for ever: the connection was never closed, and no stop came to its end."""
    site = await serve(
        plain=[PlainRoute("/nothing", nothing)], times=ConnectionTimes(write_s=0.2), grace_s=0.2
    )
    head = f"{method} /nothing HTTP/1.1\r\nHost: t\r\nX-API-Key: {KEY}\r\n"
    async with site.connect() as wire:
        await wire.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS + end)
        await wire.head()
    await eventually(lambda: site.server.open_connections == 0)
    site.server.stop()
    await site.done.wait()


async def test_a_reset_behind_many_pieces_of_a_body_ends_with_the_connection(serve, eventually):
    """HTTP/2: who read the connection waited for room in the queue of a request that was over."""

    async def slowly(asked: Asked) -> None:
        await trio.sleep(0.2)
        await nothing(asked)

    site = await serve(plain=[PlainRoute("/nothing", slowly)], grace_s=0.2)
    async with site.connect() as wire:
        await wire.send(PREFACE + SettingsFrame(0).serialize())
        body = [DataFrame(1, b"x" * 100) for _ in range(40)]
        await wire.send(
            joined(request(1, method="GET", path="/nothing", end=False), *body, RstStreamFrame(1))
        )
        await eventually(lambda: site.telemetry.finished != [])
    await eventually(lambda: site.server.open_connections == 0)
