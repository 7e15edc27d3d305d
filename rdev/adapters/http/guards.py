"""What stands between hypercorn and Quart for every request: the body limit.

Bounds: bytes of a body, and how long and how far a refused body is still read.
"""

import trio
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    HTTPScope,
)

from rdev.adapters.http.exchange import exchange
from rdev.adapters.http.problems import problem
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import Telemetry

# A connection that is closed with unread bytes is reset, and the reset may overtake the answer. So
# the rest of a body nobody wants is read and thrown away, for this long and this many limits.
_LINGER_S = 2.0
_LINGER_LIMITS = 16


async def refuse(
    send: ASGISendCallable,
    error: RdevError,
    *,
    more_body: bool = False,
    status: int | None = None,
) -> None:
    """Answer the running exchange with the error's problem document."""
    this = exchange()
    told = problem(
        error, request_id=this.request_id, instance=this.path, now=this.now(), status=status
    )
    headers = [(name.lower().encode(), value.encode()) for name, value in told.headers]
    headers.append((b"content-length", b"%d" % len(told.body)))
    await send({"type": "http.response.start", "status": told.status, "headers": headers})
    await send({"type": "http.response.body", "body": told.body, "more_body": more_body})


class BodyLimit:
    """Refuses bodies over the limit with 413, whatever the framework would do with them.

    Quart 0.23 takes a chunked body into memory without bound before it looks at
    MAX_CONTENT_LENGTH (a 200 MB upload cost 222 MB), also for routes that never read it. No issue
    upstream known; pallets/quart#475 is the change that brought the unbounded queue.
    """

    def __init__(self, app: ASGIFramework, *, limit_bytes: int, telemetry: Telemetry) -> None:
        """Guard `app`; `limit_bytes` is the largest body it may see."""
        self._app = app
        self._limit_bytes = limit_bytes
        self._telemetry = telemetry

    async def __call__(
        self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """Serve one request."""
        length, has_body = announced(scope)
        if not has_body:
            await self._app(scope, receive, send)
            return
        exchange().is_body_pending = True
        body = _CountedBody(receive, send, self._limit_bytes)
        if length is None or length <= self._limit_bytes:
            with body.within_limit:
                await self._app(scope, body.receive, body.send)
            if not body.within_limit.cancelled_caught or body.is_answered:
                return
        self._telemetry.limit_checked("body", refused=True)
        message = f"the body is larger than the limit of {self._limit_bytes} bytes"
        await refuse(send, RdevError(ErrorCode.PAYLOAD_TOO_LARGE, message), more_body=True)
        await body.discard_rest()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def announced(scope: HTTPScope) -> tuple[int | None, bool]:
    """The length the client announced, and whether there can be a body at all."""
    has_body = scope["http_version"] not in ("1.0", "1.1")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value), int(value) > 0
        if name == b"transfer-encoding":
            has_body = True
    return None, has_body


class _CountedBody:
    """The body of one request while it arrives, and the answer while it leaves."""

    def __init__(
        self, receive: ASGIReceiveCallable, send: ASGISendCallable, limit_bytes: int
    ) -> None:
        self.within_limit = trio.CancelScope()
        self.is_answered = False
        self._receive = receive
        self._send = send
        self._limit_bytes = limit_bytes
        self._seen_bytes = 0
        self._exchange = exchange()
        self._ended = trio.Event()

    async def receive(self) -> ASGIReceiveEvent:
        """The next message; the one that passes the limit is never seen by the app."""
        message = await self._next()
        if self._seen_bytes > self._limit_bytes:
            self.within_limit.cancel()
            await trio.sleep_forever()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        """Pass the answer on; its end waits a little for the end of the body (see `_LINGER_S`).

        The whole answer has left by then, so that the wait takes nobody's place. The app goes on
        receiving meanwhile.
        """
        self.is_answered = True
        is_end = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_end and not self._ended.is_set():
            if message["type"] == "http.response.body" and message["body"]:
                rest = message["body"]
                await self._send({"type": "http.response.body", "body": rest, "more_body": True})
            self._exchange.slot.release()
            with trio.move_on_after(_LINGER_S):
                await self._ended.wait()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._send(message)

    async def discard_rest(self) -> None:
        """Read on without keeping anything and in nobody's place, until the body or the patience
        ends."""
        self._exchange.slot.release()
        most_bytes = self._limit_bytes * (_LINGER_LIMITS + 1)
        with trio.move_on_after(_LINGER_S):
            while not self._ended.is_set() and self._seen_bytes < most_bytes:
                await self._next()

    async def _next(self) -> ASGIReceiveEvent:
        """Receive and count."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._ended.set()
            self._exchange.is_body_pending = False
        return message
