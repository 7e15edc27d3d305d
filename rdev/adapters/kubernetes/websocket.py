"""A WebSocket to the API server, without a task of its own.

httpx2 makes the upgrade (same TLS, same credentials), wsproto the frames. What is read is read when
the caller asks: a caller that pauses is the back-pressure, all the way into the pod. Parts of
messages are handed on as they come, so no message is ever held whole; memory is one read.
Pings of the other side are answered by whoever reads or sends next; our own are sent while a reader
waits in silence. A reader that pauses costs no connection: silence counts only while it waits.
"""

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import httpcore2
import httpx2
import trio
import wsproto.connection
import wsproto.utilities
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage

from rdev.adapters.kubernetes.credentials import PLUGIN_S
from rdev.adapters.kubernetes.errors import refusal_of, translated, unreachable

_READ_BYTES: Final = 65_536
_GOODBYE_S: Final = 0.5


class _NetworkStream(Protocol):
    """What httpx2 gives of an upgraded connection."""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes: ...

    async def write(self, buffer: bytes, timeout: float | None = None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """While a reader hears nothing: a ping each `ping_s`, and after `broken_s` the end."""

    ping_s: float = 10.0
    broken_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagePart:
    """Bytes of a message; `is_first` and `is_last` say whether it begins and ends with them."""

    data: bytes
    is_first: bool
    is_last: bool


class WebSocket:
    """An open WebSocket. One may send while another receives; each by one task at a time."""

    def __init__(self, stream: _NetworkStream, subprotocol: str, silence: Silence) -> None:
        """Take over an upgraded connection."""
        self.subprotocol = subprotocol
        self._stream = stream
        self._silence = silence
        self._frames = wsproto.connection.Connection(wsproto.connection.ConnectionType.CLIENT)
        self._events: deque[Event] = deque()
        self._owed = bytearray()  # answers to pings, and our own
        self._writing = trio.Lock()
        self._is_broken = False
        self._is_within = False  # a message of which more is to come
        self._has_ended = False  # the other side closed in order

    async def send(self, message: bytes) -> None:
        """Send one binary message. Errors: BrokenResourceError.

        Cancellation: part of it may be sent, so the connection is then broken.
        """
        async with self._writing:
            self._check()
            data = self._encode(BytesMessage(data=message))
            await self._write(bytes(self._owed) + data)
        await self._pay()  # what was asked of us meanwhile

    async def receive(self) -> MessagePart | None:
        """The next part of a message; None when the other side closed in order.

        Cancellation: nothing is lost. Errors: BrokenResourceError, also for a connection that ends
        without a close frame, and after `broken_s` of silence.
        """
        while not self._has_ended:
            await self._pay()
            while self._events:
                match self._events.popleft():
                    case BytesMessage() as event:
                        return self._part(event)
                    case Ping() as ping:
                        self._owe(ping.response())
                        await self._pay()
                    case Pong():
                        pass
                    case CloseConnection() as close:
                        # wsproto tells noise as a close too; only a real one changes its state.
                        if self._frames.state is wsproto.connection.ConnectionState.OPEN:
                            raise self._broken(f"not a WebSocket: {close.reason}")
                        self._has_ended = True
                    case TextMessage():
                        raise self._broken("a text message where bytes were agreed")
                    case _:
                        pass  # wsproto has no others once a WebSocket is open
            if not self._has_ended:
                await self._read()
        return None

    def _part(self, event: BytesMessage) -> MessagePart:
        is_first, self._is_within = not self._is_within, not event.message_finished
        return MessagePart(
            data=bytes(event.data), is_first=is_first, is_last=event.message_finished
        )

    async def _read(self) -> None:
        self._check()
        data = await self._next_bytes()
        if not data:
            raise self._broken("the connection ended without a word")
        try:
            self._frames.receive_data(data)
            self._events.extend(self._frames.events())
        except wsproto.utilities.ProtocolError as error:
            raise self._broken(f"not a WebSocket: {error}") from error

    async def _next_bytes(self) -> bytes:
        """What comes next; pings while nothing does."""
        began = trio.current_time()
        while trio.current_time() - began < self._silence.broken_s:
            with trio.move_on_after(self._silence.ping_s):
                try:
                    return await self._stream.read(_READ_BYTES)
                except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
                    raise self._broken(str(error) or "the connection was lost") from error
            self._owe(Ping())
            await self._pay()
        raise self._broken("the connection is silent")

    async def _pay(self) -> None:
        """Send what is owed, unless someone is writing: he does it then. Never waits for him: he
        may wait for the other side, and that one for us to read."""
        if not self._owed or self._writing.locked():
            return
        async with self._writing:
            await self._write(bytes(self._owed))

    async def _write(self, data: bytes) -> None:
        self._owed.clear()
        finished = False
        try:
            await self._stream.write(data)
            finished = True
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise self._broken(str(error) or "the connection was lost") from error
        finally:
            # A frame that was cut by a cancellation: what follows it would not be understood.
            self._is_broken |= not finished

    def _owe(self, event: Ping | Pong) -> None:
        # What followed a ping was read with it, maybe the other side's close: then none is due.
        with suppress(wsproto.utilities.LocalProtocolError):
            self._owed += self._frames.send(event)

    def _encode(self, event: Event) -> bytes:
        try:
            return self._frames.send(event)
        except wsproto.utilities.LocalProtocolError as error:
            raise self._broken("the other side has closed") from error

    def _check(self) -> None:
        if self._is_broken:
            raise trio.BrokenResourceError("the connection is broken")

    def _broken(self, reason: str) -> trio.BrokenResourceError:
        self._is_broken = True
        return trio.BrokenResourceError(reason)


@asynccontextmanager
async def open_websocket(
    http: httpx2.AsyncClient,
    path: str,
    *,
    params: Sequence[tuple[str, str]],
    subprotocols: Sequence[str],
    silence: Silence | None = None,
    connect_s: float = 10.0,
) -> AsyncIterator[WebSocket]:
    """Upgrade; `subprotocols` in order of preference. Leaving the block drops the connection.

    Errors (on entry): RdevError for what the server answers instead, SERVICE_UNAVAILABLE where it
    cannot be reached, or does not answer, within `connect_s` each, or agrees to no subprotocol.
    Blocks: for `PLUGIN_S` more where a credential plugin is asked who we are.
    """
    key = wsproto.utilities.generate_nonce()
    headers = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-key": key.decode("ascii"),
        "sec-websocket-version": "13",
        "sec-websocket-protocol": ", ".join(subprotocols),
    }
    request = http.build_request(
        "GET", path, params=list(params), headers=headers, timeout=connect_s
    )
    whole_s = 2 * connect_s + PLUGIN_S
    with trio.move_on_after(whole_s) as connecting, translated():
        response = await http.send(request, stream=True)
    if connecting.cancelled_caught:
        raise unreachable(f"no answer within {whole_s:g} s")
    try:
        agreed = response.headers.get("sec-websocket-protocol", "")
        if response.status_code != 101:
            with trio.move_on_after(connect_s), translated():
                await response.aread()
                raise refusal_of(response)
            raise unreachable(f"{response.status_code} and no reason within {connect_s:g} s")
        accept = response.headers.get("sec-websocket-accept", "").encode()
        if accept != wsproto.utilities.generate_accept_token(key):
            raise unreachable("the upgrade was answered by who does not know WebSockets")
        if agreed not in subprotocols:
            raise unreachable(f"the exec protocol {agreed!r} was not asked for")
        stream: _NetworkStream = response.extensions["network_stream"]
        yield WebSocket(stream, agreed, silence or Silence())
    finally:
        # shielded: cancelled at its first checkpoint it would leave the socket open. TLS says
        # goodbye, which a peer that does not read may hold up.
        with trio.move_on_after(_GOODBYE_S, shield=True):
            await response.aclose()
