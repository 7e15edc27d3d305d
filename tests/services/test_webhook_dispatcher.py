"""The dispatcher on the fakes, under a clock that jumps: who waits for whom, and what is kept."""

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from uuid import UUID

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rdev.adapters.webhooks.ed25519 import parse_public
from rdev.domain.deliveries import DISABLE_AFTER_S, SCHEDULE_S, DeadReason
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.sending import Outcome, OutgoingRequest, SendFault
from rdev.domain.signing import Secret, SignatureScheme, parse_secret, verify
from rdev.domain.webhooks import LANE_CAP, DisabledReason, WebhookId
from rdev.ports.telemetry import Silence
from rdev.services.webhook_dispatcher import (
    BREAKER,
    OVERFLOW_EVERY_S,
    STOP_S,
    TICK_S,
    DispatcherLimits,
    WebhookDispatcher,
    came_to,
)
from tests.fakes.deliveries import FakeDeliveries, Row
from tests.fakes.webhooks import ClearBox
from tests.services.scripted import backoff

SECRET = Secret(key=bytes(range(32)))
TOTAL_S = 15.0
# After its last call a breaker is known for so long, at the most.
FORGOTTEN_S = BREAKER.half_open_s + 2 * BREAKER.open_most_s
GOOD, HOLE = "https://good{}.example/", "https://hole{}.example/"
Script = Callable[[OutgoingRequest], Awaitable[Outcome]]


def outcome(status: int | None, *, retry_after: str | None = None, took_s: float = 0.0) -> Outcome:
    return Outcome(
        status=status,
        fault=None if status else SendFault.TIMEOUT,
        detail="",
        latency_s=took_s,
        request_headers={},
        body=b"",
        truncated=False,
        http_version="1.1",
        retry_after=retry_after,
    )


async def respond(request: OutgoingRequest) -> Outcome:
    """A receiver takes 10 ms; a black hole takes all the time there is."""
    if "hole" in request.target.host:
        await trio.sleep(TOTAL_S)
        return outcome(None, took_s=TOTAL_S)
    await trio.sleep(0.01)
    return outcome(200, took_s=0.01)


class Told(Silence):
    """What was told of attempts and of dead deliveries."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, float]] = []
        self.dead: Counter[str] = Counter()

    def webhook_attempted(self, outcome: str, latency_s: float) -> None:
        self.attempts.append((outcome, latency_s))

    def webhook_dead(self, reason: str, count: int = 1) -> None:
        self.dead[reason] += count


@dataclass(slots=True, kw_only=True)
class Stage:
    """A dispatcher, what it sends, and when."""

    script: Script = respond
    limits: DispatcherLimits = field(default_factory=lambda: DispatcherLimits(in_flight_max=64))
    queue: FakeDeliveries = field(default_factory=FakeDeliveries)
    sent: list[tuple[float, OutgoingRequest]] = field(default_factory=list)
    under_way: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    told_replicas: int = 0
    told: Told = field(default_factory=Told)
    dispatcher: WebhookDispatcher = field(init=False)

    def __post_init__(self) -> None:
        self.dispatcher = self.another("one")

    def another(self, holder: str) -> WebhookDispatcher:
        def tell() -> None:
            self.told_replicas += 1

        return WebhookDispatcher(
            queue=self.queue,
            sender=self,
            box=ClearBox(),
            telemetry=self.told,
            backoff=backoff,
            now=lambda: datetime.fromtimestamp(1_700_000_000 + trio.current_time(), UTC),
            wake_replicas=tell,
            holder=holder,
            limits=self.limits,
        )

    async def send(self, request: OutgoingRequest) -> Outcome:
        host = request.target.host
        self.sent.append((trio.current_time(), request))
        self.under_way[host] += 1
        self.most[host] = max(self.most[host], self.under_way[host])
        try:
            return await self.script(request)
        finally:
            self.under_way[host] -= 1

    def endpoint(
        self, url: str = GOOD.format(0), *, is_ordered: bool = False, owner: UUID | None = None
    ) -> WebhookId:
        return self.queue.endpoint(url, secret=SECRET.key, is_ordered=is_ordered, owner=owner)

    def times(self, row: Row) -> list[float]:
        """When its attempts began."""
        return [at_s for at_s, request in self.sent if request.headers["webhook-id"] == row.event]

    async def until(
        self, condition: Callable[[], object], *, within_s: float = 1_000, step_s: float = 0.01
    ) -> None:
        with trio.fail_after(within_s):
            while not condition():
                await trio.sleep(step_s)


async def test_an_attempt_that_meets_a_defect_is_a_failure_and_ends_nothing_else(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """What a receiver says must never be able to end a server, again at each start."""

    async def poison(request: OutgoingRequest) -> Outcome:
        if "hole" in request.target.host:
            raise OverflowError("nobody thought of this answer")
        return outcome(200)

    stage = Stage(script=poison)
    await nursery.start(stage.dispatcher.run)
    (bad,) = stage.queue.owe(stage.endpoint(HOLE.format(0)))
    (good,) = stage.queue.owe(stage.endpoint())
    stage.dispatcher.wake()
    await stage.until(lambda: good.status == "delivered" and bad.failures == 1)
    assert bad.status == "pending"
    assert "nobody thought of this answer" in caplog.text


async def test_what_is_owed_is_sent_signed_and_settled(nursery: trio.Nursery) -> None:
    stage = Stage()
    await nursery.start(stage.dispatcher.run)
    (row,) = stage.queue.owe(stage.endpoint(), payload=b'{"type":"ping"}')
    stage.dispatcher.wake()
    await stage.until(lambda: row.status == "delivered")
    ((_, request),) = stage.sent
    assert verify(
        request.headers, request.body, [SECRET], now_s=1_700_000_000 + trio.current_time()
    ) == (row.event)
    assert stage.dispatcher.statistics().delivered == 1
    assert stage.told.attempts == [("accepted", 0.01)]


async def test_a_wake_up_is_answered_at_once_and_a_lost_one_within_a_tick(
    nursery: trio.Nursery,
) -> None:
    stage = Stage()
    await nursery.start(stage.dispatcher.run)
    webhook = stage.endpoint()
    await trio.sleep(10.5)
    (row,) = stage.queue.owe(webhook)
    began_s = trio.current_time()
    stage.dispatcher.wake()
    await stage.until(lambda: row.status == "delivered")
    assert stage.times(row)[0] - began_s <= 0.01
    await trio.sleep(10.5)
    (row,) = stage.queue.owe(webhook)
    began_s = trio.current_time()
    await stage.until(lambda: row.status == "delivered")
    assert stage.times(row)[0] - began_s <= TICK_S + 0.01


async def test_half_of_the_endpoints_being_black_holes_delays_nobody_else(
    nursery: trio.Nursery,
) -> None:
    """As many holes as permits, with a backlog each, could hold all of them."""
    stage = Stage(limits=DispatcherLimits(in_flight_max=16))
    holes = [stage.endpoint(HOLE.format(number)) for number in range(16)]
    good = [stage.endpoint(GOOD.format(number)) for number in range(16)]
    for hole in holes:
        stage.queue.owe(hole, 20)
    await nursery.start(stage.dispatcher.run)
    first = [row for webhook in good for row in stage.queue.owe(webhook)]
    # One that has accepted nothing yet may stand behind the holes, as long as those can hang.
    await stage.until(lambda: all(row.status == "delivered" for row in first), within_s=120)
    waits = []
    for _ in range(30):
        rows = [row for webhook in good for row in stage.queue.owe(webhook)]
        owed_s = trio.current_time()
        stage.dispatcher.wake()
        await trio.sleep(1)
        waits += [stage.times(row)[0] - owed_s for row in rows]
    # 16 receivers of 10 ms each on at least 8 permits.
    assert max(waits) <= 0.1
    assert max(stage.most[f"hole{number}.example"] for number in range(16)) == 1


async def test_half_of_the_endpoints_accepting_slowly_delays_nobody_else(
    nursery: trio.Nursery,
) -> None:
    """They accept everything, each time after nearly all the time there is."""

    async def slow(request: OutgoingRequest) -> Outcome:
        if "hole" in request.target.host:
            await trio.sleep(TOTAL_S - 1)
            return outcome(200, took_s=TOTAL_S - 1)
        return await respond(request)

    stage = Stage(script=slow, limits=DispatcherLimits(in_flight_max=16))
    good = [stage.endpoint(GOOD.format(number)) for number in range(16)]
    holes = [stage.endpoint(HOLE.format(number)) for number in range(16)]
    await nursery.start(stage.dispatcher.run)
    first = [row for webhook in good for row in stage.queue.owe(webhook)]
    await stage.until(lambda: all(row.status == "delivered" for row in first), within_s=120)
    for hole in holes:
        stage.queue.owe(hole, 100)
    waits = []
    for _ in range(60):
        rows = [row for webhook in good for row in stage.queue.owe(webhook)]
        owed_s = trio.current_time()
        stage.dispatcher.wake()
        await trio.sleep(1)
        waits += [stage.times(row)[0] - owed_s for row in rows if stage.times(row)]
        assert all(stage.times(row) for row in rows)
    assert max(waits) <= 0.1
    assert max(stage.most[f"hole{number}.example"] for number in range(16)) == 1


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
@given(
    chance=st.randoms(use_true_random=False),
    places=st.sampled_from([8, 16, 33]),
    endpoints=st.integers(4, 24),
)
def test_whatever_one_owners_endpoints_do_the_others_have_half_of_the_places(
    chance: random.Random, places: int, endpoints: int
) -> None:
    """They accept quickly until they are trusted, then hang, fail, or accept late, all at once."""

    async def torment() -> None:
        async def script(request: OutgoingRequest) -> Outcome:
            if "hole" not in request.target.host:
                return await respond(request)
            took_s = chance.choice([0.01, 0.01, TOTAL_S - 1, TOTAL_S])
            await trio.sleep(took_s)
            return outcome(chance.choice([200, 200, 200, 500, None]), took_s=took_s)

        stage = Stage(script=script, limits=DispatcherLimits(in_flight_max=places))
        hostile, victim = UUID(int=1), UUID(int=2)
        for number in range(endpoints):
            hole = stage.endpoint(HOLE.format(number), owner=hostile)
            stage.queue.owe(hole, 60)
        async with trio.open_nursery() as nursery:
            await nursery.start(stage.dispatcher.run)
            good = stage.endpoint(owner=victim)
            for _ in range(60):
                (row,) = stage.queue.owe(good)
                owed_s = trio.current_time()
                stage.dispatcher.wake()
                await trio.sleep(0.5)
                assert stage.times(row)[0] - owed_s <= 0.02
                held = sum(stage.under_way.values())
                assert held <= places // 2
                untrusted = stage.dispatcher.statistics().untrusted
                assert untrusted <= max(1, places // 4)
            nursery.cancel_scope.cancel()
        assert max(stage.most.values()) <= LANE_CAP

    trio.run(torment, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_a_server_whose_owner_has_its_share_tells_the_others(
    nursery: trio.Nursery,
) -> None:
    stage = Stage(limits=DispatcherLimits(in_flight_max=16))
    for number in range(5):
        stage.queue.owe(stage.endpoint(HOLE.format(number)), 1)
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: stage.dispatcher.statistics().in_flight == 4)
    assert stage.told_replicas == 1
    await nursery.start(stage.another("two").run)
    await stage.until(lambda: len(stage.sent) == 5, within_s=2 * TICK_S)


async def test_what_is_signed_with_v1a_verifies_and_so_does_the_key_before(
    nursery: trio.Nursery,
) -> None:
    stage, box = Stage(), ClearBox()
    pair = box.make(SignatureScheme.V1A, of=WebhookId("whk_1"))
    secret = box.make(SignatureScheme.V1, of=WebhookId("whk_1"))
    webhook = stage.queue.endpoint(GOOD.format(0), secret=pair.key.sealed)
    stage.queue.endpoints[webhook].previous_secret = secret.key.sealed
    (row,) = stage.queue.owe(webhook)
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: row.status == "delivered")
    ((_, request),) = stage.sent
    assert pair.key.public_key is not None
    assert secret.secret is not None
    now_s = 1_700_000_000 + trio.current_time()
    for held in (parse_public(pair.key.public_key), parse_secret(secret.secret)):
        assert verify(request.headers, request.body, [held], now_s=now_s) == row.event


async def test_a_hole_costs_one_permit_and_after_some_timeouts_none(nursery: trio.Nursery) -> None:
    stage = Stage()
    hole = stage.endpoint(HOLE.format(0))
    stage.queue.owe(hole, 300)
    await nursery.start(stage.dispatcher.run)
    await trio.sleep(3_600)
    assert stage.most["hole0.example"] == 1
    # Without the breaker it would be one each 15 s: 240. Its pauses grow to two minutes.
    assert len(stage.sent) < 60
    assert stage.dispatcher.statistics().in_flight <= 1


async def test_what_is_known_of_endpoints_that_are_gone_is_forgotten(
    nursery: trio.Nursery,
) -> None:
    """Endpoints are made, fail until they are left alone, and are deleted."""

    async def script(request: OutgoingRequest) -> Outcome:
        await trio.sleep(0.01)
        return outcome(500)

    stage = Stage(script=script)
    await nursery.start(stage.dispatcher.run)
    known = []
    for _ in range(12):
        for webhook in [stage.endpoint() for _ in range(5)]:
            stage.queue.owe(webhook, 5)
        stage.dispatcher.wake()
        await trio.sleep(60)
        tally = stage.dispatcher.tally()
        for endpoint in stage.queue.endpoints.values():
            endpoint.is_open = False
        known.append(sum(tally.values()))
    assert min(known) >= 5, "a breaker is kept while it may be asked"
    # Five a minute, each for five minutes and a tick.
    assert max(known) <= 5 * 6
    await trio.sleep(FORGOTTEN_S + 2 * TICK_S)
    assert sum(stage.dispatcher.tally().values()) == 0


async def test_a_breaker_in_use_is_not_forgotten(nursery: trio.Nursery) -> None:
    """Its pause was over long ago, and its trial hangs."""
    asked = 0

    async def script(request: OutgoingRequest) -> Outcome:
        nonlocal asked
        asked += 1
        if asked > 3:
            await trio.sleep(3_600)
        return outcome(500)

    stage = Stage(script=script, queue=FakeDeliveries(lease_s=10_000))
    stage.queue.owe(stage.endpoint(), 10)
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: asked > 3)
    await trio.sleep(1_000)
    assert sum(stage.dispatcher.tally().values()) == 1
    assert stage.dispatcher.statistics().in_flight == 1


async def test_an_endpoint_that_comes_back_is_found_out(nursery: trio.Nursery) -> None:
    back = trio.Event()

    async def script(request: OutgoingRequest) -> Outcome:
        await trio.sleep(0.01)
        return outcome(200 if back.is_set() else 500)

    stage = Stage(script=script)
    rows = stage.queue.owe(stage.endpoint(), 20)
    await nursery.start(stage.dispatcher.run)
    await trio.sleep(600)
    assert stage.dispatcher.statistics().delivered == 0
    back.set()
    # With its breaker's next trial, all that is due.
    await stage.until(lambda: rows[-1].status == "delivered", within_s=200)


async def test_failures_follow_the_schedule_with_a_fifth_of_jitter_then_the_delivery_is_dead(
    nursery: trio.Nursery,
) -> None:
    async def script(request: OutgoingRequest) -> Outcome:
        return outcome(500)

    schedule_s = SCHEDULE_S[:4]
    stage = Stage(script=script, limits=DispatcherLimits(schedule_s=schedule_s))
    await nursery.start(stage.dispatcher.run)
    (row,) = stage.queue.owe(stage.endpoint())
    await stage.until(lambda: row.status == "dead", step_s=1)
    assert row.reason is DeadReason.EXHAUSTED
    times = stage.times(row)
    assert len(times) == len(schedule_s) + 1
    for before_s, after_s, step_s in zip(times, times[1:], schedule_s, strict=False):
        assert 0.8 * step_s <= after_s - before_s <= 1.2 * step_s + TICK_S + 0.01
    assert {request.headers["webhook-id"] for _, request in stage.sent} == {row.event}
    assert [told for told, _ in stage.told.attempts] == ["5xx"] * 5
    assert stage.told.dead == {"exhausted": 1}


async def test_retry_after_is_honoured(nursery: trio.Nursery) -> None:
    answers = [outcome(429, retry_after="100"), outcome(200)]

    async def script(request: OutgoingRequest) -> Outcome:
        return answers.pop(0)

    stage = Stage(script=script)
    await nursery.start(stage.dispatcher.run)
    (row,) = stage.queue.owe(stage.endpoint())
    await stage.until(lambda: row.status == "delivered")
    first_s, second_s = stage.times(row)
    assert 100 <= second_s - first_s <= 100 + TICK_S + 0.01


@pytest.mark.parametrize("status", [301, 404, 500])
async def test_anything_but_2xx_is_a_failure(nursery: trio.Nursery, status: int) -> None:
    answers = [outcome(status)]

    async def script(request: OutgoingRequest) -> Outcome:
        return answers.pop(0) if answers else outcome(204)

    stage = Stage(script=script)
    await nursery.start(stage.dispatcher.run)
    (row,) = stage.queue.owe(stage.endpoint())
    await stage.until(lambda: row.status == "delivered")
    assert row.attempt == 2


async def test_an_answer_410_disables(nursery: trio.Nursery) -> None:
    async def script(request: OutgoingRequest) -> Outcome:
        return outcome(410)

    stage = Stage(script=script)
    await nursery.start(stage.dispatcher.run)
    webhook = stage.endpoint()
    first, second = stage.queue.owe(webhook, 2)
    await stage.until(lambda: first.status == "dead")
    assert stage.queue.endpoints[webhook].disabled is DisabledReason.GONE
    await trio.sleep(100)
    assert second.status == "pending"
    assert len(stage.sent) == 1


async def test_five_days_of_failure_disable(nursery: trio.Nursery) -> None:
    async def script(request: OutgoingRequest) -> Outcome:
        return outcome(503)

    stage = Stage(script=script)
    await nursery.start(stage.dispatcher.run)
    webhook = stage.endpoint()
    endpoint = stage.queue.endpoints[webhook]
    endpoint.failing_since_s = trio.current_time() - DISABLE_AFTER_S + 20
    (row,) = stage.queue.owe(webhook)
    await stage.until(lambda: row.failures == 2)
    assert endpoint.is_open
    await stage.until(lambda: row.failures == 3, within_s=300)
    await trio.sleep(1)
    assert endpoint.disabled is DisabledReason.FAILING


async def test_an_ordered_endpoint_gets_everything_in_sequence_and_one_at_a_time(
    nursery: trio.Nursery,
) -> None:
    answers = iter([500, 200, 200, 500, 500])

    async def script(request: OutgoingRequest) -> Outcome:
        await trio.sleep(0.01)
        return outcome(next(answers, 200))

    stage = Stage(script=script)
    await nursery.start(stage.dispatcher.run)
    rows = stage.queue.owe(stage.endpoint(is_ordered=True), 20)
    await stage.until(lambda: all(row.status == "delivered" for row in rows))
    sent = [request.headers["webhook-id"] for _, request in stage.sent]
    assert list(dict.fromkeys(sent)) == [row.event for row in rows]
    assert stage.most["good0.example"] == 1


async def test_more_than_may_wait_is_buried(nursery: trio.Nursery) -> None:
    stage = Stage(limits=DispatcherLimits(in_flight_max=64, pending_max=10))
    rows = stage.queue.owe(stage.endpoint(HOLE.format(0)), 30)
    await nursery.start(stage.dispatcher.run)
    await trio.sleep(2 * OVERFLOW_EVERY_S + 1)
    assert stage.dispatcher.statistics().overflow >= 19
    assert stage.told.dead == {"overflow": stage.dispatcher.statistics().overflow}
    assert stage.dispatcher.statistics().oldest_undelivered_s >= OVERFLOW_EVERY_S
    assert sum(row.status == "pending" for row in rows) <= 10


async def test_at_stop_what_is_in_hand_ends_and_nothing_more_begins(nursery: trio.Nursery) -> None:
    stage = Stage()
    rows = stage.queue.owe(stage.endpoint(), 10)
    async with trio.open_nursery() as inner:
        await inner.start(stage.dispatcher.run)
        await stage.until(lambda: stage.sent)
        began_s = trio.current_time()
        stage.dispatcher.stop()
    assert trio.current_time() - began_s <= 0.1
    assert [row.status for row in rows[: len(stage.sent)]] == ["delivered"] * len(stage.sent)
    assert {row.status for row in rows[len(stage.sent) :]} == {"pending"}


async def test_at_stop_what_hangs_is_given_back_and_another_server_sends_it_again(
    nursery: trio.Nursery,
) -> None:
    stage = Stage()
    (row,) = stage.queue.owe(stage.endpoint(HOLE.format(0)))
    async with trio.open_nursery() as inner:
        await inner.start(stage.dispatcher.run)
        await stage.until(lambda: stage.sent)
        began_s = trio.current_time()
        stage.dispatcher.stop()
    assert STOP_S <= trio.current_time() - began_s <= STOP_S + 0.1
    assert (row.status, row.log) == ("pending", [None])
    await nursery.start(stage.another("two").run)
    await stage.until(lambda: len(stage.times(row)) == 2, within_s=2)


async def test_what_a_dead_server_held_is_sent_again_when_its_lease_is_over(
    nursery: trio.Nursery,
) -> None:
    stage = Stage()
    (row,) = stage.queue.owe(stage.endpoint())
    await stage.queue.claim(holder="dead", limit=1, untrusted_limit=1)
    await nursery.start(stage.dispatcher.run)
    began_s = trio.current_time()
    await stage.until(lambda: row.status == "delivered")
    assert 30 <= trio.current_time() - began_s <= 30 + 2 * TICK_S


async def test_a_server_that_comes_back_takes_up_what_it_held_at_once(
    nursery: trio.Nursery,
) -> None:
    stage = Stage()
    (row,) = stage.queue.owe(stage.endpoint())
    await stage.queue.claim(holder="one", limit=1, untrusted_limit=1)
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: row.status == "delivered", within_s=1)


async def test_a_stale_outcome_is_counted_and_changes_nothing(nursery: trio.Nursery) -> None:
    stage = Stage()
    (row,) = stage.queue.owe(stage.endpoint(HOLE.format(0)))
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: stage.sent)
    row.lease_id = 999
    await stage.until(lambda: stage.dispatcher.statistics().stale == 1)
    assert (row.status, row.failures) == ("sending", 0)


async def test_a_secret_that_cannot_be_opened_fails_the_delivery_and_nothing_else(
    nursery: trio.Nursery,
) -> None:
    stage = Stage()
    await nursery.start(stage.dispatcher.run)
    (sealed,) = stage.queue.owe(stage.queue.endpoint(GOOD.format(1), secret=b""))
    (fine,) = stage.queue.owe(stage.endpoint())
    await stage.until(lambda: fine.status == "delivered")
    await stage.until(lambda: sealed.failures == 1)
    assert len(stage.sent) == 1


async def test_a_key_in_its_grace_that_cannot_be_opened_keeps_nothing_back(
    nursery: trio.Nursery,
) -> None:
    """After another RDEV_SECRET_FILE a rotation mends the endpoint at once, not in a day."""
    stage = Stage()
    webhook = stage.endpoint()
    stage.queue.endpoints[webhook].previous_secret = b""
    (row,) = stage.queue.owe(webhook)
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: row.status == "delivered")
    ((_, request),) = stage.sent
    assert request.headers["webhook-signature"].count("v1,") == 1


async def test_the_database_going_away_loses_no_outcome(nursery: trio.Nursery) -> None:
    stage = Stage()
    away = [3]
    settle = stage.queue.settle

    async def failing(settled: object) -> object:
        if away[0]:
            away[0] -= 1
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "away")
        return await settle(settled)  # type: ignore[arg-type]

    stage.queue.settle = failing  # type: ignore[method-assign, assignment]
    await nursery.start(stage.dispatcher.run)
    (row,) = stage.queue.owe(stage.endpoint())
    await stage.until(lambda: row.status == "delivered")
    assert len(stage.sent) == 1


async def test_a_full_server_tells_the_others(nursery: trio.Nursery) -> None:
    stage = Stage(limits=DispatcherLimits(in_flight_max=8))
    for number in range(20):
        stage.queue.owe(stage.endpoint(GOOD.format(number)))
    await nursery.start(stage.dispatcher.run)
    await stage.until(lambda: stage.dispatcher.statistics().delivered == 20)
    assert stage.dispatcher.statistics().in_flight == 0


@pytest.mark.parametrize(
    ("status", "fault", "counted"),
    [
        (204, None, "accepted"),
        (204, SendFault.CUT, "accepted"),
        (301, None, "3xx"),
        (410, None, "4xx"),
        (503, SendFault.TIMEOUT, "timeout"),
        (None, SendFault.DNS, "dns"),
        (777, None, "other"),
        (99, None, "other"),
    ],
)
def test_attempts_are_counted_under_a_closed_set_of_names(
    status: int | None, fault: SendFault | None, counted: str
) -> None:
    assert came_to(replace(outcome(status), fault=fault)) == counted
