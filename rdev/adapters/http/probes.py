"""`/health`, `/ready`, `/metrics`: bodies as the monitoring guide shows them, without envelope.

All three are outside of every limit and need no credential, so each bounds itself: health touches
nothing, the checks of readiness run at most once a second and at most 1 s, metrics are rendered in
at most one thread at a time.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus

import msgspec
import trio
from quart import Blueprint, Response, request

from rdev.domain.errors import RdevError

PATHS = frozenset({"/health", "/ready", "/metrics"})

_CHECK_TIMEOUT_S = 1.0
# Any number of probes cost the database one check a second.
_FRESH_S = 1.0

# Returns when the thing works. Errors: RdevError, whose message the report repeats.
Check = Callable[[], Awaitable[None]]

# Renders the metrics for an `Accept` header: the body and its content type.
RenderMetrics = Callable[[str], Awaitable[tuple[bytes, str]]]


class Status(StrEnum):
    """What a probe says, in the words of the guide."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What one check found; `message` only where it is not healthy."""

    status: Status
    latency_ms: int
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The body of `/ready`."""

    status: Status
    checks: Mapping[str, CheckResult]

    def body(self) -> bytes:
        """The bytes, without the messages nobody wrote."""
        checks = {name: _without_none(result) for name, result in self.checks.items()}
        return msgspec.json.encode({"status": self.status, "checks": checks})


class Readiness:
    """Whether traffic should come here: every check healthy, and nobody said `drain`."""

    def __init__(self, *, checks: Mapping[str, Check]) -> None:
        """Knows the checks by the name they have in the report; runs none yet."""
        self._checks = checks
        self._is_draining = False
        self._turn = trio.Lock()
        self._last: dict[str, CheckResult] = {}
        self._checked_at_s: float | None = None

    def drain(self) -> None:
        """Say `draining` from now on. Synchronous, idempotent, not taken back."""
        self._is_draining = True

    async def report(self) -> Report:
        """The present state, at most 1 s old.

        Cancellation: the next caller checks again. Blocks: 1 s for the checks, which run together;
        callers that come meanwhile wait for the same result.
        """
        async with self._turn:
            if not self._is_fresh():
                self._last = await self._run_checks()
                self._checked_at_s = trio.current_time()
        results = dict(self._last)
        if self._is_draining:
            return Report(status=Status.DRAINING, checks=results)
        unhealthy = any(result.status is not Status.HEALTHY for result in results.values())
        return Report(status=Status.UNHEALTHY if unhealthy else Status.HEALTHY, checks=results)

    def _is_fresh(self) -> bool:
        """Whether the last results may be told again."""
        checked_at_s = self._checked_at_s
        return checked_at_s is not None and trio.current_time() - checked_at_s < _FRESH_S

    async def _run_checks(self) -> dict[str, CheckResult]:
        """All checks at once, in the order of their names in the mapping."""
        found: dict[str, CheckResult] = {}

        async def run(name: str, check: Check) -> None:
            found[name] = await _run_check(check)

        async with trio.open_nursery() as nursery:
            for name, check in self._checks.items():
                nursery.start_soon(run, name, check)
        return {name: found[name] for name in self._checks}


async def _run_check(check: Check) -> CheckResult:
    """One check within its time."""
    began_s = trio.current_time()
    message: str | None = f"no answer within {_CHECK_TIMEOUT_S:g} s"
    with trio.move_on_after(_CHECK_TIMEOUT_S):
        message = await _complaint(check)
    return CheckResult(
        status=Status.HEALTHY if message is None else Status.UNHEALTHY,
        latency_ms=round((trio.current_time() - began_s) * 1000),
        message=message,
    )


async def _complaint(check: Check) -> str | None:
    """What the check complains about, or None."""
    try:
        await check()
    except RdevError as error:
        return error.message
    return None


def _without_none(result: CheckResult) -> dict[str, object]:
    """A check's entry in the body."""
    entry: dict[str, object] = {"status": result.status, "latency_ms": result.latency_ms}
    if result.message is not None:
        entry["message"] = result.message
    return entry


def probe_routes(*, readiness: Readiness, render_metrics: RenderMetrics) -> Blueprint:
    """The routes of the three probes."""
    routes = Blueprint("probes", __name__)
    rendering = trio.Lock()

    @routes.get("/health")
    async def health() -> Response:
        return _json(msgspec.json.encode({"status": Status.HEALTHY}), HTTPStatus.OK)

    @routes.get("/ready")
    async def ready() -> Response:
        report = await readiness.report()
        is_healthy = report.status is Status.HEALTHY
        status = HTTPStatus.OK if is_healthy else HTTPStatus.SERVICE_UNAVAILABLE
        return _json(report.body(), status)

    @routes.get("/metrics")
    async def metrics() -> Response:
        async with rendering:
            body, content_type = await render_metrics(request.headers.get("Accept", ""))
        return Response(body, content_type=content_type)

    return routes


def _json(body: bytes, status: HTTPStatus) -> Response:
    """A bare JSON answer that no cache keeps."""
    headers = {"Cache-Control": "no-store"}
    return Response(body, status=status, headers=headers, content_type="application/json")
