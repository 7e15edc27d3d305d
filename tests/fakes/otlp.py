"""A collector: takes OTLP over HTTP, decodes the real protobuf, and can be slow, broken or deaf."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1 import trace_pb2

DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A span as it came."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    facts: dict[str, object]
    links: dict[str, dict[str, object]]
    state: str
    is_error: bool
    server: str


@dataclass(slots=True, kw_only=True)
class Collector:
    """What came, and how it answers. Filled by threads; the lists only grow."""

    url: str = ""
    spans: list[Seen] = field(default_factory=list)
    metrics: list[dict[str, Metric]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    # The status of the next answers, its headers, its body, and how long it takes.
    status: int = 200
    answer_headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    delay_s: float = 0.0

    def trace(self, trace_id: str) -> list[Seen]:
        """The spans of one trace, in the order of their beginnings."""
        found = [span for span in self.spans if span.trace_id == trace_id]
        return sorted(found, key=lambda span: span.began_ns)

    def await_(self, condition: Callable[[], object], what: str) -> None:
        """Wait until it is so. Blocks the thread. Errors: AssertionError at the deadline."""
        until = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < until, f"{what}; came: {[span.name for span in self.spans]}"
            time.sleep(0.02)

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        """One request."""
        self.headers.append(headers)
        self.bodies.append(body)
        if self.status != 200:
            return
        if path.endswith("/v1/traces"):
            self.spans += spans_of(ExportTraceServiceRequest.FromString(body))
        else:
            self.metrics.append(metrics_of(ExportMetricsServiceRequest.FromString(body)))


@contextmanager
def open_collector() -> Iterator[Collector]:
    """A collector on a loopback port."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(collector.delay_s)
            status = collector.status
            headers = {name.lower(): value for name, value in self.headers.items()}
            collector.take(self.path, headers, body)
            self.send_response(status)
            for name, value in collector.answer_headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(collector.answer)))
            self.end_headers()
            with suppress(ConnectionError):  # who asked need not read it all
                self.wfile.write(collector.answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def spans_of(request: ExportTraceServiceRequest) -> list[Seen]:
    """All spans of a request."""
    found = []
    for told in request.resource_spans:
        server = str(_facts(told.resource.attributes)["service.instance.id"])
        for scope in told.scope_spans:
            found += [_seen(span, server) for span in scope.spans]
    return found


def metrics_of(request: ExportMetricsServiceRequest) -> dict[str, Metric]:
    """All metrics of a request, by name."""
    return {
        metric.name: metric
        for told in request.resource_metrics
        for scope in told.scope_metrics
        for metric in scope.metrics
    }


def _seen(span: trace_pb2.Span, server: str) -> Seen:
    return Seen(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        began_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        facts=_facts(span.attributes),
        links={link.span_id.hex(): _facts(link.attributes) for link in span.links},
        state=span.trace_state,
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        server=server,
    )


def _facts(attributes: list[KeyValue]) -> dict[str, object]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: AnyValue) -> object:
    which = value.WhichOneof("value")
    return None if which is None else getattr(value, which)
