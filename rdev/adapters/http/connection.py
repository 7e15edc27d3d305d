"""One client connection: hypercorn's, with the guards it lacks and fewer steps per request.

Every guard here answers a fault seen in hypercorn 0.18 with quart-trio 0.12 and 0.13; each has a
regression test in tests/adapters/http/test_connection.py. Bounds: seconds idle, seconds until a
request's head is complete, seconds for each piece that is written.
"""

import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import TrioSingleTask, WorkerContext
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    ConnectionState,
    HTTPResponseStartEvent,
    Scope,
)
from hypercorn.typing import TaskGroup as TaskGroupProtocol

from rdev.adapters.http.heads import GuardedH11, Refusal
from rdev.adapters.http.inbox import inbox_of

# How long and how far a client that was refused may go on sending: closed with unread bytes, a
# connection is reset, and the reset may overtake the answer.
_LINGER_S = 2.0
_LINGER_MAX_BYTES = 1 << 20

# Bytes that are written under one timeout: a slow but live reader takes a large body in many.
_WRITE_PIECE_BYTES = 1 << 16

_HTTP_1 = ("1.0", "1.1")

# Where a request finds its connection, if that lends its socket (`Connection.take`).
EXTENSION = "rdev.connection"
# Where a request finds `Connection.hurry`, if the connection carries no other request beside it.
HURRY = "rdev.hurry"

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Connection(TCPServer):
    """A connection that always ends.

    Idle, half a request head, a reader that stopped: each is closed after its time, and `abort`
    closes any of them at once. Hypercorn has no bound for the last two, and the first does not hold
    with quart-trio.
    """

    def __init__(
        self,
        app: ASGIFramework,
        config: Config,
        context: WorkerContext,
        stream: Stream,
        *,
        header_timeout_s: float,
        write_timeout_s: float,
        refusal: Refusal,
        plain: socket.socket | None = None,
    ) -> None:
        """Serve `app` on `stream`; the idle time is `config.keep_alive_timeout`.

        `plain` is the socket object under a stream without TLS; `refusal` answers what cannot be
        read.
        """
        # hypercorn says SSLStream and takes both.
        super().__init__(self._answer, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        self._transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        self._asgi = app
        self._refusal = refusal
        self._write_timeout_s = write_timeout_s
        self._plain = plain
        self._is_taken = self._has_left = False
        self._on_left: Callable[[], None] | None = None
        self._joined: list[bytes] | None = None
        self._writing: trio.CancelScope | None = None
        self._ending: set[trio.CancelScope] = set()
        self._idle = _IdleTimer(
            close=self._initiate_server_close,
            context=context,
            header_s=header_timeout_s,
            keep_alive_s=config.keep_alive_timeout,
        )
        self.idle_task = self._idle

    def abort(self) -> None:
        """Close the socket now; whoever reads or writes it sees it closed. Synchronous."""
        self._transport.socket.close()
        for scope in self._ending:
            if scope.deadline != inf:
                scope.cancel()

    def hurry(self, within_s: float) -> None:
        """Somebody must go (the server stops, a key has ended): from now on each write has so long,
        the one under way included."""
        self._write_timeout_s = min(self._write_timeout_s, within_s)
        if self._writing is not None:
            soon = trio.current_time() + self._write_timeout_s
            self._writing.deadline = min(self._writing.deadline, soon)
        for scope in self._ending:
            if scope.deadline != inf:
                scope.deadline = min(scope.deadline, trio.current_time() + self._write_timeout_s)

    def take(self, on_left: Callable[[], None]) -> socket.socket:
        """Lend the socket object to the response under way, whose head and first bytes are out.

        From here on the taker is the only one who writes; when the response ends, the connection
        is closed. `on_left` is called when the client has gone.
        """
        assert self._plain is not None, "a connection without the extension lends nothing"
        self._is_taken = True
        self._on_left = on_left
        if self._has_left:
            on_left()
        return self._plain

    @contextmanager
    def ending(self, *, waits: bool) -> Iterator[None]:
        """Around the end of a response, shielded. Where it waits for the client's window (HTTP/2),
        the client has the time of one piece; `hurry` shortens it, and `abort` ends it."""
        deadline = trio.current_time() + self._write_timeout_s if waits else inf
        # shielded: see where it is used; bounded as the docstring says
        with trio.CancelScope(shield=True, deadline=deadline) as scope:
            self._ending.add(scope)
            try:
                yield
            finally:
                self._ending.discard(scope)
        if scope.cancelled_caught:
            self.abort()

    @contextmanager
    def patience(self) -> Iterator[trio.CancelScope]:
        """The time that the client has for one piece; `hurry` shortens it."""
        with trio.move_on_after(self._write_timeout_s) as scope:
            self._writing = scope
            try:
                yield scope
            finally:
                self._writing = None

    async def protocol_send(self, event: Event) -> None:
        """Write what hypercorn's protocols have to say."""
        if isinstance(event, RawData):
            if self._is_taken:
                return  # not between the taker's bytes: the connection is closed after them
            if self._joined is not None:
                self._joined.append(event.data)
            elif event.data:
                await self._write(event.data)
            return
        if isinstance(event, Closed):
            await self._write_joined()
        await super().protocol_send(event)

    async def _answer(
        self,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        sync_spawn: Callable[..., Awaitable[object]],
        call_soon: Callable[..., object],
    ) -> None:
        """Run the app for one request."""
        inbox = None
        if scope["type"] == "http":
            inbox = inbox_of(scope, receive)
            receive = receive if inbox is None else inbox.receive
            if scope["http_version"] in _HTTP_1:
                scope["extensions"][HURRY] = {"hurry": self.hurry}
            if self._plain is not None and scope["http_version"] == "1.1":
                scope["extensions"][EXTENSION] = {"connection": self}
            send = _Response(self, send, is_joined=scope["http_version"] in _HTTP_1)
        try:
            await self._asgi(scope, receive, send)
        finally:
            if inbox is not None:
                inbox.close()

    async def send_joined(
        self, send: ASGISendCallable, head: HTTPResponseStartEvent, first: ASGISendEvent
    ) -> None:
        """Write a response's head and the first piece of its body at once.

        HTTP/1 only: there nothing waits for the client between the two. Hypercorn writes head,
        body and an empty end one by one; that was half of a small request's CPU.
        """
        self._joined = []
        try:
            await send(head)
            await send(first)
        finally:
            await self._write_joined()  # noqa: ASYNC102  # cancelled, it writes nothing

    async def _write_joined(self) -> None:
        """Write what was held back, if anything was."""
        held, self._joined = self._joined, None
        if held:
            await self._write(b"".join(held))

    async def _write(self, data: bytes) -> None:
        """Write all of it, or close the connection where the client does not take it.

        Hypercorn shields the write without any bound, so one client that stopped reading held the
        whole shutdown for ever. No issue upstream known.
        """
        try:
            # shielded: half a frame would corrupt what follows; bounded by the timeout and `abort`
            with trio.CancelScope(shield=True):
                async with self.send_lock:
                    await self._write_pieces(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())

    async def _write_pieces(self, data: bytes) -> None:
        """Write piece by piece; a piece that is not taken in its time aborts the connection."""
        for start in range(0, len(data), _WRITE_PIECE_BYTES):
            piece = data[start : start + _WRITE_PIECE_BYTES]
            with self.patience() as patience:
                await self.stream.send_all(piece)
            if patience.cancelled_caught:
                self.abort()
                raise trio.BrokenResourceError("the client does not read")

    async def _read_data(self) -> None:
        """Feed the protocol until the client is done.

        When it is, the idle timer ends too: hypercorn kept the descriptor of a client that had
        closed until the keep-alive time was over.
        """
        if isinstance(self.protocol.protocol, H11Protocol):
            self.protocol.protocol = GuardedH11(
                self.protocol.protocol, refusal=self._refusal, linger=self._discard
            )
        try:
            while data := await self._received():
                if self._is_taken:
                    continue  # no further request is answered here; only the end is heard
                requests = self._idle.requests
                await self.protocol.handle(RawData(data))
                if self._idle.requests == requests:
                    self._idle.shorten()
            self._has_left = True
            if self._on_left is not None:
                self._on_left()
            await self.protocol.handle(Closed())
        finally:
            self._idle.expire()

    async def _discard(self) -> None:
        """Let a refused client read its answer: tell it the end, and throw away what it sends."""
        left_bytes = _LINGER_MAX_BYTES
        with trio.move_on_after(_LINGER_S):
            if self._plain is not None:
                with suppress(OSError):  # it has gone already
                    self._plain.shutdown(socket.SHUT_WR)
            while left_bytes > 0 and (data := await self._received()):
                left_bytes -= len(data)

    async def _received(self) -> bytes:
        """The next bytes, or none when there will be no more."""
        try:
            return bytes(await self.stream.receive_some(MAX_RECV))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            return b""


class _Response:
    """`send` of one request, with the final-send shield and the joined first write."""

    def __init__(self, connection: Connection, send: ASGISendCallable, *, is_joined: bool) -> None:
        self._connection = connection
        self._send = send
        self._is_joined = is_joined
        self._head: HTTPResponseStartEvent | None = None

    async def __call__(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start" and self._is_joined:
            # ASGI lets the head wait for the first piece of the body.
            self._head = message
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            # shielded: at the end of a response hypercorn delivers `http.disconnect`, on which
            # quart-trio cancels the request while it is inside this very send. Without the shield
            # the connection is neither recycled nor closed: keep-alive never times out,
            # `Connection: close` and HTTP/1.0 get no end. Bounded by the write timeout, and by
            # `ending` where it waits for the client's window.
            with self._connection.ending(waits=not self._is_joined):
                await self._pass(message)
        else:
            await self._pass(message)

    async def _pass(self, message: ASGISendEvent) -> None:
        """To hypercorn, with the head if that still waits.

        A cancelled request ends here, between two messages: the writes below are shielded, so a
        body that never waits for anything else would go on for ever after its client has left.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        head, self._head = self._head, None
        if head is None:
            await self._send(message)
        else:
            await self._connection.send_joined(self._send, head, message)


class _IdleTimer(TrioSingleTask):
    """Closes the connection when nothing is asked for too long, or at shutdown when idle.

    Takes the place of hypercorn's timer, which starts a task for every request; this one moves one
    deadline.
    """

    def __init__(
        self,
        *,
        close: Callable[[], Awaitable[None]],
        context: WorkerContext,
        header_s: float,
        keep_alive_s: float,
    ) -> None:
        super().__init__()
        self.requests = 0
        self._close = close
        self._terminated = context.terminated
        self._header_s = header_s
        self._keep_alive_s = keep_alive_s
        self._scope = trio.CancelScope()
        self._is_watched = False

    async def restart(
        self, task_group: TaskGroupProtocol, action: Callable[[], Awaitable[None]]
    ) -> None:
        """Nothing is asked now. `action` is hypercorn's own end of the wait."""
        if self._is_watched:
            idle_s = self._keep_alive_s if not self._terminated.is_set() else 0
            self._scope.deadline = trio.current_time() + idle_s
        else:
            # A new connection has the time of a head, not of a pause between two requests.
            self._scope.deadline = trio.current_time() + self._header_s
            self._is_watched = True
            task_group.spawn(self._watch)

    async def stop(self) -> None:
        """A request has begun."""
        self.requests += 1
        self._scope.deadline = inf

    def shorten(self) -> None:
        """Bytes came that are no whole head yet: the rest has the time of a head from now."""
        if self._scope.deadline != inf:
            until = trio.current_time() + self._header_s
            self._scope.deadline = min(self._scope.deadline, until)

    def expire(self) -> None:
        """Close the connection at the next opportunity.

        Not by the deadline: a response that ends in the same moment would move it again.
        """
        self._scope.cancel()

    async def _watch(self) -> None:
        """Wait for the deadline or for an idle connection at shutdown, then close."""
        with self._scope:
            await self._terminated.wait()
            if self._scope.deadline == inf:
                # A response is under way; hypercorn closes after it.
                await trio.sleep_forever()
        # shielded: the connection must be closed although its nursery may be cancelled
        with trio.CancelScope(shield=True):
            await self._close()
