"""The bytes of one connection to a receiver, of which only so many are read for each exchange.

The bound is here, below HTTP: it holds for bodies, heads, interim answers and frames alike. What is
above (httpcore2's connections) sees an error when it is passed.
"""

import httpcore2
import trio

# A request's head and body are one write each to HTTP, and one packet or TLS record to the network
# up to here.
GATHERED_BYTES = 65_536


class AnswerTooLongError(httpcore2.ReadError):
    """The exchange's bytes are used up."""


class BoundedStream(httpcore2.AsyncNetworkStream):
    """A connected stream, TLS or not. Its deadlines are the caller's cancel scopes."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        """Take over a connected stream; nothing may be read before `allow`."""
        self._stream = stream
        tcp = stream if isinstance(stream, trio.SocketStream) else stream.transport_stream
        self._socket = tcp.socket
        self._left_bytes = 0
        self._gathered = bytearray()
        self.read_bytes = 0
        self.has_ended = False

    def allow(self, answer_bytes: int) -> None:
        """Begin an exchange: so many bytes may be read, and `read_bytes` is 0 again."""
        self._left_bytes, self.read_bytes = answer_bytes, 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Some bytes; empty at the end. Errors: ReadError, AnswerTooLongError."""
        if self._left_bytes <= 0:
            raise AnswerTooLongError("the answer is longer than the bound")
        await self.flush()  # who answers before the request's end and closes is heard all the same
        try:
            data = await self._stream.receive_some(min(max_bytes, self._left_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.has_ended = True
            raise httpcore2.ReadError(str(error)) from error
        self._left_bytes -= len(data)
        self.read_bytes += len(data)
        self.has_ended = not data
        return bytes(data)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Take all of it; sent at the next `read`, or when `GATHERED_BYTES` are gathered.

        Errors: WriteError.
        """
        self._gathered += buffer
        if len(self._gathered) < GATHERED_BYTES:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._send_gathered()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore2.WriteError(str(error)) from error

    async def flush(self) -> None:
        """Send what is gathered; where that fails, the next `read` tells."""
        try:
            await self._send_gathered()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.has_ended = True

    async def _send_gathered(self) -> None:
        if self._gathered:
            data, self._gathered = self._gathered, bytearray()
            await self._stream.send_all(data)

    async def aclose(self) -> None:
        """Close at once; a receiver that does not read cannot hold it up."""
        self.abort()

    def abort(self) -> None:
        """Close without a word of TLS: nothing that counts is under way any more."""
        self._socket.close()

    def has_news(self) -> bool:
        """Whether something waits to be read: on an idle HTTP/1.1 connection, its end."""
        return self._socket.fileno() < 0 or self._socket.is_readable()
