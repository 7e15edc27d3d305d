"""The exporter: sends spans, and the metrics now and then, to a collector by OTLP over HTTP.

On trio, without threads (but for the metrics' encoding): ADR 0020 has the figures. Bounds:
`QUEUE_MAX` spans wait, of more the oldest are dropped; a batch has `BATCH_MAX`, is encoded
`ENCODE_MAX` at once (1.5 ms of the event loop), tried `TRIES_MAX` times; a request has `timeout_s`;
at the end everything has `FLUSH_S`. A collector that is gone, slow or broken costs the drops, which
are counted, and nothing else: nobody waits for the exporter.
"""

import logging
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

import httpx2
import trio
from google.protobuf.message import DecodeError
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import (  # noqa: TID251  # its adapter
    ReadableSpan,
    Span,
    SpanProcessor,
)

from rdev import __version__
from rdev.ports.tracing import ExportStatistics

QUEUE_MAX = 4_096
BATCH_MAX = 512
ENCODE_MAX = 64
# A batch that is not full waits so long for more.
GATHER_S = 1.0
TRIES_MAX = 5
# From one try to the next: doubled each time; what the collector asks for, up to the most.
PAUSE_S = 1.0
PAUSE_MAX_S = 30.0
FLUSH_S = 2.0
# Of an answer so much is kept.
ANSWER_MAX_BYTES = 65_536

# Source: OTLP 1.x, "Retryable Response Codes".
_RETRYABLE = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
_SPANS = "v1/traces"
_METRICS = "v1/metrics"

_log = logging.getLogger("rdev.otlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """Where to. `url` is the part before `v1/traces`, with its slash; times in seconds."""

    url: str
    headers: Mapping[str, str]
    timeout_s: float
    ca_file: str | None = None


class Outbox(SpanProcessor):
    """Spans that ended, until they are sent."""

    def __init__(self, *, gather_s: float = GATHER_S) -> None:
        self.dropped = 0
        self._gather_s = gather_s
        self._spans: deque[ReadableSpan] = deque()
        self._work = trio.Event()
        self._full = trio.Event()

    def __len__(self) -> int:
        return len(self._spans)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Keep it; the oldest goes where there is no room."""
        if len(self._spans) >= QUEUE_MAX:
            self._spans.popleft()
            self.dropped += 1
        self._spans.append(span)
        self._work.set()
        if len(self._spans) >= BATCH_MAX:
            self._full.set()

    def shutdown(self) -> None:
        """Nothing."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Nothing."""
        return True

    async def gather(self) -> list[ReadableSpan]:
        """The next batch: as soon as it is full, `GATHER_S` after its first span at the latest."""
        if not self._spans:
            self._work = trio.Event()
            await self._work.wait()
        if len(self._spans) < BATCH_MAX:
            self._full = trio.Event()
            with trio.move_on_after(self._gather_s):
                await self._full.wait()
        return self.take()

    def take(self) -> list[ReadableSpan]:
        """What waits, at most a batch."""
        return [self._spans.popleft() for _ in range(min(BATCH_MAX, len(self._spans)))]


class OtlpExporter:
    """Sends what the outbox and the registry have."""

    def __init__(
        self,
        *,
        collector: Collector,
        outbox: Outbox,
        metrics: Callable[[], Awaitable[bytes]],
        metrics_every_s: float,
        pause_s: float = PAUSE_S,
        flush_s: float = FLUSH_S,
    ) -> None:
        """`metrics` makes a request of the metrics as they are. Opens nothing."""
        self._collector = collector
        self._outbox = outbox
        self._metrics = metrics
        self._metrics_every_s = metrics_every_s
        self._pause_s = pause_s
        self._flush_s = flush_s
        self._in_hand: list[ReadableSpan] = []
        self._exported = self._dropped = self._failed = self._metrics_sent = 0
        self._is_failing = False

    def statistics(self) -> ExportStatistics:
        """What waits and what was done."""
        return ExportStatistics(
            waiting=len(self._outbox) + len(self._in_hand),
            exported=self._exported,
            dropped=self._dropped + self._outbox.dropped,
            failed=self._failed,
            metrics=self._metrics_sent,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Export for as long as the block lasts, then what is left, in `FLUSH_S`."""
        collector = self._collector
        async with httpx2.AsyncClient(
            timeout=collector.timeout_s,
            trust_env=False,
            verify=_tls(collector),
            headers={
                "User-Agent": f"rdev/{__version__}",
                "Content-Type": "application/x-protobuf",
                **collector.headers,
            },
        ) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._span_loop, client)
                nursery.start_soon(self._metric_loop, client)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
            with trio.move_on_after(self._flush_s):
                try:
                    await self._flush(client)
                except Exception as error:  # noqa: BLE001  # nor a stop fail for what it would tell
                    _log.error("what is left cannot be exported", exc_info=error)

    async def _flush(self, client: httpx2.AsyncClient) -> None:
        """One try for each batch, and the metrics."""
        while batch := self._in_hand or self._outbox.take():
            self._in_hand = batch
            if (await self._send_spans(client, batch)).again_in_s is not None:
                return
            self._in_hand = []
        await self._send_metrics(client)

    async def _span_loop(self, client: httpx2.AsyncClient) -> None:
        while True:
            self._in_hand = await self._outbox.gather()
            try:
                await self._deliver(client)
            except Exception as error:  # noqa: BLE001  # telling must not end what is told of
                self._dropped += len(self._in_hand)
                _log.error("spans cannot be exported", exc_info=error)
            self._in_hand = []

    async def _deliver(self, client: httpx2.AsyncClient) -> None:
        """The batch in hand; dropped after `TRIES_MAX`."""
        for tried in range(TRIES_MAX):
            answer = await self._send_spans(client, self._in_hand)
            if answer.again_in_s is None:
                return
            await trio.sleep(max(answer.again_in_s, self._pause_s * 2**tried))
        self._dropped += len(self._in_hand)

    async def _metric_loop(self, client: httpx2.AsyncClient) -> None:
        """What is not taken is told with the next: everything is counted from the start."""
        while True:
            await trio.sleep(self._metrics_every_s)
            try:
                await self._send_metrics(client)
            except Exception as error:  # noqa: BLE001  # telling must not end what is told of
                _log.error("metrics cannot be exported", exc_info=error)

    async def _send_metrics(self, client: httpx2.AsyncClient) -> None:
        answer = await self._post(client, _METRICS, await self._metrics())
        self._metrics_sent += answer.is_taken

    async def _send_spans(
        self, client: httpx2.AsyncClient, batch: Sequence[ReadableSpan]
    ) -> "_Answer":
        """Counted where it is done with: taken, or refused for good."""
        parts: list[bytes] = []
        for first in range(0, len(batch), ENCODE_MAX):
            parts.append(encode_spans(batch[first : first + ENCODE_MAX]).SerializeToString())
            await trio.lowlevel.checkpoint()
        # Messages of one type, one behind the other, are one message with the fields of all.
        answer = await self._post(client, _SPANS, b"".join(parts))
        if answer.again_in_s is None:
            refused = min(len(batch), _refused_spans(answer)) if answer.is_taken else len(batch)
            self._exported += len(batch) - refused
            self._dropped += refused
        return answer

    async def _post(self, client: httpx2.AsyncClient, path: str, body: bytes) -> "_Answer":
        """Blocks: `timeout_s` at most. Raises nothing that a collector can cause."""
        answer, why = _Answer(again_in_s=0.0), "timeout"
        try:
            with trio.move_on_after(self._collector.timeout_s):
                answer = await _answer(client, self._collector.url + path, body)
                why = f"status {answer.status}"
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            why = type(error).__name__
        self._failed += not answer.is_taken
        self._note(is_failing=not answer.is_taken, why=why)
        return answer

    def _note(self, *, is_failing: bool, why: str) -> None:
        """A line when it begins to fail, and when it no longer does."""
        if is_failing and not self._is_failing:
            _log.warning("OTLP export fails", extra={"why": why})
        elif self._is_failing and not is_failing:
            _log.info("OTLP export goes on")
        self._is_failing = is_failing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a collector made of a request; `again_in_s` None: nothing more is to be tried."""

    status: int = 0
    again_in_s: float | None = None
    body: bytes = b""

    @property
    def is_taken(self) -> bool:
        return 200 <= self.status < 300


async def _answer(client: httpx2.AsyncClient, url: str, body: bytes) -> _Answer:
    async with client.stream("POST", url, content=body) as response:
        found = bytearray()
        # To its end: who leaves earlier leaves generators of httpx2 open. The timeout bounds it.
        async with aclosing(response.aiter_raw()) as pieces:
            async for piece in pieces:
                found += piece[: ANSWER_MAX_BYTES - len(found)]
        again_in_s = None
        if response.status_code in _RETRYABLE:
            again_in_s = _pause_s(response.headers.get("retry-after", ""))
        return _Answer(status=response.status_code, again_in_s=again_in_s, body=bytes(found))


def _tls(collector: Collector) -> ssl.SSLContext | bool:
    """Whom to trust; read from the disk only where it is needed."""
    if not collector.url.startswith("https:"):
        return False
    return ssl.create_default_context(cafile=collector.ca_file)


def _pause_s(asked: str) -> float:
    """What `Retry-After` asks for in seconds; 0 where it does not. (A date is not heeded.)"""
    return min(float(asked), PAUSE_MAX_S) if asked.isascii() and asked.isdigit() else 0.0


def _refused_spans(answer: _Answer) -> int:
    """Of a request that was taken: "partial success"."""
    try:
        told = ExportTraceServiceResponse.FromString(answer.body)
    except DecodeError:
        return 0
    return max(0, int(told.partial_success.rejected_spans))
