"""How the body of an event stream leaves: two writers with one interface.

`DirectWriter` (HTTP/1.1 without TLS) writes whole chunks of the transfer coding to the connection's
socket object: the hub does it without waking a task. `SendWriter` (HTTP/2, TLS, HTTP/1.0, a request
with a body) goes through hypercorn. Head and first frames always go through hypercorn; from then on
one of the two is the only one who writes, and a connection that was written directly is never used
again. Bounds: bytes that a client did not take (what was begun, nothing else), and how long it may
take for them.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import trio
from hypercorn.typing import ASGISendCallable

from rdev.adapters.http.connection import Connection
from rdev.services.stream import Frames, OfferEach, Outlet

# Bytes that leave under one timeout: a slow but live reader takes a large page in many.
_PIECE_BYTES = 1 << 16
# How long a client that is cut may take for what was begun and for the reason.
_PARTING_S = 2.0
_LAST_CHUNK = b"0\r\n\r\n"


class ClientLeftError(Exception):
    """Nobody reads any more: the connection is closed or broken."""


class SlowClientError(Exception):
    """The client did not take what was written in its time."""


class Writer(Protocol):
    """The only one who writes to a client after the first frames."""

    @property
    def outlet(self) -> Outlet | None:
        """Where the hub may write by itself; None where everything goes through this task."""
        ...

    async def write(self, data: bytes) -> None:
        """Write all of it. Errors: ClientLeftError, SlowClientError. Blocks: while the client does
        not take it, 30 s for each 64 KiB."""
        ...

    async def flush(self) -> None:
        """Write what the outlet had to keep. Errors and Blocks: as `write`."""
        ...

    async def end(self) -> None:
        """End the body. Errors and Blocks: as `write`."""
        ...

    async def part(self, data: bytes) -> None:
        """Give a client that is slow a last word, if it takes it within 2 s."""
        ...

    def hurry(self, within_s: float) -> None:
        """What is being written and cannot be cancelled has so long from now on."""
        ...


class SendWriter:
    """Through hypercorn. An HTTP/2 client that opens no window is not its connection's fault: only
    this stream is cut."""

    def __init__(
        self,
        send: ASGISendCallable,
        *,
        write_timeout_s: float,
        hurry: Callable[[float], None] | None = None,
    ) -> None:
        """`send` of the request; `hurry` of its connection, where that carries nothing else."""
        self._send = send
        self._hurry = hurry
        self._write_timeout_s = write_timeout_s

    @property
    def outlet(self) -> Outlet | None:
        """See `Writer`."""
        return None

    async def write(self, data: bytes) -> None:
        """See `Writer`."""
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            with trio.move_on_after(self._write_timeout_s) as patience:
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            if patience.cancelled_caught:
                raise SlowClientError

    async def flush(self) -> None:
        """Nothing is kept."""

    async def end(self) -> None:
        """See `Writer`."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def part(self, data: bytes) -> None:
        """Nothing: what was begun stands before it, and hypercorn has it."""

    def hurry(self, within_s: float) -> None:
        """See `Writer`."""
        if self._hurry is not None:
            self._hurry(within_s)


class Chunked:
    """Frames in the chunked transfer coding, made once for all who are given the same frames.

    Source: RFC 9112, section 7.1.
    """

    __slots__ = ("frames", "wire")

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.frames: Frames | None = None
        self.wire = b""

    def of(self, frames: Frames) -> bytes:
        """One chunk; `wire` from now on, as long as `frames` are the same."""
        self.frames, self.wire = frames, chunk(frames.data)
        return self.wire


def chunk(data: bytes) -> bytes:
    """One chunk that holds the data, which must not be empty: that would be the end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class DirectWriter:
    """Straight to the socket.

    The socket *object* is asked each time: once it is closed it knows that it is, while a number
    remembered from it may be another client's by then (seen: a line of one project at the reader of
    another).
    """

    __slots__ = ("_chunked", "_connection", "_is_broken", "_rest", "_socket")

    def __init__(self, connection: Connection, taken: socket.socket, chunked: Chunked) -> None:
        """`taken` is what `connection.take` gave; `chunked` is shared by all writers."""
        self._connection = connection
        self._socket = taken
        self._rest = memoryview(b"")
        self._is_broken = False
        self._chunked = chunked

    @property
    def outlet(self) -> Outlet | None:
        """See `Writer`."""
        return self

    def together(self, outlets: Sequence[Self]) -> OfferEach:
        """See `Outlet`.

        What it needs for each event is bound here, close together in memory: the sends, which are
        nine tenths of what an event costs, leave nothing else in the caches.
        """

        def offer_each(frames: Frames) -> list[int]:
            wire = chunked.wire if frames is chunked.frames else chunked.of(frames)
            size_bytes = len(wire)
            kept = []
            for place, send in enumerate(sends):
                try:
                    sent = send(wire)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    outlets[place]._is_broken = True
                    kept.append(place)
                    continue
                if sent != size_bytes:
                    outlets[place]._rest = memoryview(wire)[sent:]
                    kept.append(place)
            return kept

        chunked = self._chunked
        sends = [outlet._socket.send for outlet in outlets]
        return offer_each

    async def write(self, data: bytes) -> None:
        """See `Writer`."""
        await self._write(chunk(data))

    async def flush(self) -> None:
        """See `Writer`."""
        while self._rest or self._is_broken:
            with self._connection.patience() as patience:
                await self._send_piece()
            if patience.cancelled_caught:
                raise SlowClientError

    async def end(self) -> None:
        """See `Writer`."""
        await self._write(_LAST_CHUNK)

    async def part(self, data: bytes) -> None:
        """See `Writer`."""
        self._rest = memoryview(bytes(self._rest) + chunk(data) + _LAST_CHUNK)
        with trio.move_on_after(_PARTING_S):
            while self._rest:
                await self._send_piece()

    def hurry(self, within_s: float) -> None:
        """Nothing: all its waits can be cancelled."""

    async def _write(self, wire: bytes) -> None:
        await self.flush()
        self._rest = memoryview(wire)
        self._send()
        await self.flush()

    async def _send_piece(self) -> None:
        """Send until 64 KiB less are left, or nothing."""
        goal = len(self._rest) - _PIECE_BYTES
        while self._rest and len(self._rest) > goal:
            try:
                await trio.lowlevel.wait_writable(self._socket)
            except (OSError, ValueError, trio.ClosedResourceError) as error:
                raise ClientLeftError from error
            self._send()
        if self._is_broken:
            raise ClientLeftError

    def _send(self) -> None:
        try:
            self._rest = self._rest[self._socket.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._is_broken = True
            self._rest = memoryview(b"")
