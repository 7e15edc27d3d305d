"""Which spans there are, how they hang together, and which are recorded at all."""

from collections.abc import Callable
from dataclasses import replace
from uuid import UUID

import pytest
import trio
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from rdev.adapters.telemetry import tracing as subject
from rdev.adapters.telemetry.otlp import Outbox
from rdev.adapters.telemetry.tracing import ASKED_MAX_PER_S, OtelTracing
from rdev.domain.commands import Claimed, Kind, Lease, Retry
from rdev.domain.deliveries import DeliveryLease, Owed
from rdev.domain.execution import Offsets, Spec
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.traces import TraceContext
from rdev.domain.webhook_targets import parse_target
from rdev.domain.webhooks import WebhookId
from rdev.ports.tracing import Step, Untraced, within
from tests.fakes.otlp import Seen, spans_of

COMMAND: CommandId = command_id(UUID(int=7))
HERE = TraceContext(trace_id="ab" * 16, span_id="cd" * 8, is_sampled=True, state="vendor=1")
NOT_HERE = replace(HERE, is_sampled=False)


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def make(outbox: Outbox) -> Callable[..., OtelTracing]:
    def make(sample: float = 1.0, **more: object) -> OtelTracing:
        resource = {"service.name": "rdev", "service.instance.id": "one"}
        return OtelTracing(outbox=outbox, resource=resource, sample=sample, **more)  # type: ignore[arg-type]

    return make


def told(outbox: Outbox) -> list[Seen]:
    return spans_of(encode_spans(outbox.take()))


def claimed(**more: object) -> Claimed:
    facts: dict[str, object] = {
        "lease": Lease(command=COMMAND, id=41),
        "project": ProjectId("demo"),
        "kind": Kind.GIT,
        "spec": Spec(argv=("git",), timeout_s=60, env={"SECRET": "canary"}, stdin=b"canary"),
        "retry": Retry.NEVER,
        "attempt": 1,
        "running_s": 0.0,
        "take_over": False,
        "instance": None,
        "offsets": Offsets(),
        "last_seq": 1,
        "attempt_seq": 1,
        "dropped_bytes": 0,
        "queue_wait_ms": 1_500,
        "cancel_requested": False,
        "trace": HERE,
        **more,
    }
    return Claimed(**facts)  # type: ignore[arg-type]


def owed(**more: object) -> Owed:
    facts: dict[str, object] = {
        "lease": DeliveryLease(delivery=UUID(int=1), id=1),
        "webhook": WebhookId("whk_1"),
        "event": "evt_1",
        "attempt": 1,
        "failures": 0,
        "is_ordered": False,
        "is_trusted": True,
        "is_allowed": True,
        "url": "https://hooks.example.com/canary?canary=1",
        "payload": b"canary",
        "secrets": (b"canary",),
        "trace": HERE,
        **more,
    }
    return Owed(**facts)  # type: ignore[arg-type]


async def test_a_request_begins_a_trace_that_its_log_line_can_name(make, outbox) -> None:
    span = make().request("GET", "http", "/x/7", "10.0.0.1", None)
    span.tell(route="/x/{n}", status_code=200)
    span.end()

    (seen,) = told(outbox)
    assert span.context is not None
    assert (seen.trace_id, seen.span_id) == (span.context.trace_id, span.context.span_id)
    assert (seen.name, seen.kind, seen.parent_id, seen.is_error) == (
        "GET /x/{n}",
        "server",
        "",
        False,
    )
    assert seen.facts == {
        "http.request.method": "GET",
        "url.scheme": "http",
        "url.path": "/x/7",
        "client.address": "10.0.0.1",
        "http.route": "/x/{n}",
        "http.response.status_code": 200,
    }


async def test_a_method_that_clients_make_up_is_no_name(make, outbox) -> None:
    span = make().request("BREW", "http", "/x", "10.0.0.1", None)
    span.tell(route="unknown", status_code=501)
    span.end("501")

    (seen,) = told(outbox)
    assert (seen.name, seen.is_error) == ("HTTP unknown", True)
    assert seen.facts["http.request.method"] == "_OTHER"
    assert seen.facts["error.type"] == "501"


async def test_a_key_in_a_path_is_no_fact(make, outbox) -> None:
    key = "rdev_sk_abcdefgh_" + "x" * 43
    make().request("GET", "http", f"/commands/{key}/events", "10.0.0.1", None).end()

    (seen,) = told(outbox)
    assert seen.facts["url.path"] == "/commands/[redacted]/events"


async def test_a_request_goes_on_with_the_trace_of_its_client(make, outbox) -> None:
    span = make(sample=0).request("GET", "http", "/x", "10.0.0.1", HERE)
    span.end()

    (seen,) = told(outbox)
    assert (seen.trace_id, seen.parent_id, seen.state) == ("ab" * 16, "cd" * 8, "vendor=1")
    assert span.context is not None
    assert span.context.state == "vendor=1"


async def test_what_its_client_does_not_record_is_not_recorded_here(make, outbox) -> None:
    tracing = make()
    span = tracing.request("GET", "http", "/x", "10.0.0.1", NOT_HERE)
    span.end()
    with within(NOT_HERE):
        tracing.submission(ProjectId("demo"), Kind.GIT).end()
    tracing.attempt(claimed(trace=NOT_HERE), claim_s=0.1).step(Step.ATTACH).end()
    tracing.delivery(owed(trace=NOT_HERE), parse_target("https://h.example/")).end()

    assert told(outbox) == []
    assert span.context == NOT_HERE


async def test_a_part_of_the_traces_that_begin_here_is_recorded(make, outbox) -> None:
    tracing = make(sample=0.1)
    for _ in range(3_000):
        span = tracing.request("GET", "http", "/x", "10.0.0.1", None)
        assert span.context is not None
        span.end()
    found = told(outbox)
    while more := told(outbox):
        found += more

    assert 200 < len(found) < 400


async def test_a_context_says_whether_its_trace_is_recorded(make) -> None:
    always = make(sample=1).request("GET", "http", "/x", "10.0.0.1", None)
    never = make(sample=0).request("GET", "http", "/x", "10.0.0.1", None)

    assert (always.context.is_sampled, never.context.is_sampled) == (True, False)
    assert never.context.trace_id != always.context.trace_id


async def test_clients_can_ask_for_so_many_recordings_a_second(
    make, outbox, autojump_clock
) -> None:
    tracing = make(sample=0)

    def ask() -> bool:
        span = tracing.request("GET", "http", "/x", "10.0.0.1", HERE)
        span.end()
        assert span.context.trace_id == HERE.trace_id
        return span.context.is_sampled

    assert sum(ask() for _ in range(500)) == ASKED_MAX_PER_S
    assert len(told(outbox)) == ASKED_MAX_PER_S
    await trio.sleep(1)
    assert ask()


async def test_an_attempt_tells_how_long_was_waited_and_claimed_at_once(make, outbox) -> None:
    now_ns = 10_000_000_000
    span = make(clock_ns=lambda: now_ns).attempt(claimed(), claim_s=0.25)

    waited, claim = told(outbox)
    assert (waited.name, waited.began_ns, waited.ended_ns) == ("queue wait", 8_500_000_000, now_ns)
    assert (claim.name, claim.began_ns, claim.ended_ns) == ("claim", 9_750_000_000, now_ns)
    assert (waited.parent_id, claim.parent_id) == (HERE.span_id, span.context.span_id)
    span.tell(status="failed", exit_code=3, reason=None)
    span.end("failed")
    (attempt,) = told(outbox)
    assert (attempt.name, attempt.kind, attempt.links) == ("process git", "consumer", {})
    assert attempt.facts["messaging.message.id"] == COMMAND
    assert attempt.facts["messaging.destination.name"] == "agent"
    assert (attempt.facts["process.exit.code"], attempt.facts["rdev.status"]) == (3, "failed")
    assert "rdev.reason" not in attempt.facts


async def test_who_takes_over_links_to_what_was_there_before(make, outbox) -> None:
    before = make().attempt(claimed(), claim_s=0)
    after = make().attempt(
        claimed(lease=Lease(command=COMMAND, id=77), take_over=True, taken_from=41), claim_s=0
    )
    after.end()

    seen = {span.name: span for span in told(outbox)}
    assert seen["process git"].links == {before.context.span_id: {"rdev.link": "take_over"}}
    assert seen["take over"].parent_id == after.context.span_id
    assert after.context.span_id != before.context.span_id


async def test_a_repetition_links_to_the_claim_before_it(make, outbox) -> None:
    tracing = make()
    tracing.attempt(claimed(), claim_s=0).end("set_aside")
    tracing.attempt(claimed(lease=Lease(command=COMMAND, id=99), attempt=2), claim_s=0).end()

    spans = told(outbox)
    first = next(span for span in spans if span.name == "claim")
    (second,) = [span for span in spans if span.links]
    assert second.links == {first.span_id: {"rdev.link": "retry"}}


async def test_what_is_open_ends_with_the_whole_and_only_once(make, outbox) -> None:
    span = make().attempt(claimed(), claim_s=0)
    told(outbox)
    attach, finish = span.step(Step.ATTACH), span.step(Step.FINISH)
    attach.end()
    span.end("lease_lost")
    span.end()
    finish.end()
    finish.tell(late=True)

    seen = told(outbox)
    assert [one.name for one in seen] == ["attach", "finish", "process git"]
    assert [one.is_error for one in seen] == [False, False, True]
    assert {one.parent_id for one in seen[:2]} == {span.context.span_id}


async def test_a_delivery_tells_its_host_and_no_secret(make, outbox) -> None:
    tracing = make()
    span = tracing.delivery(owed(attempt=3), parse_target(owed().url))
    span.tell(status_code=503, http_version="1.1")
    span.end("5xx")
    tracing.attempt(claimed(), claim_s=0).end()

    seen = told(outbox)
    assert seen[0].facts == {
        "http.request.method": "POST",
        "url.scheme": "https",
        "server.address": "hooks.example.com",
        "server.port": 443,
        "rdev.webhook": "whk_1",
        "rdev.event": "evt_1",
        "http.request.resend_count": 2,
        "http.response.status_code": 503,
        "network.protocol.version": "1.1",
        "error.type": "5xx",
    }
    assert "canary" not in str(seen)


async def test_a_command_without_a_trace_has_no_spans(make, outbox) -> None:
    tracing = make()

    assert tracing.attempt(claimed(trace=None), claim_s=0).context is None
    assert tracing.delivery(owed(trace=None), parse_target("https://h.example/")).context is None
    assert tracing.submission(ProjectId("demo"), Kind.GIT).context is None
    assert told(outbox) == []


async def test_untraced_hands_on_what_came() -> None:
    nobody = Untraced()

    assert nobody.request("GET", "http", "/", "10.0.0.1", HERE).context == HERE
    assert nobody.request("GET", "http", "/", "10.0.0.1", None).context is None
    assert nobody.attempt(claimed(), claim_s=0).step(Step.OUTPUT).context == HERE
    assert nobody.delivery(owed(), parse_target("https://h.example/")).context == HERE
    with within(HERE):
        assert nobody.submission(ProjectId("demo"), Kind.GIT).context == HERE


async def test_ids_are_never_zero(make, outbox) -> None:
    span = make(draw_bits=lambda _: 0).request("GET", "http", "/", "10.0.0.1", None)
    span.end()

    assert told(outbox)[0].span_id == "0" * 15 + "1"
    assert subject._hashed("") != 0
