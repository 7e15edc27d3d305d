"""The names and labels of the monitoring guide, and what bounds them."""

from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.domain.breaker import BreakerReason, BreakerState
from rdev.ports.telemetry import AuthFailure, Silence

# Every series of the guide: its name and its labels.
GUIDE = {
    "http_requests_total": {"method", "path", "status"},
    "http_request_duration_seconds_bucket": {"method", "path", "status", "le"},
    "http_requests_in_flight": {"method", "path"},
    "rdev_commands_total": {"project", "type", "status"},
    "rdev_commands_active": {"project", "type"},
    "rdev_command_duration_seconds_sum": {"project", "type", "status"},
    "rdev_command_duration_seconds_count": {"project", "type", "status"},
    "rdev_sse_connections_total": {"project"},
    "rdev_sse_connections_active": {"project"},
    "rdev_sse_events_sent_total": {"project", "event_type"},
    "rdev_auth_requests_total": set(),
    "rdev_auth_failures_total": {"reason"},
    "rdev_ratelimit_requests_total": set(),
    "rdev_ratelimit_rejected_total": set(),
    "rdev_limit_reached_total": {"limit"},
    "rdev_build_info": {"version", "python"},
    "process_open_fds": set(),
    "python_gc_collections_total": {"generation"},
}


async def samples(telemetry: PrometheusTelemetry) -> list:
    body, _ = await telemetry.render("text/plain")
    return [s for family in text_string_to_metric_families(body.decode()) for s in family.samples]


async def value(telemetry: PrometheusTelemetry, name: str, **labels: str) -> float | None:
    found = await samples(telemetry)
    return next((s.value for s in found if s.name == name and s.labels == labels), None)


@pytest.fixture
def telemetry() -> PrometheusTelemetry:
    told = PrometheusTelemetry()
    told.request_started("GET", "/x")
    told.request_finished("GET", "/x", 200, 1.5)
    told.command_started("p", "shell")
    told.command_finished("p", "shell", "succeeded", 2.0)
    told.command_finished("p", "shell", "expired", None)
    with told.stream("p"):
        told.events_sent("p", "output", 3)
    told.authenticated(None)
    told.authenticated(AuthFailure.IP_BLOCKED)
    told.limit_checked("rate_limit", refused=False)
    told.limit_checked("rate_limit", refused=True)
    told.limit_checked("body", refused=True)
    return told


async def test_every_series_of_the_guide_is_there_with_its_labels(telemetry):
    found = {s.name: set(s.labels) for s in await samples(telemetry)}

    assert {name: found.get(name) for name in GUIDE} == GUIDE


async def test_the_verbs_count_what_they_say(telemetry):
    assert await value(telemetry, "http_requests_in_flight", method="GET", path="/x") == 0
    assert await value(telemetry, "rdev_commands_active", project="p", type="shell") == 0
    assert await value(telemetry, "rdev_sse_connections_active", project="p") == 0
    assert await value(telemetry, "rdev_sse_connections_total", project="p") == 1
    sent = await value(telemetry, "rdev_sse_events_sent_total", project="p", event_type="output")
    assert sent == 3
    assert await value(telemetry, "rdev_auth_requests_total") == 2
    assert await value(telemetry, "rdev_auth_failures_total", reason="ip_blocked") == 1
    assert await value(telemetry, "rdev_auth_failures_total", reason="invalid") == 0
    assert await value(telemetry, "rdev_ratelimit_requests_total") == 2
    assert await value(telemetry, "rdev_ratelimit_rejected_total") == 1
    assert await value(telemetry, "rdev_limit_reached_total", limit="rate_limit") == 1
    assert await value(telemetry, "rdev_limit_reached_total", limit="body") == 1


async def test_a_stream_that_fails_is_no_longer_active(telemetry):
    with pytest.raises(ValueError, match="cut"), telemetry.stream("p"):
        raise ValueError("cut")

    assert await value(telemetry, "rdev_sse_connections_active", project="p") == 0


async def test_projects_beyond_the_bound_share_one_label():
    telemetry = PrometheusTelemetry()
    for n in range(200):
        telemetry.command_started(f"p{n}", "shell")
        telemetry.command_finished(f"p{n}", "shell", "succeeded", 1.0)
    found = await samples(telemetry)

    def projects(name: str) -> set[str]:
        return {s.labels["project"] for s in found if s.name == name}

    assert len(projects("rdev_commands_total")) == 51
    assert len(projects("rdev_command_duration_seconds_count")) == 21
    assert await value(telemetry, "rdev_commands_active", project="other", type="shell") == 0


def test_silence_has_every_verb_of_the_ports():
    verbs = {name for name in vars(PrometheusTelemetry) if not name.startswith("_")}
    verbs -= {"render", "watch"}

    assert verbs == {name for name in vars(Silence) if not name.startswith("_")}
    assert len(verbs) == 8 + 1 + 1


async def test_a_breakers_changes_are_counted_with_their_reason() -> None:
    telemetry = PrometheusTelemetry()
    for _ in range(2):
        telemetry.breaker_changed("database", BreakerState.OPEN, BreakerReason.FAILURES)

    name, labels = "rdev_breaker_changes_total", {"breaker": "database", "state": "open"}
    assert await value(telemetry, name, **labels, reason="failures") == 2


@dataclass(frozen=True, kw_only=True)
class Counted:
    taken: int
    is_open: bool


async def test_what_a_part_counts_itself_is_shown_as_it_is_now() -> None:
    telemetry = PrometheusTelemetry()
    now = [Counted(taken=1, is_open=False)]
    telemetry.watch("queue", lambda: now[-1])
    now.append(Counted(taken=7, is_open=True))
    body, _ = await telemetry.render("")
    assert b"rdev_queue_taken 7.0" in body
    assert b"rdev_queue_is_open 1.0" in body
