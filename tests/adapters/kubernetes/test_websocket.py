"""The WebSocket by itself, against a peer that is written by hand."""

from dataclasses import dataclass, field

import httpcore2
import pytest
import trio
import trio.testing
import wsproto.connection
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping, Pong, TextMessage

from rdev.adapters.kubernetes.websocket import MessagePart, Silence, WebSocket


@dataclass
class Peer:
    """The other side's network stream: what it says is queued, what it hears is kept."""

    said: list[bytes] = field(default_factory=list)
    heard: list[Event] = field(default_factory=list)
    takes: trio.Event = field(default_factory=trio.Event)  # until then writes block
    more: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.takes.set()
        self.server = wsproto.connection.Connection(wsproto.connection.ConnectionType.SERVER)

    def say(self, *events: Event) -> None:
        self.said.append(b"".join(self.server.send(event) for event in events))
        self.more.set()

    def hang_up(self) -> None:
        self.said.append(b"")
        self.more.set()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while not self.said:
            self.more = trio.Event()
            await self.more.wait()
        await trio.lowlevel.checkpoint()
        return self.said.pop(0)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self.takes.wait()
        self.server.receive_data(buffer)
        self.heard += self.server.events()


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def socket(peer: Peer) -> WebSocket:
    return WebSocket(peer, "v5.channel.k8s.io", Silence(ping_s=10, broken_s=30))


async def test_parts_of_a_message_come_as_they_are_read(peer: Peer, socket: WebSocket) -> None:
    peer.say(Message(data=b"ab", message_finished=False))
    assert await socket.receive() == MessagePart(data=b"ab", is_first=True, is_last=False)
    peer.say(Message(data=b"cd"), BytesMessage(data=b"e"))
    assert await socket.receive() == MessagePart(data=b"cd", is_first=False, is_last=True)
    assert await socket.receive() == MessagePart(data=b"e", is_first=True, is_last=True)


async def test_a_ping_is_answered_with_its_own_words(peer: Peer, socket: WebSocket) -> None:
    peer.say(Ping(payload=b"p1"), BytesMessage(data=b"x"))
    await socket.receive()
    assert [event.payload for event in peer.heard if isinstance(event, Pong)] == [b"p1"]


async def test_a_ping_does_not_wait_for_a_sender_that_is_blocked(
    peer: Peer, socket: WebSocket
) -> None:
    """He may wait for the other side to read, and that one for us to: nobody would move."""
    peer.takes = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(socket.send, b"\0stdin")
        await trio.testing.wait_all_tasks_blocked()
        peer.say(Ping(payload=b"p1"), BytesMessage(data=b"x"))
        with trio.fail_after(10):
            part = await socket.receive()
        assert part is not None
        assert part.data == b"x"
        assert peer.heard == []
        peer.takes.set()
    assert [type(event) for event in peer.heard] == [BytesMessage, Pong]


async def test_what_came_before_a_close_is_still_read(peer: Peer, socket: WebSocket) -> None:
    peer.say(Ping(payload=b"late"), BytesMessage(data=b"x"), CloseConnection(code=1000))
    part = await socket.receive()
    assert part is not None
    assert part.data == b"x"
    assert await socket.receive() is None
    assert await socket.receive() is None


async def test_an_end_without_a_close_is_broken(peer: Peer, socket: WebSocket) -> None:
    peer.hang_up()
    with pytest.raises(trio.BrokenResourceError, match="without a word"):
        await socket.receive()
    with pytest.raises(trio.BrokenResourceError):
        await socket.send(b"x")


@pytest.mark.parametrize("noise", [b"\xff" * 40, b"\x83\x00", b"\x82\x85masked"])
async def test_noise_is_broken(peer: Peer, socket: WebSocket, noise: bytes) -> None:
    peer.said.append(noise)
    with pytest.raises(trio.BrokenResourceError, match="not a WebSocket"):
        await socket.receive()


async def test_text_is_not_what_was_agreed(peer: Peer, socket: WebSocket) -> None:
    peer.say(TextMessage(data="AGhlbGxv"))
    with pytest.raises(trio.BrokenResourceError, match="text"):
        await socket.receive()


async def test_an_error_of_the_network_is_a_broken_resource(socket: WebSocket, peer: Peer) -> None:
    async def fail(*_: object, **__: object) -> bytes:
        raise httpcore2.ReadError("reset by peer")

    peer.read = fail  # type: ignore[method-assign]
    with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
        await socket.receive()


async def test_a_send_that_was_cancelled_breaks_the_connection(
    peer: Peer, socket: WebSocket
) -> None:
    """Half a frame may be out; what follows would be read as the rest of it."""
    peer.takes = trio.Event()
    with trio.move_on_after(0.05):
        await socket.send(b"x")
    peer.takes.set()
    with pytest.raises(trio.BrokenResourceError):
        await socket.send(b"y")
    assert peer.heard == []


async def test_silence_is_asked_about_and_then_broken(
    peer: Peer, socket: WebSocket, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError, match="silent"):
        await socket.receive()
    assert trio.current_time() - began == pytest.approx(30)
    assert [type(event) for event in peer.heard] == [Ping, Ping, Ping]


async def test_an_answered_ping_is_no_silence(
    peer: Peer, socket: WebSocket, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer() -> None:
        for _ in range(20):
            await trio.sleep(9)
            peer.say(Pong())
        peer.say(BytesMessage(data=b"x"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        assert await socket.receive() is not None
    assert trio.current_time() >= 180


async def test_a_reader_that_pauses_reads_and_sends_nothing(
    peer: Peer, socket: WebSocket, autojump_clock: trio.testing.MockClock
) -> None:
    peer.say(BytesMessage(data=b"x"))
    peer.say(BytesMessage(data=b"y"))
    await socket.receive()
    await trio.sleep(3_600)
    assert len(peer.said) == 1  # it was not read ahead
    assert peer.heard == []
    assert await socket.receive() is not None  # and an hour's pause is no silence
