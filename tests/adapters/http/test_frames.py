"""HTTP/2 frame by frame: what a client can do to its connection ends with it."""

import contextlib

import hpack
import pytest
import trio
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
)
from quart import Blueprint

from rdev.adapters.http.envelope import success
from rdev.adapters.http.server import ConnectionTimes
from tests.adapters.http.conftest import KEY, Site

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_WINDOW = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0})
OK = b"\x88"  # `:status: 200` in HPACK's static table


def routes() -> Blueprint:
    made = Blueprint("made", __name__)

    @made.route("/things", methods=["GET", "POST"])
    async def things():
        return success("x" * 1_000)

    return made


def request(stream: int, *, method: str = "GET", path: str = "/things", end: bool = True) -> Frame:
    fields = [
        (":method", method), (":path", path), (":scheme", "http"), (":authority", "t"),
        ("x-api-key", KEY),
    ]  # fmt: skip
    frame = HeadersFrame(stream, data=hpack.Encoder().encode(fields))
    frame.flags |= {"END_HEADERS", "END_STREAM"} if end else {"END_HEADERS"}
    return frame


def joined(*frames: Frame) -> bytes:
    return b"".join(frame.serialize() for frame in frames)


async def told(site: Site, *pieces: bytes, stop: bytes = b"") -> bytes:
    """What the server says to these until it closes, or until `stop` has come."""
    got = b""
    async with site.connect() as wire:
        with contextlib.suppress(trio.BrokenResourceError):
            await wire.send(PREFACE + SettingsFrame(0).serialize())
            for piece in pieces:
                await wire.send(piece)
            while data := await wire.stream.receive_some(65_536):
                got += data
                if stop and stop in got:
                    break
    return got


@pytest.mark.parametrize("window", [SettingsFrame(0), NO_WINDOW], ids=["window", "no_window"])
async def test_reset_requests_leave_nothing_behind(serve, eventually, window):
    """Their answers waited for a window for ever, and held their places."""
    site = await serve(routes())
    for _ in range(3):
        async with site.connect() as wire:
            with contextlib.suppress(trio.BrokenResourceError):
                await wire.send(PREFACE + window.serialize())
                for n in range(1, 401, 2):
                    await wire.send(joined(request(n), RstStreamFrame(n)))
    await eventually(lambda: site.server.open_connections == 0)
    await eventually(lambda: site.shell.admission.work.taken == 0)


async def test_a_client_that_takes_no_answer_is_let_go_with_it(serve, eventually):
    """It stays, and opens no window: the time of one write, and the connection is closed."""
    site = await serve(routes(), times=ConnectionTimes(write_s=0.2))
    asked = joined(NO_WINDOW, *map(request, range(1, 41, 2)))
    assert OK in await told(site, asked)
    await eventually(lambda: site.server.open_connections == 0)
    await eventually(lambda: site.shell.admission.work.taken == 0)


async def test_a_stop_does_not_wait_for_a_client_that_takes_no_answer(serve):
    site = await serve(routes(), grace_s=0.1)
    async with site.connect() as wire:
        await wire.send(PREFACE + joined(NO_WINDOW, request(1)))
        await wire.until(OK)
        site.server.stop()
        await site.done.wait()


@pytest.mark.parametrize(
    "frames",
    [
        joined(PingFrame(0, b"12345678")) * 2_000,
        joined(SettingsFrame(0, settings={4: 65_535}), SettingsFrame(0, settings={4: 1})) * 1_000,
        b"".join(joined(request(n), RstStreamFrame(n)) for n in range(1, 4_001, 2)),
        joined(request(1, method="POST", end=False)) + joined(DataFrame(1, b"x")) * 2_000,
        joined(PriorityFrame(1, depends_on=3)) * 2_000,
    ],
    ids=["pings", "settings", "resets", "tiny_pieces", "priorities"],
)
async def test_too_many_costly_frames_end_the_connection(serve, eventually, frames):
    """With GOAWAY; a client that still sends may see a reset in its place."""
    patient = ConnectionTimes(header_s=1_000, keep_alive_s=1_000)
    site = await serve(routes(), times=patient)
    await told(site, frames)
    await eventually(lambda: site.server.open_connections == 0)
    await eventually(lambda: site.shell.admission.work.taken == 0)


@pytest.mark.parametrize(
    "frames",
    [
        joined(PriorityFrame(3, depends_on=3)),
        joined(PriorityFrame(3, depends_on=5), PriorityFrame(5, depends_on=3)),
        joined(*(PriorityFrame(n, depends_on=0) for n in range(3, 403, 2))),
        joined(request(3, method="G\xcbT")),
        joined(request(3, path="/\xcb")),
        joined(request(3, method="CONNECT")),
        joined(request(3, path="/nowhere", method="POST", end=False)),
    ],
    ids=["self", "ring", "many", "method", "path", "connect", "open"],
)
async def test_an_odd_frame_costs_no_more_than_its_stream(serve, caplog, frames):
    """The next request is answered, or the connection is closed in order; no trace is logged."""
    site = await serve(routes())
    answer = await told(site, frames, joined(request(9)), stop=OK)
    assert OK in answer or GoAwayFrame(0).serialize()[3:4] in answer
    assert "connection failed" not in caplog.text


async def test_data_behind_an_answer_is_thrown_away(serve, caplog):
    site = await serve(routes())
    async with site.connect() as wire:
        asked = request(1, path="/nowhere", method="POST", end=False)
        await wire.send(PREFACE + joined(SettingsFrame(0), asked))
        await wire.until(b"NOT_FOUND")
        for _ in range(20):
            await wire.send(joined(DataFrame(1, b"x" * 1_000)))
            await trio.lowlevel.checkpoint()
        await wire.send(joined(request(3)))
        await wire.until(OK)
    assert "connection failed" not in caplog.text
