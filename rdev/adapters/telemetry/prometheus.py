"""The metrics of rdev: every verb of the telemetry ports as Prometheus metrics, and their text.

Owns a registry of its own. Bounds: every label has a closed set of values, or (projects) the first
ones that come, the rest under `other`; rendered in one thread, each format at most once a second.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TypeAlias

import trio
from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily

from rdev import __version__
from rdev.adapters.telemetry.families import (
    OTHER,
    CommandMetrics,
    DepthMetrics,
    HttpMetrics,
    RefusalMetrics,
    StreamMetrics,
    UpkeepMetrics,
    WebhookMetrics,
)
from rdev.domain.breaker import BreakerReason, BreakerState
from rdev.domain.commands import Priority, Status
from rdev.domain.depths import Depths
from rdev.domain.ids import ProjectId
from rdev.ports.telemetry import AuthFailure
from rdev.ports.tracing import current_trace

# A histogram has a series per bucket, so it names fewer projects.
_COUNTED_PROJECTS = 50
_TIMED_PROJECTS = 20

# Any number of scrapes cost one rendering a second.
_FRESH_S = 1.0

_RATE_LIMIT = "rate_limit"

_OPEN_METRICS = "application/openmetrics-text"

_UNKNOWN = (float("nan"), float("nan"))

# Breakers by their state and its reason.
_Tally: TypeAlias = Mapping[tuple[BreakerState, BreakerReason], int]


class PrometheusTelemetry:
    """Telemetry as Prometheus metrics. Every verb is a few dictionary look-ups."""

    def __init__(self) -> None:
        """Register everything, so that each family is there from the first scrape on."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._http = HttpMetrics(registry)
        self._commands = CommandMetrics(registry)
        self._depths = DepthMetrics(registry)
        self._streams = StreamMetrics(registry)
        self._refusals = RefusalMetrics(registry)
        self._webhooks = WebhookMetrics(registry)
        self._upkeep = UpkeepMetrics(registry)
        self._counted = _Projects(_COUNTED_PROJECTS)
        self._timed = _Projects(_TIMED_PROJECTS)
        self._breakers = _Breakers()
        self._watched: list[_Statistics | _Breakers] = [self._breakers]
        registry.register(self._breakers)
        self._turn = trio.Lock()
        # By content type; and when the first of them was rendered.
        self._texts: dict[str, bytes] = {}
        self._rendered_at_s = float("-inf")
        build = Gauge("rdev_build_info", "Version", ("version", "python"), registry=registry)
        build.labels(__version__, platform.python_version()).set(1)

    def watch(self, part: str, statistics: Callable[[], object]) -> None:
        """Show a part's `statistics()` (a dataclass of numbers) as gauges `rdev_<part>_<field>`.

        They are read at each scrape, before its thread begins.
        """
        self._show(_Statistics(part, {"": statistics}))

    def watch_each(self, part: str, each: Mapping[str, Callable[[], object]]) -> None:
        """As `watch`, of several parts of one kind: the label `<part>` names each."""
        self._show(_Statistics(part, each))

    def watch_breakers(self, breaker: str, tally: Callable[[], _Tally]) -> None:
        """Show how many breakers of one kind are in each state, and why, as `rdev_breakers`.

        Read as of `watch`. `breaker` comes from a closed set.
        """
        self._breakers.tallies[breaker] = tally

    async def read(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        """All metrics as `encode` writes them; it is called in a thread. Blocks and cancellation as
        of `render`."""
        async with self._turn:
            for watched in self._watched:
                watched.take()
            return await trio.to_thread.run_sync(encode, self.registry, abandon_on_cancel=True)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics as OpenMetrics or Prometheus text, at most 1 s old, and the content type.

        Blocks: in a thread, for some milliseconds per thousand series; who comes meanwhile waits.
        Cancellation: the thread finishes alone and its text is dropped.
        """
        # What choose_encoder reads besides would be the client's: a version that is none, or new
        # each time.
        encode, content_type = choose_encoder(_OPEN_METRICS if _OPEN_METRICS in accept else "")
        async with self._turn:
            if trio.current_time() - self._rendered_at_s >= _FRESH_S:
                self._texts.clear()
                self._rendered_at_s = trio.current_time()
                for watched in self._watched:
                    watched.take()
            body = self._texts.get(content_type)
            if body is None:
                body = await trio.to_thread.run_sync(encode, self.registry, abandon_on_cancel=True)
                self._texts[content_type] = body
        return body, content_type

    def request_started(self, method: str, path: str) -> None:
        """See the port."""
        self._http.in_flight(method, path).inc()

    def request_finished(self, method: str, path: str, status: int, latency_s: float) -> None:
        """See the port."""
        self._http.in_flight(method, path).dec()
        labels = self._http.labels(method, path, status)
        self._http.total(*labels).inc()
        self._http.duration(*labels).observe(latency_s, _exemplar())

    def command_claimed(self, kind: str, wait_s: float) -> None:
        """See the port."""
        self._commands.wait(kind).observe(wait_s, _exemplar())

    def command_started(self, project: ProjectId, kind: str) -> None:
        """See the port."""
        self._commands.active(self._counted.label(project), kind).inc()

    def command_left(self, project: ProjectId, kind: str) -> None:
        """See the port."""
        self._commands.active(self._counted.label(project), kind).dec()

    def command_finished(
        self, project: ProjectId, kind: str, status: Status, duration_s: float
    ) -> None:
        """See the port."""
        self._commands.total(self._counted.label(project), kind, status).inc()
        duration = self._commands.duration(self._timed.label(project), kind, status)
        duration.observe(duration_s, _exemplar())

    def kill_unconfirmed(self, kind: str) -> None:
        """See the port."""
        self._commands.unconfirmed.labels(kind).inc()

    def queue_counted(self, depths: Depths | None) -> None:
        """See the port."""
        for priority in Priority:
            found = None if depths is None else depths.of_priority(priority)
            depth, oldest_s = (found.queued, found.oldest_wait_s) if found else _UNKNOWN
            self._depths.depth.labels(priority).set(depth)
            self._depths.oldest.labels(priority).set(oldest_s)

    def loop_was_late(self, late_s: float) -> None:
        """See the port."""
        self._upkeep.loop_lag.observe(late_s)

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

    def events_replayed(self, project: ProjectId, count: int) -> None:
        """See the port."""
        self._streams.replayed.labels(self._counted.label(project)).inc(count)

    def slow_reader_cut(self, project: ProjectId) -> None:
        """See the port."""
        self._streams.slow.labels(self._counted.label(project)).inc()

    def stream_written(self, lag_s: float) -> None:
        """See the port."""
        self._streams.lag.observe(lag_s)

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

    def rate_decided(self, policy: str, *, refused: bool) -> None:
        """See the port."""
        self._refusals.decisions.labels(policy, "refused" if refused else "admitted").inc()

    def webhook_attempted(self, outcome: str, latency_s: float) -> None:
        """See the port."""
        self._webhooks.attempts.labels(outcome).inc()
        self._webhooks.duration.observe(latency_s, _exemplar())

    def webhook_dead(self, reason: str, count: int = 1) -> None:
        """See the port."""
        self._webhooks.dead.labels(reason).inc(count)

    def kept_house(self, duty: str, count: int) -> None:
        """See the port."""
        self._upkeep.housekeeping.labels(duty).inc(count)

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        """See the port."""
        self._upkeep.breakers.labels(breaker, state, reason).inc()

    def _show(self, watched: "_Statistics") -> None:
        self._watched.append(watched)
        self.registry.register(watched)


def _exemplar() -> dict[str, str] | None:
    """The trace that this task works for, where somebody records it."""
    trace = current_trace.get()
    return {"trace_id": trace.trace_id} if trace is not None and trace.is_sampled else None


class _Statistics:
    """What one part of the server, or several of a kind, count themselves."""

    def __init__(self, part: str, each: Mapping[str, Callable[[], object]]) -> None:
        self._part = part
        self._each = each
        self._taken: dict[str, object] = {}

    def take(self) -> None:
        """Read the statistics; in trio's thread, where they belong."""
        self._taken = {name: statistics() for name, statistics in self._each.items()}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge for each field as it was taken; none before the first scrape."""
        taken = self._taken
        for now in list(taken.values())[:1]:
            for field in fields(now) if is_dataclass(now) else ():
                name = f"rdev_{self._part}_{field.name}"
                text = f"{field.name.replace('_', ' ')} of the {self._part}, since the start or now"
                family = GaugeMetricFamily(
                    name, text, labels=[self._part] if "" not in taken else []
                )
                for one, found in taken.items():
                    family.add_metric([one] if one else [], float(getattr(found, field.name)))
                yield family


class _Breakers:
    """How many breakers of each kind are in which state: a series for each, none per project."""

    def __init__(self) -> None:
        self.tallies: dict[str, Callable[[], _Tally]] = {}
        self._taken: dict[str, _Tally] = {}

    def take(self) -> None:
        """Count them; in trio's thread, where they belong."""
        self._taken = {breaker: tally() for breaker, tally in self.tallies.items()}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As they were taken."""
        text = "Circuit breakers in each state, and why"
        family = GaugeMetricFamily("rdev_breakers", text, labels=("breaker", "state", "reason"))
        for breaker, tally in self._taken.items():
            for (state, reason), count in tally.items():
                family.add_metric((breaker, state, reason), count)
        yield family


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
        return OTHER
