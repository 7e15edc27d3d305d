"""A lean HTTP/1.1 client on trio for load: it must cost less than the server it measures.

Knows keep-alive requests with JSON answers, and streams whose body comes piece by piece. No
redirects, no TLS, no retries: whatever is not expected is a RuntimeError.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from bench.server import Server

RECEIVE_BYTES = 1 << 18
HEAD_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Status and headers (lower-case names) of an answer."""

    status: int
    headers: Mapping[str, str]


class Dechunker:
    """The body inside the chunked transfer coding. Source: RFC 9112, section 7.1."""

    def __init__(self) -> None:
        """At the first chunk's size line."""
        self.ended = False
        self._tail = b""
        # Bytes of the present chunk still to come, its CRLF included.
        self._left = 0
        self._is_last = False

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`; trailers are not expected."""
        raw = self._tail + data
        position = 0
        parts = []
        while not self.ended:
            if self._left == 0:
                end = raw.find(b"\r\n", position)
                if end < 0:
                    break
                size = int(raw[position:end].partition(b";")[0], 16)
                position = end + 2
                self._left = size + 2
                self._is_last = size == 0
            taken = min(len(raw) - position, self._left)
            parts.append(raw[position : position + min(taken, max(0, self._left - 2))])
            position += taken
            self._left -= taken
            if self._left > 0:
                break
            self.ended = self._is_last
        self._tail = raw[position:]
        return b"".join(parts)


class Connection:
    """One connection with one request at a time."""

    def __init__(self, stream: trio.SocketStream, server: Server) -> None:
        """Use `open_connection`."""
        self._stream = stream
        self._host = f"{server.host}:{server.port}"
        self._key = server.key
        self._rest = b""

    async def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> tuple[int, bytes]:
        """Status and whole body of one answer; the connection is kept."""
        await self._send(method, path, body)
        head = await self._receive_head()
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            return head.status, await self._receive_chunked()
        missing = int(head.headers.get("content-length", "0")) - len(self._rest)
        parts = [self._rest]
        while missing > 0:
            data = await self._receive_some()
            parts.append(data)
            missing -= len(data)
        self._rest = b""
        return head.status, b"".join(parts)

    @asynccontextmanager
    async def stream(self, path: str) -> AsyncIterator["Body"]:
        """The body of an event stream as it comes. Errors: RuntimeError unless 200."""
        await self._send("GET", path, None)
        head = await self._receive_head()
        if head.status != 200:
            raise RuntimeError(f"GET {path}: {head.status} {self._rest!r}")
        chunked = head.headers.get("transfer-encoding", "").lower() == "chunked"
        rest, self._rest = self._rest, b""
        yield Body(self._stream, rest, Dechunker() if chunked else None)

    async def _send(self, method: str, path: str, body: Mapping[str, object] | None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", f"X-API-Key: {self._key}"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        await self._stream.send_all("\r\n".join([*lines, "", ""]).encode() + content)

    async def _receive_head(self) -> Head:
        received = self._rest
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > HEAD_MAX_BYTES:
                raise RuntimeError("the head of an answer is too long")
            received += await self._receive_some()
        self._rest = received[end + 4 :]
        first, *lines = received[:end].decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        return Head(status=int(first.split()[1]), headers=headers)

    async def _receive_chunked(self) -> bytes:
        body = Body(self._stream, self._rest, Dechunker())
        self._rest = b""
        parts = []
        while data := await body.receive():
            parts.append(data)
        return b"".join(parts)

    async def _receive_some(self) -> bytes:
        data = bytes(await self._stream.receive_some(RECEIVE_BYTES))
        if not data:
            raise RuntimeError("the server closed the connection in the middle of an answer")
        return data


class Body:
    """A body that comes piece by piece."""

    def __init__(self, stream: trio.SocketStream, rest: bytes, dechunker: Dechunker | None) -> None:
        """`rest` came with the head. Without a dechunker the body ends with the connection."""
        self._stream = stream
        self._rest = rest
        self._dechunker = dechunker

    async def receive(self) -> bytes:
        """The next bytes of the body, b"" at its end."""
        while self._dechunker is None or not self._dechunker.ended:
            data, self._rest = self._rest, b""
            data = data or bytes(await self._stream.receive_some(RECEIVE_BYTES))
            if not data and self._dechunker is not None:
                raise RuntimeError("the stream was cut")
            if self._dechunker is None:
                return data
            if body := self._dechunker.feed(data):
                return body
        return b""


@asynccontextmanager
async def open_connection(server: Server) -> AsyncIterator[Connection]:
    """A connection to the server, closed at the end of the block."""
    stream = await trio.open_tcp_stream(server.host, server.port)
    async with stream:
        yield Connection(stream, server)


async def create(connection: Connection, path: str, body: Mapping[str, object]) -> str:
    """POST what makes something; the id of what was made. Errors: RuntimeError unless 201."""
    status, answer = await connection.request("POST", path, body)
    if status != 201:
        raise RuntimeError(f"POST {path}: {status} {answer!r}")
    return str(json.loads(answer)["data"]["id"])
