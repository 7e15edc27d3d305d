"""One request and its answer, as the shell knows them while they last.

The exchange of the running task is found by `exchange()`; routes need it for the request id, the
client's address and to say that they hold the request on purpose (`hold`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import trio
from hypercorn.typing import HTTPScope

from rdev.adapters.http.limits import Slot
from rdev.domain.audit import Actor
from rdev.domain.keys import Principal
from rdev.domain.tickets import Ticket
from rdev.domain.traces import TraceContext, parse_trace
from rdev.ports.tracing import Span

# Label of requests that no route answers: unknown paths must not make new time series.
UNKNOWN_ROUTE: Final = "unknown"
# And of methods that HTTP does not know, or that could not be read.
OTHER_METHOD: Final = "OTHER"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What is known of one request. Times are `trio.current_time()`, in seconds."""

    request_id: str
    span: Span = field(repr=False)
    client_ip: str
    method: str
    path: str
    started_at_s: float
    slot: Slot
    scope: HTTPScope = field(repr=False)
    now: Callable[[], datetime]
    # A trusted proxy handed on two stories about the client.
    has_doubtful_client: bool = False
    credential: str | None = field(default=None, repr=False)
    route: str = UNKNOWN_ROUTE
    principal: Principal | None = None
    # Whether the request tried to say who it is, and the ticket by which it came in.
    has_credential: bool = False
    # Whether there is a body whose end has not come.
    is_body_pending: bool = False
    ticket: Ticket | None = None
    status: int | None = None
    latency_s: float | None = None
    # Whether telemetry was told of its start and of its end.
    is_counted: bool = False
    is_finished: bool = False
    # Sent with whatever answer is given, also with a refusal (rate limits).
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    # Called once when the exchange is over, whatever came of it (a place among the streams).
    at_end: list[Callable[[], None]] = field(default_factory=list)

    @property
    def method_label(self) -> str:
        """The method as a metric label: one value for all that HTTP does not know."""
        return self.method if self.method in _METHODS else OTHER_METHOD


_current: ContextVar[Exchange] = ContextVar("exchange")


def exchange() -> Exchange:
    """The exchange this task serves. Only inside a request."""
    return _current.get()


def begin(started: Exchange) -> None:
    """Make it the exchange of this task and of the tasks it starts."""
    _current.set(started)


def principal() -> Principal:
    """Who asks. Only in routes, which run after the authentication."""
    found = exchange().principal
    assert found is not None, "this route is public"
    return found


def actor() -> Actor:
    """Who asks for a change, and from where. Only in routes, as `principal`."""
    this, by = exchange(), principal()
    return Actor(key_id=by.key_id, key_name=by.name, ip=this.client_ip, request_id=this.request_id)


def hold() -> None:
    """Say that the request is held open on purpose from here on (a stream, `?wait`).

    Its latency ends here, and it counts as held instead of in work; idempotent.
    Errors: SERVICE_UNAVAILABLE when too many are held.
    """
    held = exchange()
    held.slot.hold()
    if held.latency_s is None:
        held.latency_s = trio.current_time() - held.started_at_s


def request_id_of(offered: str | None, new_request_id: Callable[[], str]) -> str:
    """The client's id where it is sane, else a fresh one."""
    if offered is not None and _REQUEST_ID.fullmatch(offered):
        return offered
    return new_request_id()


def offered_trace(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """The place in a trace that the client tells, or None where it tells none, or several.

    Source: W3C Trace Context, sections 3.2 and 3.3.1.4 (one list over all `tracestate` headers).
    """
    parents, states = [], []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value.decode("latin-1"))
        elif name == b"tracestate":
            states.append(value.decode("latin-1"))
    return parse_trace(parents[0], ",".join(states)) if len(parents) == 1 else None


def log_fields(started: Exchange) -> Mapping[str, str]:
    """What every log line of the request carries."""
    trace = started.span.context
    if trace is None:
        return {"request_id": started.request_id}
    return {"request_id": started.request_id, "trace_id": trace.trace_id}
