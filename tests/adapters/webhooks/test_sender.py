"""One POST over real sockets: what goes out, and every way in which an answer can be hostile."""

import fcntl
import gzip
import random
import socket
import struct
import termios
import tracemalloc
from collections import Counter

import pytest
import trio

from rdev.domain.sending import BODY_BYTES_KEPT, SendFault

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
MEMORY_BYTES_MAX = 2_000_000


async def test_the_request_on_the_wire_is_signed_json_and_nothing_else(
    receive, sender_of, outgoing
):
    receiver = await receive(OK)

    outcome = await sender_of().send(outgoing(receiver.url("/hooks?x=1")))

    head, _, body = receiver.requests[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    sent = dict(line.lower().split(": ", 1) for line in lines)
    assert first == "POST /hooks?x=1 HTTP/1.1"
    assert body == b'{"type":"ping"}'
    assert sorted(sent) == [
        "accept",
        "accept-encoding",
        "content-length",
        "content-type",
        "host",
        "user-agent",
        "webhook-id",
        "webhook-signature",
        "webhook-timestamp",
    ]
    assert sent["host"] == f"127.0.0.1:{receiver.port}"
    assert sent["content-type"] == "application/json"
    assert sent["accept-encoding"] == "identity"
    assert (outcome.status, outcome.fault, outcome.body) == (200, None, b"ok")
    assert (outcome.http_version, outcome.truncated) == ("1.1", False)
    assert outcome.is_accepted
    assert outcome.latency_s > 0
    assert set(outcome.request_headers) == set(sent)
    assert outcome.request_headers["webhook-signature"] == "v1,[redacted]"


@pytest.mark.parametrize(
    ("answer", "status", "accepted", "gone"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, True, False),
        (b"HTTP/1.1 299 x\r\ncontent-length: 0\r\n\r\n", 299, True, False),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", 200, True, False),
        (b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n", 410, False, True),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", 500, False, False),
        (b"HTTP/1.1 103 Hints\r\n\r\n" * 3 + OK, 200, True, False),
    ],
)
async def test_the_status_decides(receive, sender_of, outgoing, answer, status, accepted, gone):
    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(answer)
        if b"HTTP/1.0" not in answer:
            await receiver.read_request(stream)

    receiver = await receive(script)

    outcome = await sender_of().send(outgoing(receiver.url()))

    assert (outcome.status, outcome.is_accepted, outcome.is_gone) == (status, accepted, gone)
    assert outcome.fault is None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer_and_is_not_followed(receive, sender_of, outgoing, status):
    inside = await receive(OK)
    away = f"HTTP/1.1 {status} Go\r\nlocation: {inside.url()}\r\ncontent-length: 0\r\n\r\n"
    receiver = await receive(away.encode())

    outcome = await sender_of().send(outgoing(receiver.url()))

    assert (outcome.status, outcome.is_accepted) == (status, False)
    assert inside.connections == 0


async def test_no_proxy_of_the_environment_is_used(receive, sender_of, outgoing, monkeypatch):
    proxy, receiver = await receive(OK), await receive(OK)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url())

    assert (await sender_of().send(outgoing(receiver.url()))).status == 200
    assert (proxy.connections, receiver.connections) == (0, 1)


async def test_no_cookie_is_kept(receive, sender_of, outgoing):
    receiver = await receive(b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n")
    sender = sender_of()

    for _ in range(2):
        await sender.send(outgoing(receiver.url()))

    assert b"cookie" not in receiver.requests[1].lower()


async def test_a_gzip_bomb_stays_what_it_is(receive, sender_of, outgoing):
    bomb = gzip.compress(bytes(10_000_000))
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}\r\n\r\n"
    receiver = await receive(head.encode() + bomb)

    outcome, peak_bytes = await measured(sender_of(), outgoing(receiver.url()))

    assert outcome.body == bomb[:BODY_BYTES_KEPT]
    assert outcome.truncated
    assert peak_bytes < MEMORY_BYTES_MAX


async def test_an_answer_of_up_to_16_kib_is_read_and_4_kib_of_it_kept(receive, sender_of, outgoing):
    receiver = await receive(
        b"HTTP/1.1 200 OK\r\ncontent-length: 16000\r\n\r\n" + b"a" * 4_096 + b"b" * 11_904
    )
    sender = sender_of()

    for _ in range(2):
        outcome = await sender.send(outgoing(receiver.url()))
        assert (outcome.body, outcome.truncated) == (b"a" * 4_096, True)
        assert outcome.fault is None
    assert receiver.connections == 1


async def measured(sender, request):
    """The outcome, and the most bytes that Python held for it at once."""
    tracemalloc.start()
    try:
        outcome = await sender.send(request)
        return outcome, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ENDLESS = {
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536, 200),
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 999, 200),
    "one chunk": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffff\r\n",
        b"x" * 65_536,
        200,
    ),
    "a length of petabytes": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 1125899906842624\r\n\r\n",
        b"x" * 65_536,
        200,
    ),
    "one header": (b"HTTP/1.1 200 OK\r\nx: ", b"x" * 65_536, None),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 9_999, None),
    "the status line": (b"HTTP/1.1 200 ", b"x" * 65_536, None),
    "interim answers": (b"", b"HTTP/1.1 103 Hints\r\n\r\n" * 999, None),
    "trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
        b"x: y\r\n" * 9_999,
        200,
    ),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_never_ends_is_cut_at_16_kib(receive, sender_of, outgoing, what):
    first, piece, status = ENDLESS[what]

    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(first)
        await receiver.send_without_end(stream, piece)

    receiver = await receive(script)
    sender = sender_of()

    outcome, peak_bytes = await measured(sender, outgoing(receiver.url()))

    await receiver.ended.wait()
    assert outcome.status == status
    assert outcome.fault is (None if status else SendFault.PROTOCOL)
    assert len(outcome.body) <= BODY_BYTES_KEPT
    assert outcome.truncated
    assert peak_bytes < MEMORY_BYTES_MAX
    assert sender.statistics().idle == 0


@pytest.mark.parametrize(
    ("first", "drop", "status"),
    [
        (b"", b"", None),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y", None),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"z", 200),
        (b"HTTP/1.1 500 No\r\ncontent-length: 9999\r\n\r\n", b"z", 500),
    ],
)
async def test_a_slow_drip_is_cut_at_the_total_time(
    receive, sender_of, outgoing, first, drop, status
):
    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(first)
        while True:
            await stream.send_all(drop)
            await trio.sleep(0.02)

    receiver = await receive(script)

    with trio.fail_after(60):
        outcome = await sender_of(total_s=0.4).send(outgoing(receiver.url()))

    assert (outcome.status, outcome.fault) == (status, SendFault.TIMEOUT)
    assert outcome.latency_s >= 0.4
    assert outcome.truncated is (status is not None)


BROKEN = {
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", None),
    "another protocol": (b"HTTP/1.1 101 Up\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", None),
    "a status of no number": (b"HTTP/1.1 abc OK\r\n\r\n", None),
    "a status of zeros": (b"HTTP/1.1 000 OK\r\n\r\n", None),
    "a status above all": (b"HTTP/1.1 999 OK\r\ncontent-length: 0\r\n\r\n", None),
    "a header without a colon": (b"HTTP/1.1 200 OK\r\nx y\r\n\r\n", None),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", None),
    "a negative length": (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", None),
    "bad chunking": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 200),
    "another coding": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", None),
    "frames of HTTP/2": (b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", None),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_no_http_is_called_so(receive, sender_of, outgoing, what):
    answer, status = BROKEN[what]

    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(answer + b"\r\n" * 9)
        await receiver.read_request(stream)

    receiver = await receive(script)
    sender = sender_of()

    outcome = await sender.send(outgoing(receiver.url()))

    assert (outcome.status, outcome.fault) == (status, SendFault.PROTOCOL)
    assert sender.statistics().idle == 0


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", None),
        (b"HTTP/1.1 20", None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", 200),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nabc", 200),
    ],
)
@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_an_answer_that_is_cut_is_called_so(
    receive, sender_of, outgoing, answer, status, how
):
    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(answer)
        if how == "reset":
            # What was sent is taken before the reset, which would throw it away.
            while answer and not taken(stream):
                await trio.sleep(0.01)
            linger = struct.pack("ii", 1, 0)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    receiver = await receive(script)

    outcome = await sender_of().send(outgoing(receiver.url()))

    assert outcome.fault is SendFault.CUT
    # A reset may overtake the bytes before it.
    assert outcome.status in ((status,) if how == "closed" else (status, None))
    assert receiver.connections == 1


def taken(stream):
    """Whether the peer's kernel has acknowledged all."""
    left = fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return struct.unpack("i", left)[0] == 0


async def test_a_port_without_a_listener_is_refused(sender_of, outgoing):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/"

        outcome = await sender_of().send(outgoing(url))

    assert (outcome.status, outcome.fault) == (None, SendFault.REFUSED)
    assert "127" not in outcome.detail


async def test_a_request_that_the_receiver_does_not_read_is_cut_at_the_total_time(
    receive, sender_of, outgoing
):
    async def script(receiver, stream):
        await trio.sleep_forever()

    receiver = await receive(script)

    request = outgoing(receiver.url(), b"x" * 30_000_000)
    with trio.fail_after(60):
        outcome = await sender_of(total_s=0.4).send(request)

    assert outcome.fault is SendFault.TIMEOUT


async def test_an_answer_before_the_request_was_read_counts(receive, sender_of, outgoing):
    async def script(receiver, stream):
        await stream.receive_some(100)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        while await stream.receive_some(65_536):
            pass

    receiver = await receive(script)

    assert (await sender_of().send(outgoing(receiver.url(), b"x" * 3_000_000))).status == 413


async def test_cancellation_closes_the_connection(receive, sender_of, outgoing, nursery):
    asked = trio.Event()

    async def script(receiver, stream):
        await receiver.read_request(stream)
        asked.set()
        await receiver.read_request(stream)

    receiver = await receive(script)
    sender = sender_of()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            inner.start_soon(sender.send, outgoing(receiver.url()))
            await asked.wait()
            scope.cancel()

    with trio.fail_after(60):
        await receiver.ended.wait()
    assert sender.statistics().idle == 0


async def test_a_connection_is_kept_and_used_again(receive, sender_of, outgoing):
    receiver = await receive(OK)
    sender = sender_of()

    for _ in range(5):
        assert (await sender.send(outgoing(receiver.url()))).status == 200

    assert receiver.connections == 1
    statistics = sender.statistics()
    assert (statistics.dialled, statistics.reused, statistics.idle) == (1, 4, 1)
    sender.close()
    with trio.fail_after(60):
        await receiver.ended.wait()


@pytest.mark.parametrize("bound", [{"idle_s": 0}, {"age_s": 0}, {"idle_max": 0}])
async def test_a_connection_past_its_bound_is_not_used_again(receive, sender_of, outgoing, bound):
    receiver = await receive(OK)
    sender = sender_of(**bound)

    for _ in range(3):
        assert (await sender.send(outgoing(receiver.url()))).status == 200

    assert (receiver.connections, sender.statistics().reused) == (3, 0)


async def test_the_longest_unused_connection_goes_first(receive, sender_of, outgoing):
    receivers = [await receive(OK) for _ in range(3)]
    sender = sender_of(idle_max=2)

    for receiver in receivers:
        await sender.send(outgoing(receiver.url()))
    assert sender.statistics().idle == 2
    with trio.fail_after(60):
        await receivers[0].ended.wait()
    for receiver in receivers[1:]:
        await sender.send(outgoing(receiver.url()))

    assert [receiver.connections for receiver in receivers] == [1, 1, 1]


async def test_a_kept_connection_that_was_closed_is_replaced_without_a_failure(
    receive, sender_of, outgoing
):
    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(OK)

    receiver = await receive(script)
    sender = sender_of()

    for _ in range(3):
        assert (await sender.send(outgoing(receiver.url()))).status == 200
        with trio.fail_after(60):
            await receiver.ended.wait()
        receiver.ended = trio.Event()

    assert receiver.connections == 3


async def test_a_kept_connection_that_dies_with_the_request_is_replaced_once(
    receive, sender_of, outgoing
):
    async def script(receiver, stream):
        await receiver.read_request(stream)
        if receiver.connections < 3:
            await stream.send_all(OK)
            await receiver.read_request(stream)  # and closes without an answer

    receiver = await receive(script)
    sender = sender_of()

    assert [(await sender.send(outgoing(receiver.url()))).status for _ in range(3)] == [
        200,
        200,
        None,
    ]
    assert (receiver.connections, len(receiver.requests)) == (3, 5)


async def test_a_kept_connection_that_began_to_answer_is_not_replaced(receive, sender_of, outgoing):
    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(OK)
        await receiver.read_request(stream)
        await stream.send_all(b"HTTP/1.1 2")

    receiver = await receive(script)
    sender = sender_of()

    await sender.send(outgoing(receiver.url()))
    assert (await sender.send(outgoing(receiver.url()))).fault is SendFault.CUT
    assert receiver.connections == 1


async def test_two_at_once_have_a_connection_each(receive, sender_of, outgoing):
    together = trio.Event()

    async def script(receiver, stream):
        await receiver.read_request(stream)
        if len(receiver.requests) == 2:
            together.set()
        await together.wait()
        await stream.send_all(OK)
        await receiver.read_request(stream)

    receiver = await receive(script)
    sender = sender_of()

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(sender.send, outgoing(receiver.url()))

    assert (receiver.connections, sender.statistics().idle) == (2, 2)


async def test_retry_after_is_told(receive, sender_of, outgoing):
    receiver = await receive(
        b"HTTP/1.1 429 Slow\r\nretry-after:  120 \r\ncontent-length: 0\r\n\r\n"
    )

    outcome = await sender_of().send(outgoing(receiver.url()))

    assert outcome.retry_after == "120"


PIECES = (
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 103 Hints\r\n",
    b"HTTP/1.1 101 Up\r\nupgrade: h2c\r\nconnection: upgrade\r\n",
    b"content-length: 5\r\n",
    b"transfer-encoding: chunked\r\n",
    b"connection: close\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"5\r\nhello\r\n",
    b"0\r\n",
    b"\n",
    b"\0\xff",
)


@pytest.mark.slow
async def test_no_answer_whatever_raises(receive, outgoing, sender_of):
    drawn = random.Random(20_261)
    faults = Counter()

    async def script(receiver, stream):
        await receiver.read_request(stream)
        await stream.send_all(b"".join(drawn.choices(PIECES, k=drawn.randint(0, 8))))

    receiver = await receive(script)
    sender = sender_of()

    for _ in range(500):
        outcome = await sender.send(outgoing(receiver.url()))
        assert outcome.status is not None or outcome.fault is not None
        assert len(outcome.body) <= BODY_BYTES_KEPT
        faults[outcome.fault] += 1

    assert set(faults) == {None, SendFault.CUT, SendFault.PROTOCOL}
