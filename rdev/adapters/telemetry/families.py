"""The families of metrics: names, labels, buckets. What they mean is in docs/operations/metrics.md.

The names and labels of the first thirteen are the monitoring guide's. Bounds: `ROUTES_MAX`, and
labels whose values are a closed set in the code. With all of them at their bounds there are fewer
than 10,000 series.

Buckets. A histogram has a series for each, so each has a purpose:
requests: from what a remembered key costs (5 ms) to the time a response may take (60 s); 2 s is the
threshold of the guide's latency alert and must be a bucket. Commands: few, as their labels are
many; a line of shell, a build, an agent's task, the longest allowed (a day). Waiting in the queue:
from the time of a claim (10 ms) to the ageing of priorities (minutes) and beyond. Lag of streams:
from one turn of the event loop (1 ms) to the poll that finds what a lost notification did not tell
(1.1 s). Attempts of webhooks: to the time one may take (15 s, at most 600 s).
"""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from rdev.domain.commands import Priority
from rdev.ports.telemetry import AuthFailure

# So many combinations of method, path and status have series of their own, the first that come;
ROUTES_MAX = 200
# and these, whenever they come: alerts ask for them, or leave them out, by their path.
_PROBES = frozenset(
    (method, path, status)
    for method in ("GET", "HEAD")
    for path, status in (("/health", 200), ("/ready", 200), ("/ready", 503), ("/metrics", 200))
)
OTHER = "other"
_OTHER_METHOD = "OTHER"

_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 60)
_COMMAND_BUCKETS_S = (0.1, 1, 10, 60, 300, 1800, 7200, 86_400)
_WAIT_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200)
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.1, 5)
_LOOP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1, 5)
_ATTEMPT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 600)

# When each series was made doubles the number of counters and is asked for by no query of ours.
disable_created_metrics()  # type: ignore[no-untyped-call]


class HttpMetrics:
    """What the HTTP edge tells; `path` is the template of the route. Told for every request, so the
    series are looked up only once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "path", "status")
        total = Counter("http_requests_total", "HTTP requests answered", labels, registry=registry)
        duration = Histogram(
            "http_request_duration_seconds",
            "Time to the head of the answer, without holding on purpose",
            labels,
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        in_flight = Gauge(
            "http_requests_in_flight",
            "HTTP requests not yet answered",
            ("method", "path"),
            registry=registry,
        )
        self.total = cache(total.labels)
        self.duration = cache(duration.labels)
        self.in_flight = cache(in_flight.labels)
        self._known: set[tuple[str, str, int]] = set()

    def labels(self, method: str, path: str, status: int) -> tuple[str, str, int]:
        """These labels, or those of the rest, where the rest begins; the status is always true."""
        found = (method, path, status)
        if found in self._known or found in _PROBES:
            return found
        if len(self._known) < ROUTES_MAX:
            self._known.add(found)
            return found
        return (_OTHER_METHOD, OTHER, status)


class CommandMetrics:
    """What the queue tells. Told for every command, so the series are looked up only once; their
    number is bounded, as the labels are."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("project", "type", "status")
        total = Counter(
            "rdev_commands_total", "Commands that ran to an end", labels, registry=registry
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
        wait = Histogram(
            "rdev_command_wait_seconds",
            "Time from acceptance to the claim",
            ("type",),
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
        self.unconfirmed = Counter(
            "rdev_cancels_unconfirmed_total",
            "Commands whose kill left processes",
            ("type",),
            registry=registry,
        )
        self.total = cache(total.labels)
        self.active = cache(active.labels)
        self.duration = cache(duration.labels)
        self.wait = cache(wait.labels)


class DepthMetrics:
    """The queue as it was counted last; no number where it could not be counted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("priority",)
        self.depth = Gauge("rdev_queue_depth", "Commands queued", labels, registry=registry)
        self.oldest = Gauge(
            "rdev_queue_oldest_wait_seconds",
            "How long the oldest queued command has waited",
            labels,
            registry=registry,
        )
        for priority in Priority:
            self.depth.labels(priority).set(float("nan"))
            self.oldest.labels(priority).set(float("nan"))


class StreamMetrics:
    """What the event streams tell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("project",)
        self.total = Counter(
            "rdev_sse_connections_total", "Event streams opened", labels, registry=registry
        )
        self.active = Gauge(
            "rdev_sse_connections_active", "Event streams open", labels, registry=registry
        )
        self.events = Counter(
            "rdev_sse_events_sent_total",
            "Events written to streams",
            ("project", "event_type"),
            registry=registry,
        )
        self.replayed = Counter(
            "rdev_sse_events_replayed_total",
            "Events that a stream took from the database",
            labels,
            registry=registry,
        )
        self.slow = Counter(
            "rdev_sse_slow_readers_total",
            "Streams cut because their client took nothing",
            labels,
            registry=registry,
        )
        self.lag = Histogram(
            "rdev_sse_lag_seconds",
            "From when this server has news of a command until it is written to all who wait",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )


class RefusalMetrics:
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
        self.decisions = Counter(
            "rdev_limiter_decisions_total",
            "What each policy of the rate limits decided",
            ("policy", "decision"),
            registry=registry,
        )
        self.limits = Counter(
            "rdev_limit_reached_total", "Refusals by a limit", ("limit",), registry=registry
        )


class WebhookMetrics:
    """What the dispatcher tells."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.attempts = Counter(
            "rdev_webhook_attempts_total",
            "Attempts to deliver, by what came of them",
            ("outcome",),
            registry=registry,
        )
        self.duration = Histogram(
            "rdev_webhook_attempt_duration_seconds",
            "Time of one attempt",
            buckets=_ATTEMPT_BUCKETS_S,
            registry=registry,
        )
        self.dead = Counter(
            "rdev_webhook_dead_total",
            "Deliveries given up",
            ("reason",),
            registry=registry,
        )


class UpkeepMetrics:
    """What the housekeeper, the breakers and the event loop tell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.housekeeping = Counter(
            "rdev_housekeeping_total",
            "Things that the housekeeper put away",
            ("duty",),
            registry=registry,
        )
        self.loop_lag = Histogram(
            "rdev_event_loop_lag_seconds",
            "How late the event loop came to what was due, four times a second",
            buckets=_LOOP_BUCKETS_S,
            registry=registry,
        )
        self.breakers = Counter(
            "rdev_breaker_changes_total",
            "Changes of state of circuit breakers, and why",
            ("breaker", "state", "reason"),
            registry=registry,
        )
