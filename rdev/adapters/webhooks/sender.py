"""One POST to a receiver: the adapter of `ports/webhooks.py`.

Owns the exchange: which headers go out, how much of an answer is read, what each thing that can go
wrong is called. HTTP itself is httpcore2's; its pool is not used, since it would share connections
between exchanges and could not bound each one's bytes. Bounds: `total_s` for an attempt,
`ANSWER_BYTES_MAX` read, `BODY_BYTES_KEPT` kept; connections as in `kept.py` and `dialling.py`.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import h2.exceptions
import httpcore2
import trio

from rdev import __version__
from rdev.adapters.webhooks.dialling import Dialler, Resolve, SendFailedError, SystemResolver
from rdev.adapters.webhooks.kept import Connection, KeptConnections
from rdev.adapters.webhooks.stream import AnswerTooLongError
from rdev.domain.sending import (
    ANSWER_BYTES_MAX,
    BODY_BYTES_KEPT,
    Outcome,
    OutgoingRequest,
    SendFault,
)
from rdev.domain.signing import redacted
from rdev.domain.webhook_targets import Target, TargetRules

USER_AGENT = f"rdev/{__version__}"
RETRY_AFTER_CHARACTERS_MAX = 64
CONNECT_S = 5.0
TOTAL_S = 15.0
IDLE_MAX = 256
IDLE_S = 30.0
AGE_S = 60.0

# What a receiver can make httpcore2 raise that is no fault of the connection. ValueError: a
# `:status` that is no number.
_NO_HTTP = (httpcore2.ProtocolError, h2.exceptions.H2Error, ValueError)
_ENDED = (httpcore2.NetworkError, httpcore2.ConnectionNotAvailable)


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderStatistics:
    """Since the start: connections dialled, and exchanges on connections that were kept."""

    dialled: int
    reused: int
    idle: int


@dataclass(slots=True, kw_only=True)
class _Answer:
    """What has come of an answer so far; outlives the exchange that is cut."""

    status: int | None = None
    http_version: str | None = None
    retry_after: str | None = None
    body: bytearray = field(default_factory=bytearray)
    truncated: bool = False

    def take_head(self, response: httpcore2.Response) -> None:
        # 101 among them: nobody asked for another protocol, and no end would come.
        if not 200 <= response.status <= 599:
            raise SendFailedError(SendFault.PROTOCOL, "the answer's status is none of an answer")
        self.status = response.status
        self.http_version = _http_version(response)
        for name, value in response.headers:
            if name.lower() == b"retry-after":
                self.retry_after = value.decode("latin-1")[:RETRY_AFTER_CHARACTERS_MAX].strip()

    def take_body(self, data: bytes) -> None:
        room = BODY_BYTES_KEPT - len(self.body)
        self.body += data[:room]
        self.truncated = self.truncated or len(data) > room


class HttpWebhookSender:
    """Sends over HTTP/1.1 and 2 by the operator's rules. `close` at the end."""

    def __init__(
        self,
        *,
        rules: TargetRules,
        tls: ssl.SSLContext,
        resolve: Resolve | None = None,
        connect_s: float = CONNECT_S,
        total_s: float = TOTAL_S,
        idle_max: int = IDLE_MAX,
        idle_s: float = IDLE_S,
        age_s: float = AGE_S,
    ) -> None:
        """Keep the parts; connects to nothing. `tls` is `tls_context()`'s; without `resolve` names
        are the system's to resolve. `idle_max` 0 keeps no connection."""
        self._dialler = Dialler(
            rules=rules, resolve=resolve or SystemResolver(), tls=tls, connect_s=connect_s
        )
        self._kept = KeptConnections(idle_max=idle_max, idle_s=idle_s, age_s=age_s)
        self._total_s = total_s
        self._dialled = 0
        self._reused = 0

    async def send(self, request: OutgoingRequest) -> Outcome:
        """See `WebhookSender.send`."""
        began_s = trio.current_time()
        answer = _Answer()
        headers = _headers(request)
        fault, detail = None, ""
        try:
            with trio.fail_after(self._total_s):
                await self._send(request, headers, answer)
        except trio.TooSlowError:
            fault, detail = SendFault.TIMEOUT, f"no whole answer within {self._total_s:g} s"
        except SendFailedError as error:
            fault, detail = error.fault, error.detail
        return Outcome(
            status=answer.status,
            fault=fault,
            detail=detail,
            latency_s=trio.current_time() - began_s,
            request_headers=redacted(headers),
            body=bytes(answer.body),
            truncated=answer.truncated or (fault is not None and answer.status is not None),
            http_version=answer.http_version,
            retry_after=answer.retry_after,
        )

    def statistics(self) -> SenderStatistics:
        """Counters since the start, and what is idle now."""
        return SenderStatistics(dialled=self._dialled, reused=self._reused, idle=len(self._kept))

    def close(self) -> None:
        """Close the idle connections. Those in use are closed by their exchanges' cancellation."""
        self._kept.close()

    async def _send(
        self, request: OutgoingRequest, headers: dict[str, str], answer: _Answer
    ) -> None:
        origin = (request.target.scheme, request.target.host, request.target.port)
        if (kept := self._kept.take(origin)) is not None:
            self._reused += 1
            try:
                return await self._exchange(kept, request, headers, answer)
            except SendFailedError as error:
                # The receiver closed it while it lay idle: that is no attempt.
                if error.fault is not SendFault.CUT or kept.stream.read_bytes:
                    raise
        connection = await self._open(request.target)
        return await self._exchange(connection, request, headers, answer)

    async def _open(self, target: Target) -> Connection:
        judged_at_s = trio.current_time()
        dialled = await self._dialler.dial(target)
        self._dialled += 1
        speaks = (
            httpcore2.AsyncHTTP2Connection if dialled.speaks_h2 else httpcore2.AsyncHTTP11Connection
        )
        return Connection(
            origin=(target.scheme, target.host, target.port),
            stream=dialled.stream,
            http=speaks(_url(target).origin, dialled.stream),
            judged_at_s=judged_at_s,
        )

    async def _exchange(
        self,
        connection: Connection,
        request: OutgoingRequest,
        headers: dict[str, str],
        answer: _Answer,
    ) -> None:
        """Send and read on a connection that is this exchange's alone; keep it or close it."""
        connection.stream.allow(ANSWER_BYTES_MAX)
        wire = httpcore2.Request(
            b"POST", _url(request.target), headers=list(headers.items()), content=request.body
        )
        async with self._returned(connection):
            try:
                await _read_answer(connection, wire, answer)
                # Of HTTP/2: acknowledgements that the receiver waits for while it lies idle.
                await connection.stream.flush()
            except AnswerTooLongError:
                answer.truncated = True
                if answer.status is None:
                    detail = f"the answer's head has more than {ANSWER_BYTES_MAX} bytes"
                    raise SendFailedError(SendFault.PROTOCOL, detail) from None
            except _ENDED as error:
                raise _cut(connection) from error
            except _NO_HTTP as error:
                if connection.stream.has_ended:
                    raise _cut(connection) from error
                detail = "the answer is not HTTP, or broken"
                raise SendFailedError(SendFault.PROTOCOL, detail) from error

    @asynccontextmanager
    async def _returned(self, connection: Connection) -> AsyncIterator[None]:
        """Keep the connection when the block ends well, close it when not."""
        try:
            yield
        except BaseException:
            connection.stream.abort()
            raise
        self._kept.put(connection)


async def _read_answer(connection: Connection, wire: httpcore2.Request, answer: _Answer) -> None:
    response = await connection.http.handle_async_request(wire)
    try:
        answer.take_head(response)
        async with aclosing(response.aiter_stream()) as pieces:
            async for piece in pieces:
                answer.take_body(piece)
    finally:
        await response.aclose()


def _cut(connection: Connection) -> SendFailedError:
    had = "before its end" if connection.stream.read_bytes else "without an answer"
    return SendFailedError(SendFault.CUT, f"the receiver closed the connection {had}")


def _headers(request: OutgoingRequest) -> dict[str, str]:
    return {
        "host": request.target.authority,
        "user-agent": USER_AGENT,
        "content-type": "application/json",
        "content-length": str(len(request.body)),
        "accept": "*/*",
        "accept-encoding": "identity",
        **request.headers,
    }


def _url(target: Target) -> httpcore2.URL:
    return httpcore2.URL(
        scheme=target.scheme, host=target.host, port=target.port, target=target.path
    )


def _http_version(response: httpcore2.Response) -> str:
    raw = response.extensions["http_version"]
    return raw.decode("ascii").removeprefix("HTTP/") if isinstance(raw, bytes) else ""
