"""Writes the dashboards beside it (dashboards/*.json), by `make dashboards`.

A dashboard is a list of panels here; a panel is the question that an operator asks, and the
expressions that answer it. tests/deploy/test_monitoring.py fails when the files are not these, when
an expression cannot be parsed, or when it names a metric that no server exports.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("dashboards")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, WIDTH, HEIGHT = 24, 8, 8
SCHEMA = 39

REQUESTS = 'job="rdev-api",path!~"/health|/ready|/metrics"'


@dataclass(frozen=True, slots=True)
class Panel:
    """`answers`: what each line is called, and its expression. `unit` is Grafana's name."""

    question: str
    answers: Mapping[str, str]
    unit: str = "short"
    type: str = "timeseries"


def _rate(metric: str, by: str = "", labels: str = 'job="rdev-api"') -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{labels}}}[5m]))"


def _counted(metric: str, by: str, labels: str = "") -> str:
    """Since the start: of what is rare, the first one is no rate, as it was not seen at zero."""
    return f'sum by ({by}) ({metric}{{job="rdev-api"{labels}}})'


def _quantiles(metric: str, by: str = "le", labels: str = 'job="rdev-api"') -> dict[str, str]:
    inner = f"sum by ({by}) (rate({metric}_bucket{{{labels}}}[5m]))"
    rest = "".join(f" {{{{{label}}}}}" for label in by.split(", ") if label != "le")
    return {f"p{100 * q:g}{rest}": f"histogram_quantile({q:g}, {inner})" for q in (0.5, 0.95, 0.99)}


def _now(metric: str, by: str = "instance") -> str:
    return f'max by ({by}) ({metric}{{job="rdev-api"}})'


def _grows(metric: str, by: str = "instance") -> str:
    return f'sum by ({by}) (rate({metric}{{job="rdev-api"}}[5m]))'


DASHBOARDS: dict[str, tuple[str, list[Panel]]] = {
    "overview": (
        "rdev API Overview",
        [
            Panel("How many servers answer?", {"up": 'sum(up{job="rdev-api"})'}, type="stat"),
            Panel(
                "What is wrong right now?",
                {
                    "{{alertname}}": "count by (alertname) "
                    '(ALERTS{alertname=~"RdevAPI.*",alertstate="firing"})'
                },
                type="stat",
            ),
            Panel(
                "Which version runs?",
                {"{{version}}": 'count by (version) (rdev_build_info{job="rdev-api"})'},
                type="stat",
            ),
            Panel(
                "Request rate: what is asked, and how often?",
                {"{{method}} {{path}}": _rate("http_requests_total", "method, path", REQUESTS)},
                "reqps",
            ),
            Panel(
                "Latency P99: how long do clients wait?",
                _quantiles("http_request_duration_seconds", labels=REQUESTS),
                "s",
            ),
            Panel(
                "Error rate: what share fails?",
                {
                    "5xx errors": _rate("http_requests_total", labels=REQUESTS + ',status=~"5.."')
                    + " / "
                    + _rate("http_requests_total", labels=REQUESTS),
                },
                "percentunit",
            ),
            Panel(
                "Active commands: how many run, and where?",
                {"{{project}}": 'sum by (project) (rdev_commands_active{job="rdev-api"})'},
                type="gauge",
            ),
            Panel(
                "How do commands end?",
                {"{{type}} {{status}}": _rate("rdev_commands_total", "type, status")},
                "cps",
            ),
            Panel(
                "Who is refused, and why?",
                {
                    "limit {{limit}}": _rate("rdev_limit_reached_total", "limit"),
                    "credentials {{reason}}": _rate("rdev_auth_failures_total", "reason"),
                },
                "reqps",
            ),
            Panel(
                "Is the core used up?",
                {"{{instance}}": _grows("process_cpu_seconds_total")},
                "percentunit",
            ),
            Panel(
                "How much memory is in use?",
                {"{{instance}}": _now("process_resident_memory_bytes")},
                "bytes",
            ),
            Panel(
                "How many requests are in hand?",
                {"{{path}}": 'sum by (path) (http_requests_in_flight{job="rdev-api"})'},
            ),
        ],
    ),
    "queue": (
        "rdev Queue",
        [
            Panel(
                "How many commands wait?", {"{{priority}}": _now("rdev_queue_depth", "priority")}
            ),
            Panel(
                "How long has the oldest waited?",
                {"{{priority}}": _now("rdev_queue_oldest_wait_seconds", "priority")},
                "s",
            ),
            Panel("How long do commands wait?", _quantiles("rdev_command_wait_seconds"), "s"),
            Panel(
                "How long do commands run?",
                _quantiles("rdev_command_duration_seconds", "le, type"),
                "s",
            ),
            Panel("How many run on each server?", {"{{instance}}": _now("rdev_queue_running")}),
            Panel(
                "How fast is the queue worked off?",
                {
                    "claimed {{instance}}": _grows("rdev_queue_claimed"),
                    "finished {{instance}}": _grows("rdev_queue_finished"),
                },
                "cps",
            ),
            Panel(
                "Which commands were lost?",
                {"{{project}}": _counted("rdev_commands_total", "project", ',status="lost"')},
            ),
            Panel(
                "Were commands taken over, or leases lost?",
                {
                    "taken over {{instance}}": _grows("rdev_queue_taken_over"),
                    "stale {{instance}}": _grows("rdev_queue_stale"),
                },
                "cps",
            ),
            Panel(
                "Did kills leave processes?",
                {"{{type}}": _counted("rdev_cancels_unconfirmed_total", "type")},
            ),
            Panel(
                "Which projects cannot be reached?",
                {"{{instance}}": _now("rdev_exec_breaker_refused")},
            ),
            Panel(
                "Is output stored as fast as it comes?",
                {"waiting {{instance}}": _now("rdev_appender_pending_bytes")},
                "bytes",
            ),
        ],
    ),
    "streams": (
        "rdev Streams",
        [
            Panel(
                "How many streams are open?",
                {"{{project}}": 'sum by (project) (rdev_sse_connections_active{job="rdev-api"})'},
            ),
            Panel(
                "How often are streams opened?",
                {"{{project}}": _rate("rdev_sse_connections_total", "project")},
                "cps",
            ),
            Panel(
                "How much is sent?",
                {"{{event_type}}": _rate("rdev_sse_events_sent_total", "event_type")},
                "cps",
            ),
            Panel("How late are streams?", _quantiles("rdev_sse_lag_seconds"), "s"),
            Panel(
                "How much is read again from the database?",
                {"{{project}}": _rate("rdev_sse_events_replayed_total", "project")},
                "cps",
            ),
            Panel(
                "Which clients do not keep up?",
                {
                    "cut {{project}}": _rate("rdev_sse_slow_readers_total", "project"),
                    "fell back {{instance}}": _grows("rdev_stream_fell_back"),
                },
                "cps",
            ),
            Panel(
                "Does a transaction hold feeds back?",
                {"{{instance}}": _now("rdev_feed_held_back_s")},
                "s",
            ),
            Panel(
                "Do notifications arrive?",
                {
                    "LISTEN {{instance}}": _now("rdev_listener_connected"),
                    "lost {{instance}}": _grows("rdev_notifier_lost"),
                },
            ),
        ],
    ),
    "webhooks": (
        "rdev Webhooks",
        [
            Panel(
                "For how long has the oldest message been owed?",
                {"oldest": 'max(rdev_webhooks_oldest_undelivered_s{job="rdev-api"})'},
                "s",
            ),
            Panel(
                "What comes of attempts?",
                {"{{outcome}}": _rate("rdev_webhook_attempts_total", "outcome")},
                "cps",
            ),
            Panel(
                "How long does an attempt take?",
                _quantiles("rdev_webhook_attempt_duration_seconds"),
                "s",
            ),
            Panel(
                "What was given up, and why?",
                {"{{reason}}": _counted("rdev_webhook_dead_total", "reason")},
            ),
            Panel(
                "Which share of the endpoints fails?",
                {
                    "left alone": 'max(rdev_webhooks_breakers_open{job="rdev-api"})',
                    "enabled": 'max(rdev_webhooks_endpoints{job="rdev-api"})',
                },
            ),
            Panel(
                "Are the attempts' places used up?",
                {
                    "in flight {{instance}}": _now("rdev_webhooks_in_flight"),
                    "to those that fail {{instance}}": _now("rdev_webhooks_untrusted"),
                },
            ),
            Panel(
                "Is work done twice?",
                {
                    "interrupted {{instance}}": _grows("rdev_webhooks_interrupted"),
                    "stale {{instance}}": _grows("rdev_webhooks_stale"),
                },
                "cps",
            ),
            Panel(
                "Are connections used again?",
                {
                    "dialled {{instance}}": _grows("rdev_webhook_sender_dialled"),
                    "reused {{instance}}": _grows("rdev_webhook_sender_reused"),
                },
                "cps",
            ),
        ],
    ),
    "database": (
        "rdev Database",
        [
            Panel(
                "Is the database there?",
                {"{{instance}}": 'min by (instance) (rdev_listener_connected{job="rdev-api"})'},
                type="stat",
            ),
            Panel(
                "Is the breaker open (2)?",
                {"{{instance}}": _now("rdev_database_breaker_state")},
                type="stat",
            ),
            Panel(
                "Does work wait for connections?",
                {"{{pool}}": 'sum by (pool) (rdev_pool_waiting{job="rdev-api"})'},
            ),
            Panel(
                "Does work get no connection in time?",
                {"{{pool}}": _grows("rdev_pool_timeouts", "pool")},
                "cps",
            ),
            Panel(
                "How many connections are busy?",
                {
                    "{{pool}}": 'sum by (pool) (rdev_pool_size{job="rdev-api"})'
                    ' - sum by (pool) (rdev_pool_idle{job="rdev-api"})'
                },
            ),
            Panel(
                "Has PostgreSQL connections left?",
                {
                    "in use": 'max(rdev_database_connections{job="rdev-api"})',
                    "allowed": 'max(rdev_database_connections_max{job="rdev-api"})',
                },
            ),
            Panel(
                "Does an old transaction keep it from cleaning up?",
                {"age": 'max(rdev_database_oldest_transaction_s{job="rdev-api"})'},
                "s",
            ),
            Panel(
                "How many transactions is its horizon behind?",
                {"xmin age": 'max(rdev_database_xmin_age{job="rdev-api"})'},
            ),
            Panel(
                "How large is it?",
                {"size": 'max(rdev_database_size_bytes{job="rdev-api"})'},
                "bytes",
            ),
            Panel(
                "Is what is old put away?",
                {"{{duty}}": _rate("rdev_housekeeping_total", "duty")},
                "cps",
            ),
            Panel(
                "Is the audit log sealed?", {"lag": 'max(rdev_audit_lag_s{job="rdev-api"})'}, "s"
            ),
            Panel(
                "Do the caches spare it questions?",
                {
                    "keys {{instance}}": _grows("rdev_keys_loads"),
                    "projects {{instance}}": _grows("rdev_projects_loads"),
                },
                "cps",
            ),
        ],
    ),
}


def dashboard(name: str) -> str:
    """The JSON of one dashboard."""
    title, panels = DASHBOARDS[name]
    datasource = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    found = {
        "uid": f"rdev-{name}",
        "title": title,
        "tags": ["rdev"],
        "schemaVersion": SCHEMA,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [datasource]},
        "panels": [_panel(place, panel) for place, panel in enumerate(panels)],
    }
    return json.dumps(found, indent=1) + "\n"


def _panel(place: int, panel: Panel) -> dict[str, object]:
    across = COLUMNS // WIDTH
    return {
        "id": place + 1,
        "title": panel.question,
        "type": panel.type,
        "datasource": DATASOURCE,
        "gridPos": {
            "x": place % across * WIDTH, "y": place // across * HEIGHT, "w": WIDTH, "h": HEIGHT
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": "ABC"[n], "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
            for n, (legend, expr) in enumerate(panel.answers.items())
        ],
    }  # fmt: skip


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(dashboard(name))
