"""The guards around hypercorn's connections: each test fails on bare hypercorn with quart-trio."""

import os
import socket

import pytest
import trio
import trio.testing
from quart import Blueprint

from rdev.adapters.http.app import HttpLimits
from rdev.adapters.http.envelope import stream, success
from rdev.adapters.http.server import ConnectionTimes

GET = b"GET /quick HTTP/1.1\r\nHost: x\r\nX-API-Key: rdev_sk_test\r\n"

# Short where the test waits for it to pass, far away where it must not.
FAR_S = 300.0


def routes() -> tuple[Blueprint, dict[str, trio.Event]]:  # noqa: C901
    """A quick route and streams that tell when they begin and end."""
    made = Blueprint("made", __name__)
    told = {"began": trio.Event(), "ended": trio.Event()}

    @made.get("/quick")
    async def quick():
        return success("quick")

    @made.get("/large")
    async def large():
        return success("x" * 3_000_000)

    @made.get("/silent")
    async def silent():
        async def body():
            try:
                yield b": connected\n\n"
                told["began"].set()
                await trio.sleep_forever()
            finally:
                told["ended"].set()

        return stream(body(), content_type="text/event-stream")

    @made.get("/late")
    async def late():
        async def body():
            yield b": connected\n\n"
            await trio.sleep(1.5)
            yield b"data: still here\n\n"

        return stream(body(), content_type="text/event-stream")

    @made.get("/flood")
    async def flood():
        async def body():
            try:
                while True:
                    told["began"].set()
                    yield b"x" * 65536
            finally:
                told["ended"].set()

        return stream(body(), content_type="application/octet-stream")

    @made.get("/slow")
    async def slow():
        told["began"].set()
        try:
            await trio.sleep_forever()
        finally:
            told["ended"].set()

    return made, told


async def test_an_idle_kept_connection_is_closed_after_its_time(serve):
    made, _ = routes()
    site = await serve(made, times=ConnectionTimes(keep_alive_s=0.2, header_s=FAR_S))

    async with site.connect() as wire:
        for _ in range(3):
            await wire.send(GET + b"\r\n")
            assert (await wire.reply()).status == 200
        assert await wire.closed() == b""


async def test_connection_close_is_honoured(serve):
    made, _ = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(GET + b"Connection: close\r\n\r\n")
        assert (await wire.reply()).header("connection") == "close"
        assert await wire.closed() == b""


async def test_http_1_0_gets_the_end_of_the_stream(serve):
    made, _ = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(b"GET /quick HTTP/1.0\r\nX-API-Key: rdev_sk_test\r\n\r\n")
        assert (await wire.reply()).status == 200
        assert await wire.closed() == b""


async def test_pipelined_requests_are_answered_in_order(serve):
    made, _ = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(b"".join(GET + b"X-Request-Id: %d\r\n\r\n" % n for n in range(20)))
        ids = [(await wire.reply()).header("x-request-id") for _ in range(20)]

    assert ids == [str(n) for n in range(20)]


async def test_half_a_request_head_is_given_up(serve):
    made, _ = routes()
    site = await serve(made, times=ConnectionTimes(keep_alive_s=FAR_S, header_s=0.2))

    async with site.connect() as fresh, site.connect() as used:
        await used.send(GET + b"\r\n")
        await used.reply()
        await used.send(b"GET /qui")
        await used.closed()
        await fresh.closed()


async def test_a_large_answer_arrives_whole(serve):
    made, _ = routes()
    site = await serve(made)

    reply = await site.request("GET", "/large")

    assert len(reply.json()["data"]) == 3_000_000


async def test_a_reader_that_stops_is_cut_after_the_write_time(serve, eventually, tmp_path):
    made, told = routes()
    # A unix socket has no TCP_USER_TIMEOUT that would help.
    path = str(tmp_path / "rdev.sock")
    site = await serve(made, bind=f"unix:{path}", times=ConnectionTimes(write_s=0.5))

    async with await trio.open_unix_socket(path) as stream_socket:
        await stream_socket.send_all(GET.replace(b"quick", b"flood") + b"\r\n")
        await told["ended"].wait()
        await eventually(lambda: site.server.open_connections == 0)


async def test_a_whole_answer_in_one_message_leaves_before_the_close(serve):
    async def app(scope, receive, send):
        head = [(b"content-length", b"5"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"whole", "more_body": False})

    site = await serve(app=app)

    async with site.connect() as wire:
        await wire.send(GET + b"\r\n")
        assert (await wire.reply()).body == b"whole"
        assert await wire.closed() == b""


@pytest.mark.slow
async def test_a_silent_stream_outlives_the_response_timeout(serve):
    made, _ = routes()
    site = await serve(made, limits=HttpLimits(response_timeout_s=1))

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"late") + b"\r\n")
        await wire.until(b": connected\n\n")
        await wire.until(b"data: still here\n\n")


async def test_a_client_that_leaves_a_silent_stream_ends_its_generator(serve, eventually):
    made, told = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"silent") + b"\r\n")
        await told["began"].wait()
        assert (site.shell.admission.held.taken, site.shell.admission.work.taken) == (1, 0)
    await told["ended"].wait()

    await eventually(lambda: site.server.open_connections == site.shell.admission.held.taken == 0)


async def test_a_client_that_is_reset_ends_its_generator(serve):
    made, told = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"silent") + b"\r\n")
        await told["began"].wait()
        no_linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        wire.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    await told["ended"].wait()


async def test_a_client_that_leaves_cancels_its_request_and_is_counted(serve, eventually):
    made, told = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"slow") + b"\r\n")
        await told["began"].wait()
    await told["ended"].wait()

    await eventually(lambda: site.telemetry.finished == [("GET", "/slow", 499)])
    assert site.shell.admission.work.taken == 0


async def test_shutdown_with_idle_connections_is_immediate(serve):
    made, _ = routes()
    site = await serve(made, grace_s=FAR_S)

    async with site.connect() as fresh, site.connect() as used:
        await used.send(GET + b"\r\n")
        await used.reply()
        site.server.stop()
        site.server.stop()
        await site.done.wait()
        assert await fresh.closed() == await used.closed() == b""


async def test_shutdown_lets_a_request_under_way_finish_and_accepts_no_other(serve):
    made = Blueprint("made", __name__)
    began, release = trio.Event(), trio.Event()

    @made.get("/quick")
    async def quick():
        began.set()
        await release.wait()
        return success("done")

    site = await serve(made, grace_s=FAR_S)

    async with site.connect() as wire:
        await wire.send(GET + b"\r\n")
        await began.wait()
        site.server.stop()
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(OSError, match="all attempts to connect"):
            async with site.connect():
                pass
        release.set()
        assert (await wire.reply()).json()["data"] == "done"
        await site.done.wait()


async def test_shutdown_ends_open_streams_after_the_grace(serve):
    made, told = routes()
    site = await serve(made, grace_s=0.2)

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"silent") + b"\r\n")
        await told["began"].wait()
        site.server.stop()
        await site.done.wait()

    assert told["ended"].is_set()


async def test_a_reader_that_stops_does_not_hold_shutdown(serve, eventually):
    made, told = routes()
    site = await serve(made, grace_s=0.2, times=ConnectionTimes(write_s=FAR_S))

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"flood") + b"\r\n")
        await told["began"].wait()
        await trio.testing.wait_all_tasks_blocked(0.1)
        site.server.stop()
        await site.done.wait()

    assert told["ended"].is_set()


async def test_a_reader_that_stops_does_not_take_the_whole_grace(serve):
    """The grace is for requests that make progress; whoever does not read gets two seconds."""
    made, told = routes()
    site = await serve(made, grace_s=FAR_S, times=ConnectionTimes(write_s=FAR_S))

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"flood") + b"\r\n")
        await told["began"].wait()
        await trio.testing.wait_all_tasks_blocked(0.1)
        site.server.stop()
        await site.done.wait()

    assert told["ended"].is_set()


async def test_a_reader_that_stops_does_not_hold_a_cancellation(serve):
    made, told = routes()
    site = await serve(made, grace_s=FAR_S, times=ConnectionTimes(write_s=FAR_S))

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"flood") + b"\r\n")
        await told["began"].wait()
        await trio.testing.wait_all_tasks_blocked(0.1)
        site.scope.cancel()
        await site.done.wait()

    assert told["ended"].is_set()


async def test_a_body_that_never_waits_ends_with_its_client(serve, eventually):
    made, told = routes()
    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"flood") + b"\r\n")
        await wire.head()
    await told["ended"].wait()

    await eventually(lambda: site.server.open_connections == 0)


async def test_descriptors_return_to_base(serve, eventually):
    made, told = routes()
    site = await serve(made)
    base = len(os.listdir("/proc/self/fd"))

    for target in (b"quick", b"silent", b"flood", b"slow", b"nowhere"):
        for end in (b"\r\n", b"Connection: close\r\n\r\n", b""):
            async with site.connect() as wire:
                await wire.send(GET.replace(b"quick", target) + end)
                if end and target == b"slow":
                    await told["began"].wait()
                elif end:
                    await wire.head()

    await eventually(lambda: site.server.open_connections == 0)
    assert len(os.listdir("/proc/self/fd")) == base


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("deadline_s", [180.0])
async def test_a_silent_stream_lives_for_seventy_seconds_with_the_real_settings(serve):
    made = Blueprint("made", __name__)

    @made.get("/quick")
    async def quick():
        async def body():
            yield b": connected\n\n"
            await trio.sleep(70)  # what is promised is about the real clock
            yield b"data: still here\n\n"

        return stream(body(), content_type="text/event-stream")

    site = await serve(made)

    async with site.connect() as wire:
        await wire.send(GET + b"\r\n")
        await wire.until(b"data: still here\n\n")


async def test_an_answer_that_is_ready_as_its_client_leaves_is_no_error(serve, eventually, caplog):
    """Quart 0.23 raises there, and hypercorn logged the trace as an error."""
    routes = Blueprint("shielded", __name__)
    entered, done = trio.Event(), trio.Event()

    @routes.get("/shielded")
    async def shielded():
        entered.set()
        # shielded: the route has its answer although it was cancelled
        with trio.CancelScope(shield=True):
            await done.wait()
        return success("x")

    site = await serve(routes)
    async with site.connect() as wire:
        await wire.send(GET.replace(b"quick", b"shielded") + b"\r\n")
        await entered.wait()
    await trio.testing.wait_all_tasks_blocked(0.05)
    done.set()
    await eventually(lambda: site.telemetry.finished != [])
    assert "Error in ASGI" not in caplog.text
    assert "Traceback" not in caplog.text
