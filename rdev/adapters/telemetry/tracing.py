"""The tracing port on OpenTelemetry: which spans there are, their names, which are recorded.

Names and facts follow the semantic conventions of HTTP and messaging; what they have no name for is
`rdev.…`. Bounds: of a span's facts, `LIMITS`; of traces that clients ask to have recorded,
`ASKED_MAX_PER_S`; of spans that wait, the outbox's. All in trio's thread: nothing here is locked.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b

import trio
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource  # noqa: TID251  # its adapter
from opentelemetry.sdk.trace import (  # noqa: TID251  # its adapter
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.id_generator import IdGenerator  # noqa: TID251  # its adapter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: TID251  # its adapter
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan

from rdev import __version__
from rdev.domain.commands import LANE_CLASS, Claimed, Kind
from rdev.domain.deliveries import Owed
from rdev.domain.ids import ProjectId
from rdev.domain.redaction import redact_text
from rdev.domain.traces import TraceContext
from rdev.domain.webhook_targets import Target
from rdev.ports.tracing import Passed, Span, Step, current_trace

Fact = str | int | bool

# Clients may ask for their requests to be recorded, and anybody can: more than so many a second are
# decided about like those of clients that ask for nothing.
ASKED_MAX_PER_S = 50

LIMITS = SpanLimits(
    max_span_attributes=32,
    max_events=8,
    max_links=4,
    max_event_attributes=8,
    max_link_attributes=4,
    max_span_attribute_length=256,
)

# Whether it is recorded is decided before the SDK is asked.
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})
# Facts of the port that the conventions have a name for.
_NAMES = {
    "status_code": "http.response.status_code",
    "route": "http.route",
    "http_version": "network.protocol.version",
    "command_id": "messaging.message.id",
    "exit_code": "process.exit.code",
}


class OtelTracing:
    """See `Tracing`. `sample` is the part of traces that begin here which is recorded."""

    def __init__(
        self,
        *,
        outbox: SpanProcessor,
        resource: dict[str, str],
        sample: float,
        clock_ns: Callable[[], int] = time.time_ns,
        draw_bits: Callable[[int], int] = random.getrandbits,
    ) -> None:
        """`outbox` is told of every span that ended; `resource` says who tells."""
        self._ids = _Ids()
        provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource(resource),
            id_generator=self._ids,
            span_limits=LIMITS,
            shutdown_on_exit=False,
        )
        provider.add_span_processor(outbox)
        self._tracer = provider.get_tracer("rdev", __version__)
        self._sample = sample
        self._asked = _Allowance(ASKED_MAX_PER_S)
        self._clock_ns = clock_ns
        self._draw_bits = draw_bits

    def request(
        self, method: str, scheme: str, path: str, client_ip: str, offered: TraceContext | None
    ) -> Span:
        """See the port. Recorded where the client has it recorded, else by chance."""
        trace = self._entered(offered)
        if not trace.is_sampled:
            return Passed(trace)
        known = method if method in _METHODS else "_OTHER"
        facts: dict[str, Fact] = {
            "http.request.method": known,
            "url.scheme": scheme,
            # The client's own words: a key in the wrong place is no fact.
            "url.path": redact_text(path),
            "client.address": client_ip,
        }
        name = known if known in _METHODS else "HTTP"
        return self._begin(name, trace, SpanKind.SERVER, facts, is_root=offered is None)

    def submission(self, project: ProjectId, kind: Kind) -> Span:
        """See the port."""
        trace = current_trace.get()
        if trace is None or not trace.is_sampled:
            return Passed(trace)
        facts = _of_command("submit", "send", project, kind)
        return self._begin(f"submit {kind}", trace, SpanKind.PRODUCER, facts)

    def attempt(self, claimed: Claimed, *, claim_s: float) -> Span:
        """See the port. How long it was queued, and its claim, are told at once: they are known,
        and outlive a server that is killed during the attempt."""
        trace, lease = claimed.trace, claimed.lease
        if trace is None or not trace.is_sampled:
            return Passed(trace)
        now_ns = self._clock_ns()
        began_ns = now_ns - int(claim_s * 1e9)
        if not claimed.take_over:
            since_ns = now_ns - claimed.queue_wait_ms * 1_000_000
            self._begin("queue wait", trace, began_ns=since_ns).end()
        facts: dict[str, Fact] = {
            **_of_command("process", "process", claimed.project, claimed.kind),
            "messaging.message.id": lease.command,
            "rdev.attempt": claimed.attempt,
            "rdev.lease": lease.id,
            "rdev.take_over": claimed.take_over,
        }
        span = self._begin(
            f"process {claimed.kind}",
            trace,
            SpanKind.CONSUMER,
            facts,
            links=_former(claimed, trace),
            span_id=_attempt_id(lease.command, lease.id),
            began_ns=began_ns,
        )
        name = "take over" if claimed.take_over else "claim"
        span_id = None if claimed.take_over else _claim_id(lease.command, claimed.attempt)
        self._begin(name, span.context, span_id=span_id, began_ns=began_ns).end()
        return span

    def delivery(self, owed: Owed, target: Target) -> Span:
        """See the port. Without the URL's path, which may be the receiver's secret."""
        trace = owed.trace
        if trace is None or not trace.is_sampled:
            return Passed(trace)
        facts: dict[str, Fact] = {
            "http.request.method": "POST",
            "url.scheme": target.scheme,
            "server.address": target.host,
            "server.port": target.port,
            "rdev.webhook": owed.webhook,
            "rdev.event": owed.event,
        }
        if owed.attempt > 1:
            facts["http.request.resend_count"] = owed.attempt - 1
        return self._begin("POST", trace, SpanKind.CLIENT, facts)

    def _entered(self, offered: TraceContext | None) -> TraceContext:
        """The trace of a request: its client's, or one that begins. Source: W3C Trace Context,
        section 3.2.2.3: who is asked to record need not do it."""
        if offered is None:
            trace_id = self._drawn(128)
            is_sampled = self._is_in_sample(trace_id)
            span_id = f"{self._drawn(64):016x}"
            return TraceContext(trace_id=f"{trace_id:032x}", span_id=span_id, is_sampled=is_sampled)
        if (
            not offered.is_sampled
            or self._asked.admits()
            or self._is_in_sample(int(offered.trace_id, 16))
        ):
            return offered
        return replace(offered, is_sampled=False)

    def _is_in_sample(self, trace_id: int) -> bool:
        """By the trace's number alone: servers that are asked separately decide alike."""
        return (trace_id & (1 << 64) - 1) < self._sample * (1 << 64)

    def _begin(
        self,
        name: str,
        trace: TraceContext | None,
        kind: SpanKind = SpanKind.INTERNAL,
        facts: dict[str, Fact] | None = None,
        *,
        links: Sequence[Link] = (),
        span_id: int | None = None,
        began_ns: int | None = None,
        is_root: bool = False,
    ) -> "_Recorded":
        """A span below `trace`, or (`is_root`) the first of it."""
        assert trace is not None
        self._ids.trace_id = int(trace.trace_id, 16)
        self._ids.span_id = span_id or self._drawn(64)
        below = Context() if is_root else set_span_in_context(_remote(trace), Context())
        span = self._tracer.start_span(
            name, below, kind, facts, links, began_ns or self._clock_ns()
        )
        own = replace(trace, span_id=f"{self._ids.span_id:016x}")
        return _Recorded(span, own, self._begin, self._clock_ns)

    def _drawn(self, bits: int) -> int:
        """An id; 0 is none."""
        return self._draw_bits(bits) or 1


class _Recorded:
    """A span that is recorded. See `Span`."""

    __slots__ = ("_begin", "_clock_ns", "_context", "_open", "_span")

    def __init__(
        self,
        span: OtelSpan,
        context: TraceContext,
        begin: Callable[[str, TraceContext], "_Recorded"],
        clock_ns: Callable[[], int],
    ) -> None:
        self._span = span
        self._context = context
        self._begin = begin
        self._clock_ns = clock_ns
        self._open: list[_Recorded] = []

    @property
    def context(self) -> TraceContext:
        """See the port."""
        return self._context

    def tell(self, **facts: Fact | None) -> None:
        """See the port."""
        if not self._span.is_recording():
            return
        for name, value in facts.items():
            if value is not None:
                self._span.set_attribute(_NAMES.get(name, f"rdev.{name}"), value)
        if isinstance(self._span, ReadableSpan) and (route := facts.get("route")) is not None:
            self._span.update_name(f"{self._span.name} {route}")

    def step(self, step: Step) -> Span:
        """See the port."""
        begun = self._begin(step, self._context)
        self._open.append(begun)
        return begun

    def end(self, fault: str | None = None) -> None:
        """See the port."""
        if not self._span.is_recording():
            return
        for step in self._open:
            step.end()
        if fault is not None:
            self._span.set_attribute("error.type", fault)
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._clock_ns())


class _Ids(IdGenerator):
    """Gives the SDK the ids that were drawn for the next span."""

    trace_id = 1
    span_id = 1

    def generate_trace_id(self) -> int:
        """Of a trace that begins."""
        return self.trace_id

    def generate_span_id(self) -> int:
        """Of every span."""
        return self.span_id


class _Allowance:
    """So many a second, counted from the first of each second."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._since_s = float("-inf")
        self._used = 0

    def admits(self) -> bool:
        """Whether one more is within it; counted where it is."""
        now_s = trio.current_time()
        if now_s >= self._since_s + 1.0:
            self._since_s, self._used = now_s, 0
        self._used += 1
        return self._used <= self._per_s


def _of_command(operation: str, type_: str, project: ProjectId, kind: Kind) -> dict[str, Fact]:
    return {
        "messaging.system": "rdev",
        "messaging.operation.name": operation,
        "messaging.operation.type": type_,
        "messaging.destination.name": LANE_CLASS[kind],
        "rdev.project": project,
        "rdev.kind": kind,
    }


def _remote(trace: TraceContext) -> NonRecordingSpan:
    """The span above: another process's, or one of ours that need not be open any more."""
    return NonRecordingSpan(_span_context(trace, int(trace.span_id, 16)))


def _span_context(trace: TraceContext, span_id: int) -> SpanContext:
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(int(trace.trace_id, 16), span_id, True, _SAMPLED, state)


def _former(claimed: Claimed, trace: TraceContext) -> list[Link]:
    """What came before: of a take-over the attempt under the former lease (which may never have
    been told of as a whole: its server was killed), of a repetition the claim of the last one."""
    command = claimed.lease.command
    if claimed.take_over and claimed.taken_from is not None:
        before = _attempt_id(command, claimed.taken_from)
    elif not claimed.take_over and claimed.attempt > 1:
        before = _claim_id(command, claimed.attempt - 1)
    else:
        return []
    reason = "take_over" if claimed.take_over else "retry"
    return [Link(_span_context(trace, before), {"rdev.link": reason})]


def _attempt_id(command: str, lease: int) -> int:
    """The span of an attempt under one lease: known to who takes over, without a word said."""
    return _hashed(f"{command}/lease/{lease}")


def _claim_id(command: str, attempt: int) -> int:
    return _hashed(f"{command}/attempt/{attempt}")


def _hashed(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") or 1
