"""The shell around all routes: what happens to every request, whatever it asks for.

In order: request id and trace (taken or made), the limit of requests in work, the body limit, then
Quart or a plain route: authentication, the route table, further hooks, the route itself. Every way
out is a response with the request id, one log line and one count. Routes raise `RdevError`; it
becomes a problem here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from http import HTTPStatus

import trio
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    HTTPScope,
    Scope,
)
from quart import Blueprint, Response, wrappers
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from rdev.adapters.http import probes
from rdev.adapters.http.access import ACCESS, Access, Route, check_declared
from rdev.adapters.http.address import LOCAL_PEER, client_address
from rdev.adapters.http.credentials import Credentials
from rdev.adapters.http.denials import denial_of
from rdev.adapters.http.exchange import (
    OTHER_METHOD,
    UNKNOWN_ROUTE,
    Exchange,
    begin,
    exchange,
    log_fields,
    offered_trace,
    request_id_of,
)
from rdev.adapters.http.gate import Gate, Hook, credential_of, template_of
from rdev.adapters.http.guards import BodyLimit, refuse
from rdev.adapters.http.limits import Admission
from rdev.adapters.http.plain import Asked, PlainRoute, answer
from rdev.adapters.http.problems import Problem, internal_error, of_http, problem
from rdev.adapters.http.rate_limits import RateLimits
from rdev.domain.addresses import Network
from rdev.domain.audit import Denial
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.authentication import Authenticate, CheckTicket, ProjectOf
from rdev.ports.telemetry import Telemetry, log_context
from rdev.ports.tracing import Passed, Span, Tracing, Untraced, current_trace
from rdev.services.limiter import network_of

_log = logging.getLogger("rdev.http")
# For the one line per request alone, with the monitoring guide's fields and a level of its own.
_requests_log = logging.getLogger("rdev.http.requests")

# Routes that ask for no credential.
PUBLIC_PATHS = probes.PATHS | {"/openapi.json", "/docs"}

# What HTTP answers by itself; they tell no more than the route table does.
_METHODS_OF_HTTP = frozenset({"HEAD", "OPTIONS"})


class _UnknownError(Exception):
    """In its place before Quart 0.23: never raised."""


_ClientLeft: type[Exception] = getattr(wrappers, "ClientDisconnectedError", _UnknownError)

# nginx's number for a client that went away before its answer; never sent, only counted.
_CLIENT_LEFT = 499


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What the shell refuses. Sizes in bytes, times in seconds."""

    max_in_flight: int = 512
    max_held: int = 10_000
    body_bytes: int = 1 << 20
    # How long a route waits for the body, and how long a response that is no stream may take.
    body_timeout_s: int = 30
    response_timeout_s: int = 60


def build_app(
    *,
    routes: Sequence[Blueprint],
    authenticate: Authenticate,
    project_of: ProjectOf,
    telemetry: Telemetry,
    now: Callable[[], datetime],
    new_request_id: Callable[[], str],
    plain: Sequence[PlainRoute] = (),
    access: Mapping[Route, Access] = ACCESS,
    hooks: Sequence[Hook] = (),
    trusted_proxies: Sequence[Network] = (),
    public_paths: frozenset[str] = PUBLIC_PATHS,
    limits: HttpLimits | None = None,
    rate_limits: RateLimits | None = None,
    check_ticket: CheckTicket | None = None,
    denied: Callable[[Denial], None] = lambda _: None,
    tracing: Tracing | None = None,
) -> "Shell":
    """The ASGI app of the server.

    `public_paths` are templates of routes that need no credential; all others do, and what `access`
    says of them. Without `check_ticket` only keys are credentials. `plain` routes are served
    without Quart. `denied` is told, and never waits, of everybody who was refused for who they are.
    Errors: UndeclaredRouteError for a route that is neither public nor in `access`.
    """
    limits = limits or HttpLimits()
    quart = _quart(limits)
    for blueprint in routes:
        quart.register_blueprint(blueprint)
    declared = [*_routes_of(quart), *(("GET", route.template) for route in plain)]
    check_declared(declared, access, public_paths)
    refusals = _Refusals(telemetry, denied)
    gate = Gate(
        credentials=Credentials(
            authenticate=authenticate,
            check_ticket=check_ticket,
            trusted_proxies=trusted_proxies,
        ),
        project_of=project_of,
        access=access,
        telemetry=telemetry,
        public_paths=public_paths,
        hooks=hooks,
        rate_limits=rate_limits,
    )
    quart.before_request(gate.enter)
    quart.register_error_handler(RdevError, refusals.answer)
    quart.register_error_handler(HTTPException, _on_http_exception)
    quart.register_error_handler(Exception, _on_fault)
    return Shell(
        app=_Routes(quart, plain, gate, refusals),
        telemetry=telemetry,
        now=now,
        new_request_id=new_request_id,
        trusted_proxies=trusted_proxies,
        limits=limits,
        rate_limits=rate_limits,
        tracing=tracing or Untraced(),
    )


class Shell:
    """The ASGI app: opens an exchange per request, and closes it whatever happens inside."""

    def __init__(
        self,
        *,
        app: ASGIFramework,
        telemetry: Telemetry,
        now: Callable[[], datetime],
        new_request_id: Callable[[], str],
        trusted_proxies: Sequence[Network],
        limits: HttpLimits,
        rate_limits: RateLimits | None,
        tracing: Tracing,
    ) -> None:
        """Wraps the routes; opens nothing."""
        self.admission = Admission(
            max_in_flight=limits.max_in_flight, max_held=limits.max_held, telemetry=telemetry
        )
        self._app = app
        self._guarded = BodyLimit(app, limit_bytes=limits.body_bytes, telemetry=telemetry)
        self._telemetry = telemetry
        self._now = now
        self._new_request_id = new_request_id
        self._trusted_proxies = trusted_proxies
        self._rate_limits = rate_limits
        self._tracing = tracing

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """Serve one request. WebSockets are refused; rdev has none."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000, "reason": None})
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def unreadable(self, status: int, sentence: str) -> Problem:
        """The answer to what is no request that can be read, with a line in the log and counted as
        any other."""
        request_id = self._new_request_id()
        _log.info("request refused", extra={"request_id": request_id, "status": status})
        self._telemetry.request_started(OTHER_METHOD, UNKNOWN_ROUTE)
        self._telemetry.request_finished(OTHER_METHOD, UNKNOWN_ROUTE, status, 0.0)
        told = problem(
            RdevError(ErrorCode.BAD_REQUEST, sentence),
            request_id=request_id,
            instance="/",
            now=self._now(),
            status=status,
        )
        return replace(told, headers=(*told.headers, ("X-Request-Id", request_id)))

    async def _serve(
        self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """One HTTP request from its first hook to its log line."""
        this = self._open(scope)
        answer = _Answer(this, send, self._telemetry)
        try:
            error = self._refusal(this)
            if error is None:
                error = await self._enter(scope, receive, answer)
            if error is not None and this.status is None:
                await refuse(answer, error)
            # Quart returns without an answer when the client left.
            this.status = this.status or _CLIENT_LEFT
        finally:
            this.status = this.status or HTTPStatus.INTERNAL_SERVER_ERROR
            this.slot.release()
            for leave in this.at_end:
                leave()
            _count(this, self._telemetry)
            _log_request(this)

    async def _enter(
        self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> RdevError | None:
        """Let the routes answer. Returns what Quart refuses outside of its own error handling: 0.22
        raises for a broken `Host` before it has a request to handle. 0.23 raises where an answer is
        ready just as its client leaves."""
        found: RdevError | None = None
        try:
            await self._guarded(scope, receive, send)
        except* HTTPException:
            found = of_http(HTTPStatus.BAD_REQUEST, "the request has no usable host")
        except* _ClientLeft:
            _log.debug("the client left before its answer")
        return found

    def _open(self, scope: HTTPScope) -> Exchange:
        """The exchange for a request, made the current one."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        peer = scope["client"][0] if scope["client"] else None
        client = client_address(peer, scope["headers"], self._trusted_proxies)
        client_ip = client or peer or LOCAL_PEER
        this = Exchange(
            request_id=request_id_of(headers.get(b"x-request-id"), self._new_request_id),
            span=self._span(scope, client_ip),
            client_ip=client_ip,
            has_doubtful_client=client is None,
            method=scope["method"],
            path=scope["path"],
            started_at_s=trio.current_time(),
            slot=self.admission.slot(network_of(client or peer or LOCAL_PEER)),
            scope=scope,
            now=self._now,
            credential=credential_of(headers),
        )
        begin(this)
        current_trace.set(this.span.context)
        log_context.set(log_fields(this))
        return this

    def _span(self, scope: HTTPScope, client_ip: str) -> Span:
        """The request in its trace. Nobody wants to follow the probes."""
        offered = offered_trace(scope["headers"])
        if scope["path"] in probes.PATHS:
            return Passed(offered)
        method, scheme, path = scope["method"], scope["scheme"], scope["path"]
        return self._tracing.request(method, scheme, path, client_ip, offered)

    def _refusal(self, this: Exchange) -> RdevError | None:
        """Why the request may not come in, or None. The probes always may."""
        if this.path in probes.PATHS:
            return None
        if not this.path.startswith("/") and "://" not in this.path:
            # Quart fails on a target without path ("?a=b") outside of its error handling.
            return of_http(HTTPStatus.BAD_REQUEST, "the request target has no path")
        if this.has_doubtful_client:
            message = "Forwarded and X-Forwarded-For do not tell one client"
            return of_http(HTTPStatus.BAD_REQUEST, message)
        try:
            if self._rate_limits is not None:
                self._rate_limits.enter(this)
            this.slot.enter()
        except RdevError as error:
            return error
        return None


class _Routes:
    """Gives a request to its plain route, or to Quart."""

    def __init__(
        self, quart: QuartTrio, plain: Sequence[PlainRoute], gate: "Gate", refusals: "_Refusals"
    ) -> None:
        self._quart = quart
        self._plain = plain
        self._gate = gate
        self._refusals = refusals

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        if scope["type"] == "http":
            for route in self._plain:
                fields = route.fields(scope["path"])
                if fields is not None:
                    asked = Asked(scope=scope, receive=receive, send=send, fields=fields)
                    enter = partial(self._gate.admit, fields=fields)
                    await answer(route, asked, enter=enter, refused=self._refusals.count)
                    return
        await self._quart(scope, receive, send)


class _Answer:
    """`send` of one exchange: adds the headers every answer has, and takes down its status."""

    def __init__(self, this: Exchange, send: ASGISendCallable, telemetry: Telemetry) -> None:
        self._this = this
        self._send = send
        self._telemetry = telemetry

    async def __call__(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            this = self._this
            this.status = message["status"]
            own = [(b"x-request-id", this.request_id.encode()), *this.headers]
            message["headers"] = [*message["headers"], *own]
            _count(this, self._telemetry)
        await self._send(message)


def _quart(limits: HttpLimits) -> QuartTrio:
    """Quart with the settings that the guards rely on."""
    quart = QuartTrio("rdev", static_folder=None)
    # The body limit stands before Quart, which would buffer before it looks (see BodyLimit).
    quart.config["MAX_CONTENT_LENGTH"] = None
    quart.config["BODY_TIMEOUT"] = limits.body_timeout_s
    quart.config["RESPONSE_TIMEOUT"] = limits.response_timeout_s
    quart.config["PROPAGATE_EXCEPTIONS"] = False
    return quart


class _Refusals:
    """Answers a refusal that a route or a hook decided on; limits that were passed are counted,
    denials are told."""

    def __init__(self, telemetry: Telemetry, denied: Callable[[Denial], None]) -> None:
        self._telemetry = telemetry
        self._denied = denied

    async def answer(self, error: RdevError) -> Response:
        self.count(error)
        return _problem_response(error)

    def count(self, error: RdevError) -> None:
        for limit in {fault.limit for fault in error.faults if fault.limit is not None}:
            self._telemetry.limit_checked(limit, refused=True)
        denial = denial_of(error)
        if denial is not None:
            self._denied(denial)


async def _on_http_exception(error: HTTPException) -> Response:
    """What Quart itself refuses: no route, wrong method, a body that stalled."""
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    response = _problem_response(of_http(status, _sentence(error, status)), status=status)
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


async def _on_fault(error: Exception) -> Response:
    """A fault of ours: the trace goes to the log, the client gets a number to ask for."""
    _log.error("request failed", exc_info=error)
    return _problem_response(internal_error())


def _problem_response(error: RdevError, *, status: int | None = None) -> Response:
    """The problem document of the running exchange as a Quart response."""
    this = exchange()
    told = problem(
        error, request_id=this.request_id, instance=this.path, now=this.now(), status=status
    )
    return Response(told.body, status=told.status, headers=dict(told.headers))


def _sentence(error: HTTPException, status: int) -> str:
    """Why HTTP refused, for the client."""
    match status:
        case HTTPStatus.NOT_FOUND:
            return "there is nothing under this path"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return f"this path does not take {exchange().method_label}"
        case HTTPStatus.REQUEST_TIMEOUT:
            return "the body did not arrive in time"
        case _:
            return error.name.lower()


def _count(this: Exchange, telemetry: Telemetry) -> None:
    """Tell of the request once: at its head, or at its end when it got none."""
    if this.is_finished:
        return
    this.is_finished = True
    if not this.is_counted:
        telemetry.request_started(this.method_label, this.route)
    if this.latency_s is None:
        this.latency_s = trio.current_time() - this.started_at_s
    assert this.status is not None
    telemetry.request_finished(this.method_label, this.route, this.status, this.latency_s)
    # With the head: what is held on purpose would be open for hours.
    this.span.tell(route=this.route, status_code=this.status, request_id=this.request_id)
    this.span.end(str(this.status) if this.status >= HTTPStatus.INTERNAL_SERVER_ERROR else None)


def _log_request(this: Exchange) -> None:
    """The one line per request, without the query, which may hold a token."""
    level = logging.INFO
    if this.path in probes.PATHS:
        level = logging.DEBUG
    elif this.status is not None and this.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        level = logging.WARNING
    if _requests_log.isEnabledFor(level):
        facts = {
            "method": this.method,
            "path": this.path,
            "status": this.status,
            "duration_ms": round((trio.current_time() - this.started_at_s) * 1000),
            "client_ip": this.client_ip,
        }
        _requests_log.log(level, "request completed", extra=facts)


def _routes_of(quart: QuartTrio) -> Iterator[Route]:
    """Every route as the route table names it."""
    for rule in quart.url_map.iter_rules():
        for method in (rule.methods or set()) - _METHODS_OF_HTTP:
            yield method, template_of(rule.rule)
