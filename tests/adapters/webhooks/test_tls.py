"""TLS and HTTP/2 against real servers on loopback: the name stays, whatever was dialled."""

import random
import ssl
from collections import Counter
from ipaddress import ip_address

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
import trio
import trustme

from rdev.adapters.webhooks.dialling import tls_context
from rdev.domain.sending import BODY_BYTES_KEPT, SendFault

NAME = "hooks.example.com"
ANSWERS = 150
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def to_loopback(host):
    return [ip_address("127.0.0.1")]


@pytest.fixture
def trusting(authority, tmp_path):
    """The system's authorities and the test's, as RDEV_WEBHOOK_CA_FILE gives them."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tls_context(tmp_path / "ca.pem")


class TlsReceiver:
    def __init__(self, certificate, protocols):
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self.context)
        self.context.set_alpn_protocols(protocols)
        self.context.sni_callback = lambda _, name, __: self.names.append(name)
        self.names: list[str | None] = []
        self.connections = 0

    async def secured(self, stream):
        self.connections += 1
        secure = trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)
        await secure.do_handshake()
        return secure


@pytest.fixture
def receive_tls(authority, receive):
    async def start(script, *, name=NAME, protocols=("http/1.1",), issuer=authority):
        tls = TlsReceiver(issuer.issue_cert(name), list(protocols))

        async def handle(receiver, stream):
            await script(receiver, await tls.secured(stream))

        return await receive(handle), tls

    return start


async def http1(receiver, stream):
    while await receiver.read_request(stream):
        await stream.send_all(OK)


async def test_the_name_is_kept_for_sni_the_certificate_and_the_host_header(
    receive_tls, sender_of, outgoing, trusting
):
    receiver, tls = await receive_tls(http1)
    sender = sender_of(tls=trusting, resolve=to_loopback)

    for _ in range(2):
        outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))
        assert (outcome.status, outcome.detail) == (200, "")

    assert tls.names == [NAME]  # one connection for two requests
    assert f"host: {NAME}:{receiver.port}\r\n".encode() in receiver.requests[0]


async def test_an_address_in_a_url_is_checked_against_the_certificate(
    receive_tls, sender_of, outgoing, trusting
):
    receiver, tls = await receive_tls(http1, name="127.0.0.1")

    outcome = await sender_of(tls=trusting).send(outgoing(f"https://127.0.0.1:{receiver.port}/"))

    assert (outcome.status, tls.names) == (200, [None])


@pytest.mark.parametrize(
    ("issuer", "name", "said"),
    [
        (None, "other.example.com", "refused: Hostname mismatch"),
        (trustme.CA(), NAME, "refused: unable to get local issuer"),
    ],
)
async def test_a_certificate_that_is_not_the_names_is_refused(
    receive_tls, sender_of, outgoing, trusting, authority, issuer, name, said
):
    receiver, _ = await receive_tls(unheard, name=name, issuer=issuer or authority)

    sender = sender_of(tls=trusting, resolve=to_loopback)
    outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))

    assert (outcome.status, outcome.fault) == (None, SendFault.TLS)
    assert said in outcome.detail
    assert receiver.requests == []


async def unheard(receiver, stream):
    await receiver.read_request(stream)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 400 Bad\r\n\r\n"])
async def test_who_speaks_no_tls_is_told_so(receive, sender_of, outgoing, trusting, answer):
    async def script(receiver, stream):
        await stream.receive_some(10)
        await stream.send_all(answer)

    receiver = await receive(script)

    sender = sender_of(tls=trusting, resolve=to_loopback)
    outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))

    assert outcome.fault is SendFault.TLS


async def test_a_handshake_without_end_is_cut_at_the_connect_time(
    receive, sender_of, outgoing, trusting
):
    receiver = await receive(hold)

    sender = sender_of(tls=trusting, resolve=to_loopback, connect_s=0.3)
    with trio.fail_after(60):
        outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))
        await receiver.ended.wait()

    assert (outcome.fault, outcome.detail) == (SendFault.TIMEOUT, "no connection within 0.3 s")


async def hold(receiver, stream):
    while await stream.receive_some(65_536):
        pass


def answering_h2(answer):
    """A script of HTTP/2: `answer(connection, stream_id)` once the request is whole."""

    async def script(receiver, stream):
        config = h2.config.H2Configuration(client_side=False, validate_outbound_headers=False)
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        await stream.send_all(connection.data_to_send())
        while data := await stream.receive_some(65_536):
            try:
                events = connection.receive_data(data)
            except h2.exceptions.ProtocolError:  # of what comes behind its own farewell
                return
            for event in events:
                if isinstance(event, h2.events.DataReceived):
                    connection.acknowledge_received_data(len(event.data), event.stream_id)
                if isinstance(event, h2.events.StreamEnded):
                    receiver.requests.append(b"")
                    await answer(connection, event.stream_id, stream)
            await stream.send_all(connection.data_to_send())

    return script


async def h2_ok(connection, stream_id, stream):
    headers = [(":status", "200"), ("retry-after", "7")]
    connection.send_headers(stream_id, headers)
    connection.send_data(stream_id, b"x" * 5_000, end_stream=True)


async def test_http_2_is_spoken_where_the_receiver_does_and_its_connection_kept(
    receive_tls, sender_of, outgoing, trusting
):
    receiver, tls = await receive_tls(answering_h2(h2_ok), protocols=("h2", "http/1.1"))
    sender = sender_of(tls=trusting, resolve=to_loopback)

    for _ in range(10):
        outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))
        assert (outcome.status, outcome.fault, outcome.http_version) == (200, None, "2")
        assert (outcome.body, outcome.truncated) == (b"x" * BODY_BYTES_KEPT, True)
        assert outcome.retry_after == "7"

    assert (tls.connections, len(receiver.requests)) == (1, 10)


async def test_the_settings_of_http_2_are_acknowledged_before_the_next_request(
    receive_tls, sender_of, outgoing, trusting
):
    acknowledged = trio.Event()

    async def script(receiver, stream):
        config = h2.config.H2Configuration(client_side=False)
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        # The settings come together with the answer.
        while data := await stream.receive_some(65_536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.SettingsAcknowledged):
                    acknowledged.set()
                if isinstance(event, h2.events.StreamEnded):
                    await h2_ok(connection, event.stream_id, stream)
                    await stream.send_all(connection.data_to_send())

    receiver, _ = await receive_tls(script, protocols=("h2",))
    sender = sender_of(tls=trusting, resolve=to_loopback)

    outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))

    assert outcome.status == 200
    with trio.fail_after(60):
        await acknowledged.wait()


async def test_a_body_over_http_2_is_cut_at_16_kib(receive_tls, sender_of, outgoing, trusting):
    async def endless(connection, stream_id, stream):
        connection.send_headers(stream_id, [(":status", "200")])
        for _ in range(100):
            connection.send_data(stream_id, b"x" * 16_000)
            await stream.send_all(connection.data_to_send())

    receiver, _ = await receive_tls(answering_h2(endless), protocols=("h2",))
    sender = sender_of(tls=trusting, resolve=to_loopback)

    outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))

    assert (outcome.status, outcome.fault, outcome.truncated) == (200, None, True)
    assert sender.statistics().idle == 0
    with trio.fail_after(60):
        await receiver.ended.wait()


async def h2_reset(connection, stream_id, stream):
    connection.reset_stream(stream_id)


async def h2_goaway(connection, stream_id, stream):
    connection.close_connection()


async def h2_no_number(connection, stream_id, stream):
    connection.send_headers(stream_id, [(":status", "many")], end_stream=True)


async def h2_far(connection, stream_id, stream):
    connection.send_headers(stream_id, [(":status", "99999")], end_stream=True)


async def h2_many_headers(connection, stream_id, stream):
    # Small on the wire, large when unpacked: the same long field again and again.
    headers = [(":status", "200"), *[("x", "y" * 3_000)] * 2_000]
    connection.remote_settings.max_header_list_size = 1 << 30
    connection.send_headers(stream_id, headers, end_stream=True)


async def h2_garbage(connection, stream_id, stream):
    # The head of a frame of 16 MB, for which h2 would wait.
    await stream.send_all(b"\xff" * 20_000)


@pytest.mark.parametrize(
    "answer", [h2_reset, h2_goaway, h2_no_number, h2_far, h2_many_headers, h2_garbage]
)
async def test_a_hostile_answer_over_http_2_is_an_outcome(
    receive_tls, sender_of, outgoing, trusting, answer
):
    receiver, _ = await receive_tls(answering_h2(answer), protocols=("h2",))
    sender = sender_of(tls=trusting, resolve=to_loopback)

    with trio.fail_after(60):
        outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))

    assert (outcome.status, outcome.fault) == (None, SendFault.PROTOCOL)
    assert sender.statistics().idle == 0


def frames_of_an_answer():
    """What a server of HTTP/2 sends, from its settings to the end of the body."""
    made = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    client = h2.connection.H2Connection()
    client.initiate_connection()
    made.initiate_connection()
    client.send_headers(1, REQUEST, end_stream=True)
    made.receive_data(client.data_to_send())
    made.send_headers(1, [(":status", "200"), ("x", "y")])
    made.send_data(1, b"ok", end_stream=True)
    return made.data_to_send()


REQUEST = [(":method", "POST"), (":scheme", "https"), (":authority", NAME), (":path", "/")]


def mutated(drawn, whole):
    """The frames with bits flipped, a piece doubled, dropped or moved."""
    data = bytearray(whole)
    for _ in range(drawn.randint(1, 4)):
        at, to = sorted(drawn.randint(0, len(data)) for _ in range(2))
        match drawn.randrange(4):
            case 0:
                data[at:at] = data[at:to]
            case 1 if len(data) > 9:
                del data[at : min(to, at + 9)]
            case 2 if data:
                data[min(at, len(data) - 1)] ^= 1 << drawn.randrange(8)
            case _:
                data[at:at] = drawn.randbytes(drawn.randint(1, 20))
    return bytes(data)


@pytest.mark.slow
async def test_no_frames_whatever_raise(receive_tls, sender_of, outgoing, trusting):
    drawn, whole, faults = random.Random(20_261), frames_of_an_answer(), Counter()

    async def script(receiver, stream):
        # The client's preface and request come in one piece or more; enough to answer upon.
        await stream.receive_some(65_536)
        await stream.send_all(mutated(drawn, whole))
        with trio.move_on_after(0.02):
            while await stream.receive_some(65_536):
                pass

    receiver, _ = await receive_tls(script, protocols=("h2",))
    sender = sender_of(tls=trusting, resolve=to_loopback)

    for _ in range(ANSWERS):
        with trio.fail_after(60):
            outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))
        assert outcome.status is not None or outcome.fault is not None
        faults[outcome.fault] += 1

    assert faults[None] > 0
    assert faults[SendFault.PROTOCOL] > 0


async def test_a_kept_connection_of_http_2_that_was_closed_is_replaced(
    receive_tls, sender_of, outgoing, trusting
):
    async def once(connection, stream_id, stream):
        await h2_ok(connection, stream_id, stream)
        connection.close_connection()

    receiver, tls = await receive_tls(answering_h2(once), protocols=("h2",))
    sender = sender_of(tls=trusting, resolve=to_loopback)

    for _ in range(3):
        outcome = await sender.send(outgoing(f"https://{NAME}:{receiver.port}/"))
        assert (outcome.status, outcome.fault) == (200, None)
    assert tls.connections == 3
