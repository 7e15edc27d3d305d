"""The names and labels of the monitoring guide, and what bounds them."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from rdev.adapters.http.access import ACCESS
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.domain.breaker import BreakerReason, BreakerState
from rdev.domain.commands import Kind, Priority, Status
from rdev.domain.depths import Depth, Depths, ProjectDepth
from rdev.domain.sse import EventName
from rdev.domain.traces import TraceContext
from rdev.ports.telemetry import AuthFailure, Silence
from rdev.ports.tracing import within

TRACE = TraceContext(trace_id="4bf92f3577b34da6a3ce929d0e0e4736", span_id="ab" * 8, is_sampled=True)

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
    told.command_claimed("shell", 0.5)
    told.command_started("p", "shell")
    told.command_finished("p", "shell", Status.SUCCEEDED, 2.0)
    told.command_left("p", "shell")
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
        telemetry.command_finished(f"p{n}", "shell", Status.SUCCEEDED, 1.0)
        telemetry.command_left(f"p{n}", "shell")
    found = await samples(telemetry)

    def projects(name: str) -> set[str]:
        return {s.labels["project"] for s in found if s.name == name}

    assert len(projects("rdev_commands_total")) == 51
    assert len(projects("rdev_command_duration_seconds_count")) == 21
    assert await value(telemetry, "rdev_commands_active", project="other", type="shell") == 0


def test_silence_has_every_verb_of_the_ports():
    verbs = {name for name in vars(PrometheusTelemetry) if not name.startswith("_")}
    verbs -= {"read", "render", "watch", "watch_each", "watch_breakers"}

    assert verbs == {name for name in vars(Silence) if not name.startswith("_")}
    assert len(verbs) == 17 + 2 + 1 + 1


async def test_a_breakers_changes_are_counted_with_their_reason() -> None:
    telemetry = PrometheusTelemetry()
    for _ in range(2):
        telemetry.breaker_changed("database", BreakerState.OPEN, BreakerReason.FAILURES)

    name, labels = "rdev_breaker_changes_total", {"breaker": "database", "state": "open"}
    assert await value(telemetry, name, **labels, reason="failures") == 2


async def test_breakers_are_counted_by_state_and_reason_at_the_scrape(autojump_clock) -> None:
    telemetry = PrometheusTelemetry()
    now = {(BreakerState.OPEN, BreakerReason.SLOW): 3, (BreakerState.CLOSED, "nothing"): 0}
    telemetry.watch_breakers("exec", lambda: now)
    telemetry.watch_breakers("database", lambda: {(BreakerState.CLOSED, "nothing"): 1})

    open_ = {"breaker": "exec", "state": "open", "reason": "slow"}
    assert await value(telemetry, "rdev_breakers", **open_) == 3
    found = [sample for sample in await samples(telemetry) if sample.name == "rdev_breakers"]
    assert len(found) == 3

    now[BreakerState.OPEN, BreakerReason.SLOW] = 0
    await trio.sleep(1)
    assert await value(telemetry, "rdev_breakers", **open_) == 0, "gone is told, not left out"


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


async def test_parts_of_one_kind_share_their_names_and_are_told_apart_by_a_label() -> None:
    telemetry = PrometheusTelemetry()
    each = {name: lambda n=n: Counted(taken=n, is_open=False) for n, name in enumerate("ab")}
    telemetry.watch_each("pool", each)

    assert await value(telemetry, "rdev_pool_taken", pool="a") == 0
    assert await value(telemetry, "rdev_pool_taken", pool="b") == 1


async def test_the_queue_is_shown_as_it_was_counted_and_not_at_all_when_it_could_not_be(
    autojump_clock,
) -> None:
    telemetry = PrometheusTelemetry()
    waiting = {Priority.LOW: Depth(queued=3, oldest_wait_s=7.5)}
    telemetry.queue_counted(Depths(projects={"p": ProjectDepth(waiting=waiting)}))

    assert await value(telemetry, "rdev_queue_depth", priority="low") == 3
    assert await value(telemetry, "rdev_queue_depth", priority="high") == 0
    assert await value(telemetry, "rdev_queue_oldest_wait_seconds", priority="low") == 7.5

    telemetry.queue_counted(None)
    await trio.sleep(1)
    assert math.isnan(await value(telemetry, "rdev_queue_depth", priority="low"))


async def test_it_is_rendered_once_a_second_however_many_ask_and_in_whatever_words(
    autojump_clock,
) -> None:
    telemetry = PrometheusTelemetry()
    taken = []

    def statistics() -> Counted:
        taken.append(trio.current_time())
        return Counted(taken=len(taken), is_open=True)

    telemetry.watch("queue", statistics)
    async with trio.open_nursery() as nursery:
        for n in range(20):
            nursery.start_soon(telemetry.render, f"application/openmetrics-text; version=1.0.{n}")
            nursery.start_soon(telemetry.render, "text/plain; version=nonsense")
    assert len(taken) == 1

    await trio.sleep(1)
    body, _ = await telemetry.render("")
    assert b"rdev_queue_taken 2.0" in body


async def test_a_scrape_that_is_given_up_does_not_spoil_the_next() -> None:
    telemetry = PrometheusTelemetry()
    with trio.CancelScope() as scope:
        scope.cancel()
        await telemetry.render("")

    assert b"http_requests" in (await telemetry.render(""))[0]


async def test_open_metrics_carry_the_trace_of_a_request_as_an_exemplar() -> None:
    telemetry = PrometheusTelemetry()
    telemetry.request_started("GET", "/x")
    with within(replace(TRACE, trace_id="ff" * 16, is_sampled=False)):
        telemetry.request_finished("GET", "/x", 200, 1.5)
    with within(TRACE):
        telemetry.request_finished("GET", "/x", 200, 1.5)
        telemetry.command_claimed("shell", 0.25)
        telemetry.command_finished("p", "shell", Status.SUCCEEDED, 3.5)
        telemetry.webhook_attempted("accepted", 0.75)

    body, _ = await telemetry.render("application/openmetrics-text; version=1.0.0")
    plain, _ = await telemetry.render("text/plain")

    for value in (b"1.5", b"0.25", b"3.5", b"0.75"):
        assert b'# {trace_id="4bf92f3577b34da6a3ce929d0e0e4736"} ' + value in body
    assert b"ffff" not in body, "nobody recorded that one"
    assert b"4bf92f" not in plain


async def test_a_probe_is_told_by_its_path_however_many_series_there_are() -> None:
    """`RdevAPINotReady` asks for it by its path, and the rate of errors leaves it out by that."""
    telemetry = PrometheusTelemetry()
    for n in range(1_000):
        telemetry.request_started("GET", f"/{n}")
        telemetry.request_finished("GET", f"/{n}", 200, 0.1)
    for method, path, status in (
        ("GET", "/ready", 503),
        ("HEAD", "/ready", 503),
        ("GET", "/x", 503),
    ):
        telemetry.request_started(method, path)
        telemetry.request_finished(method, path, status, 0.1)
    found = [s for s in await samples(telemetry) if s.name == "http_requests_total"]
    late = {(s.labels["method"], s.labels["path"]) for s in found if s.labels["status"] == "503"}
    assert late == {("GET", "/ready"), ("HEAD", "/ready"), ("OTHER", "other")}


async def test_ten_thousand_requests_and_projects_make_fewer_than_ten_thousand_series() -> None:
    """Each label takes every value it can, in every combination: more than clients can do."""
    telemetry = PrometheusTelemetry()
    draw = random.Random(0)
    routes = [*ACCESS, *(("GET", path) for path in ("/health", "/ready", "/metrics", "unknown"))]
    ends = [status for status in Status if status.is_terminal]
    for n in range(10_000):
        method, path = draw.choice(routes)
        telemetry.request_started(method, path)
        status = draw.choice([200, 201, 202, 204, 400, 401, 403, 404, 405, 409, 410, 413, 415])
        telemetry.request_finished(method, path, draw.choice([status, 422, 429, 500, 503]), 0.1)
        project = f"p{n}"
        for kind in Kind:
            telemetry.command_claimed(kind, 1.0)
            telemetry.command_started(project, kind)
            for end in ends if n < 60 else ends[:1]:
                telemetry.command_finished(project, kind, end, 1.0)
        with telemetry.stream(project):
            for event_type in EventName:
                telemetry.events_sent(project, event_type, 1)
            telemetry.events_replayed(project, 1)
            telemetry.slow_reader_cut(project)

    found = await samples(telemetry)
    paths = {s.labels["path"] for s in found if s.name == "http_requests_total"}

    assert 5_000 < len(found) < 10_000
    assert "other" in paths
    assert sum(s.value for s in found if s.name == "http_requests_total") == 10_000
    assert sum(s.value for s in found if s.name == "http_requests_in_flight") == 0
