"""The metrics of rdev, by the names and labels of the monitoring guide.

Owns a registry of its own. Bounds: every label has a closed set of values, or (projects) the first
ones that come, the rest under `other`.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache

import trio
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily

from rdev import __version__
from rdev.domain.breaker import BreakerReason, BreakerState
from rdev.domain.ids import ProjectId
from rdev.ports.telemetry import AuthFailure

# A histogram has a series per bucket, so it names fewer projects.
_COUNTED_PROJECTS = 50
_TIMED_PROJECTS = 20
_OTHER = "other"

# Seconds. 2 is the threshold of the guide's latency alert and must be a bucket.
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30)
# From a quick shell line to the longest command (86 400 s).
_COMMAND_BUCKETS_S = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 1800, 3600, 14_400, 86_400)

_RATE_LIMIT = "rate_limit"


class PrometheusTelemetry:
    """Telemetry as Prometheus metrics. Every verb is a few dictionary look-ups."""

    def __init__(self) -> None:
        """Register everything, so that each family is there from the first scrape on."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._http = _HttpMetrics(registry)
        self._commands = _CommandMetrics(registry)
        self._streams = _StreamMetrics(registry)
        self._refusals = _RefusalMetrics(registry)
        self._housekeeping = Counter(
            "rdev_housekeeping_total",
            "Things that the housekeeper put away",
            ("duty",),
            registry=registry,
        )
        self._breakers = Counter(
            "rdev_breaker_changes_total",
            "Changes of state of circuit breakers, and why",
            ("breaker", "state", "reason"),
            registry=registry,
        )
        self._counted = _Projects(_COUNTED_PROJECTS)
        self._timed = _Projects(_TIMED_PROJECTS)
        self._watched: list[_Statistics] = []
        build = Gauge("rdev_build_info", "Version", ("version", "python"), registry=registry)
        build.labels(__version__, platform.python_version()).set(1)

    def watch(self, part: str, statistics: Callable[[], object]) -> None:
        """Show a part's `statistics()` (a dataclass of numbers) as gauges `rdev_<part>_<field>`.

        They are read at each scrape, before its thread begins.
        """
        watched = _Statistics(part, statistics)
        self._watched.append(watched)
        self.registry.register(watched)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics as OpenMetrics or Prometheus text, and the content type.

        Blocks: in a thread, for some milliseconds per thousand series. Cancellation: the thread
        finishes alone and its text is dropped.
        """
        for watched in self._watched:
            watched.take()
        encode, content_type = choose_encoder(accept)
        body = await trio.to_thread.run_sync(encode, self.registry, abandon_on_cancel=True)
        return body, content_type

    def request_started(self, method: str, path: str) -> None:
        """See the port."""
        self._http.in_flight.labels(method, path).inc()

    def request_finished(self, method: str, path: str, status: int, latency_s: float) -> None:
        """See the port."""
        self._http.in_flight.labels(method, path).dec()
        self._http.total.labels(method, path, status).inc()
        self._http.duration.labels(method, path, status).observe(latency_s)

    def command_started(self, project: ProjectId, kind: str) -> None:
        """See the port."""
        self._commands.active(self._counted.label(project), kind).inc()

    def command_finished(
        self, project: ProjectId, kind: str, status: str, duration_s: float | None
    ) -> None:
        """See the port."""
        label = self._counted.label(project)
        self._commands.total(label, kind, status).inc()
        if duration_s is not None:
            self._commands.active(label, kind).dec()
            timed = self._timed.label(project)
            self._commands.duration(timed, kind, status).observe(duration_s)

    @contextmanager
    def stream(self, project: ProjectId) -> Iterator[None]:
        """See the port."""
        label = self._counted.label(project)
        self._streams.total.labels(label).inc()
        active = self._streams.active.labels(label)
        active.inc()
        try:
            yield
        finally:
            active.dec()

    def events_sent(self, project: ProjectId, event_type: str, count: int) -> None:
        """See the port."""
        self._streams.events.labels(self._counted.label(project), event_type).inc(count)

    def authenticated(self, failure: AuthFailure | None) -> None:
        """See the port."""
        self._refusals.auth_checks.inc()
        if failure is not None:
            self._refusals.auth_failures.labels(failure).inc()

    def limit_checked(self, limit: str, *, refused: bool) -> None:
        """See the port."""
        if limit == _RATE_LIMIT:
            self._refusals.rate_checks.inc()
        if refused:
            self._refusals.limits.labels(limit).inc()
            if limit == _RATE_LIMIT:
                self._refusals.rate_rejected.inc()

    def kept_house(self, duty: str, count: int) -> None:
        """See the port."""
        self._housekeeping.labels(duty).inc(count)

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        """See the port."""
        self._breakers.labels(breaker, state, reason).inc()


class _Statistics:
    """What a part of the server counts itself."""

    def __init__(self, part: str, statistics: Callable[[], object]) -> None:
        self._part = part
        self._statistics = statistics
        self._taken: object | None = None

    def take(self) -> None:
        """Read the statistics; in trio's thread, where they belong."""
        self._taken = self._statistics()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge for each field as it was taken; none before the first scrape."""
        now = self._taken
        for field in fields(now) if is_dataclass(now) else ():
            name = f"rdev_{self._part}_{field.name}"
            text = f"{field.name.replace('_', ' ')} of the {self._part}, since the start or now"
            yield GaugeMetricFamily(name, text, value=float(getattr(now, field.name)))


class _Projects:
    """Which projects have a label of their own: the first ones that came."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._named: set[str] = set()

    def label(self, project: ProjectId) -> str:
        """The project's label; the same for as long as the process lives."""
        if project in self._named:
            return project
        if len(self._named) < self._capacity:
            self._named.add(project)
            return project
        return _OTHER


class _HttpMetrics:
    """What the HTTP edge tells; `path` is the template of the route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "path", "status")
        self.total = Counter(
            "http_requests_total", "HTTP requests answered", labels, registry=registry
        )
        self.duration = Histogram(
            "http_request_duration_seconds",
            "Time to the head of the answer, without holding on purpose",
            labels,
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "http_requests_in_flight",
            "HTTP requests not yet answered",
            ("method", "path"),
            registry=registry,
        )


class _CommandMetrics:
    """What the queue tells. Told for every command, so the series are looked up only once; their
    number is bounded, as the labels are."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("project", "type", "status")
        total = Counter(
            "rdev_commands_total", "Commands that reached an end", labels, registry=registry
        )
        active = Gauge(
            "rdev_commands_active", "Commands running now", ("project", "type"), registry=registry
        )
        duration = Histogram(
            "rdev_command_duration_seconds",
            "Run time of commands",
            labels,
            buckets=_COMMAND_BUCKETS_S,
            registry=registry,
        )
        self.total = cache(total.labels)
        self.active = cache(active.labels)
        self.duration = cache(duration.labels)


class _StreamMetrics:
    """What the event streams tell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.total = Counter(
            "rdev_sse_connections_total", "Event streams opened", ("project",), registry=registry
        )
        self.active = Gauge(
            "rdev_sse_connections_active", "Event streams open", ("project",), registry=registry
        )
        self.events = Counter(
            "rdev_sse_events_sent_total",
            "Events written to streams",
            ("project", "event_type"),
            registry=registry,
        )


class _RefusalMetrics:
    """Who and what was turned away. The values of `reason` are there from the start, at zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.auth_checks = Counter(
            "rdev_auth_requests_total", "Credentials checked", registry=registry
        )
        self.auth_failures = Counter(
            "rdev_auth_failures_total", "Credentials refused", ("reason",), registry=registry
        )
        for reason in AuthFailure:
            self.auth_failures.labels(reason)
        self.rate_checks = Counter(
            "rdev_ratelimit_requests_total", "Rate limit checks", registry=registry
        )
        self.rate_rejected = Counter(
            "rdev_ratelimit_rejected_total", "Requests over their rate", registry=registry
        )
        self.limits = Counter(
            "rdev_limit_reached_total", "Refusals by a limit", ("limit",), registry=registry
        )
