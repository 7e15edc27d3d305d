"""Deliveries on PostgreSQL: what is owed, claims, fences, order, and what stops an endpoint."""

import json
from dataclasses import replace
from uuid import UUID

import pytest
import trio
import uuid_utils.compat

from rdev.adapters.postgres.upkeep import PostgresUpkeep
from rdev.domain.deliveries import (
    DISABLE_AFTER_S,
    DeadReason,
    DeliveryStatus,
    Owed,
    Redelivery,
    Settled,
    Verdict,
    delivery_id,
)
from rdev.domain.traces import TraceContext
from rdev.domain.webhooks import DisabledReason, EventType, WebhookChange
from tests.fakes.store import ACTOR
from tests.ports.conftest import Pools, postgres_world
from tests.ports.hooks import Hooks, accepted, outcome, postgres_hooks, refused


@pytest.fixture
async def hooks(pools: Pools) -> Hooks:
    return postgres_hooks(pools.requests)


async def test_an_event_is_owed_to_every_endpoint_that_asks_for_its_type(hooks: Hooks) -> None:
    one = await hooks.endpoint(events=(EventType.COMMAND_QUEUED, EventType.COMMAND_LOST))
    other = await hooks.endpoint(events=(EventType.COMMAND_STARTED,))
    queued, _ = await hooks.happen("command.queued", "command.completed")

    (delivery,) = await hooks.deliveries(one)
    assert (delivery.event, delivery.type) == (f"evt_{queued.hex}", "command.queued")
    assert delivery.status is DeliveryStatus.PENDING
    assert await hooks.deliveries(other) == []


async def test_without_an_enabled_endpoint_nothing_is_owed(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.queue.disable(webhook, DisabledReason.FAILING)
    await hooks.happen("command.queued")
    assert await hooks.deliveries(webhook) == []


async def test_what_is_rolled_back_is_not_owed(hooks: Hooks, pools: Pools) -> None:
    webhook = await hooks.endpoint()
    async with (
        pools.requests.connection() as connection,
        connection.transaction(force_rollback=True),
    ):
        await connection.execute(
            "insert into events (xid, type, project, status)"
            " values (pg_current_xact_id(), 'project.status', 'demo', 'ready')"
        )
    assert await hooks.deliveries(webhook) == []


async def test_the_payload_says_what_the_contract_says(hooks: Hooks) -> None:
    await hooks.endpoint()
    command = uuid_utils.compat.uuid7()
    await hooks.happen("command.completed", command=command)
    (owed,) = await hooks.claim()

    said = json.loads(owed.payload)
    assert list(said) == ["type", "event", "timestamp", "data"]
    assert said["type"] == said["event"] == "command.completed"
    assert said["timestamp"][10] == "T"
    assert said["timestamp"].endswith("Z")
    assert said["data"] == {
        "command_id": f"cmd_{command.hex}",
        "project": "demo",
        "type": "shell",
        "status": "completed",
        "attempt": 1,
        "sequence": 1,
        "exit_code": 0,
        "duration_ms": 12,
    }


async def test_a_claim_takes_four_of_an_endpoint_that_accepts_and_one_of_any_other(
    hooks: Hooks,
) -> None:
    await hooks.endpoint()
    await hooks.trust()
    new = await hooks.endpoint()
    await hooks.happen(*["command.queued"] * 10)

    claimed = await hooks.claim()
    assert [owed.webhook == new for owed in claimed] == [False] * 4 + [True]
    assert await hooks.claim() == []


async def test_of_endpoints_that_do_not_accept_a_claim_takes_no_more_than_it_may(
    hooks: Hooks,
) -> None:
    for _ in range(5):
        await hooks.endpoint()
    await hooks.happen("command.queued")
    assert len(await hooks.claim(untrusted_limit=2)) == 2
    assert len(await hooks.claim(limit=1)) == 1


async def test_an_endpoint_that_was_served_stands_behind_those_that_wait(hooks: Hooks) -> None:
    webhooks = {await hooks.endpoint() for _ in range(3)}
    await hooks.happen(*["command.queued"] * 2)
    served = []
    for _ in range(3):
        (owed,) = await hooks.claim(limit=1)
        served.append(owed.webhook)
        await hooks.queue.settle([refused(owed)])
    assert set(served) == webhooks


async def test_an_accepted_delivery_is_delivered_and_its_attempt_logged(hooks: Hooks) -> None:
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    result = await hooks.queue.settle([accepted(owed)])

    assert (result.stale, result.disabled, result.failing_too_long) == (set(), set(), set())
    delivery = await hooks.delivery(owed)
    assert (delivery.status, delivery.attempts, delivery.due) == (DeliveryStatus.DELIVERED, 1, None)
    (attempt,) = await hooks.log.attempts(delivery.id)
    assert (attempt.number, attempt.status, attempt.body) == (1, 200, b"\0thanks")
    assert attempt.request_headers["webhook-signature"] == "v1,[redacted]"
    assert await hooks.claim() == []


async def test_a_refused_delivery_comes_again_under_the_same_event_when_it_is_due(
    hooks: Hooks,
) -> None:
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    await hooks.queue.settle([refused(owed, again_in_s=30)])
    assert await hooks.claim() == []

    await hooks.age(31)
    (again,) = await hooks.claim()
    assert (again.event, again.attempt, again.failures) == (owed.event, 2, 1)


async def test_one_waiting_delivery_does_not_hold_the_next(hooks: Hooks) -> None:
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (first,) = await hooks.claim()
    await hooks.queue.settle([refused(first, again_in_s=3_600)])
    (next_event,) = await hooks.happen("command.started")
    assert [owed.event for owed in await hooks.claim()] == [f"evt_{next_event.hex}"]


async def test_a_stale_lease_changes_nothing(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued")
    (stale,) = await hooks.brief_queue.claim(holder="one", limit=1, untrusted_limit=1)
    assert (await hooks.queue.tick()).interrupted == 1
    (owed,) = await hooks.claim()

    result = await hooks.queue.settle([accepted(stale)])
    assert result.stale == {stale.lease.delivery}
    await hooks.queue.release([stale.lease], sent=True)
    delivery = await hooks.delivery(owed)
    assert (delivery.status, delivery.attempts) == (DeliveryStatus.PENDING, 2)
    assert [one.fault for one in await hooks.log.attempts(delivery.id)] == ["interrupted"]
    assert (await hooks.queue.settle([accepted(owed)])).stale == set()
    assert not await hooks.waiting(webhook)


async def test_a_stale_answer_410_does_not_disable(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued")
    (stale,) = await hooks.brief_queue.claim(holder="one", limit=1, untrusted_limit=1)
    await hooks.queue.tick()
    await hooks.claim()
    result = await hooks.queue.settle([_gone(stale)])
    assert result.disabled == set()
    found = await hooks.webhooks.get(webhook)
    assert found is not None
    assert found.is_enabled


async def test_what_was_not_sent_is_given_back_as_if_it_had_not_been_claimed(hooks: Hooks) -> None:
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    await hooks.queue.release([owed.lease], sent=False)
    delivery = await hooks.delivery(owed)
    assert (delivery.attempts, await hooks.log.attempts(delivery.id)) == (0, [])
    assert [one.event for one in await hooks.claim()] == [owed.event]


async def test_what_a_server_held_when_it_died_is_due_at_once(hooks: Hooks) -> None:
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    assert await hooks.queue.release_holder("another") == 0
    assert await hooks.queue.release_holder("one") == 1
    (again,) = await hooks.claim()
    assert (again.event, again.attempt) == (owed.event, 2)


async def test_an_ordered_endpoint_gets_one_at_a_time_in_sequence(hooks: Hooks) -> None:
    await hooks.endpoint(is_ordered=True)
    ids = await hooks.happen(*["command.queued"] * 5)
    sent = []
    while claimed := await hooks.claim():
        (owed,) = claimed
        assert await hooks.claim() == []
        sent.append(owed.event)
        await hooks.queue.settle([accepted(owed)])
    assert sent == [f"evt_{one.hex}" for one in ids]


async def test_a_failure_holds_the_rest_of_an_ordered_endpoint(hooks: Hooks) -> None:
    webhook = await hooks.endpoint(is_ordered=True)
    first, second = await hooks.happen("command.queued", "command.started")
    (owed,) = await hooks.claim()
    await hooks.queue.settle([refused(owed, again_in_s=30)])
    assert await hooks.claim() == []
    due = (await hooks.waiting(webhook))[0].due
    assert due is not None

    await hooks.age(31)
    (again,) = await hooks.claim()
    assert again.event == f"evt_{first.hex}"
    dead = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.EXHAUSTED)
    await hooks.queue.settle([Settled(owed=again, verdict=dead, outcome=outcome(500))])
    assert [one.event for one in await hooks.claim()] == [f"evt_{second.hex}"]


async def test_a_held_endpoint_is_passed_by(hooks: Hooks) -> None:
    held, other = await hooks.endpoint(), await hooks.endpoint()
    await hooks.happen("command.queued")
    await hooks.queue.hold(held, for_s=60)
    assert [owed.webhook for owed in await hooks.claim()] == [other]
    await hooks.age(61)
    assert [owed.webhook for owed in await hooks.claim()] == [held]


async def test_an_answer_410_disables_and_others_are_told(hooks: Hooks) -> None:
    gone = await hooks.endpoint(events=(EventType.COMMAND_QUEUED,))
    watcher = await hooks.endpoint(events=(EventType.ENDPOINT_DISABLED,))
    await hooks.happen("command.queued", "command.queued")
    (owed,) = await hooks.claim()
    result = await hooks.queue.settle([_gone(owed)])

    assert result.disabled == {gone}
    found = await hooks.webhooks.get(gone)
    assert found is not None
    assert (found.is_enabled, found.disabled_reason) == (False, DisabledReason.GONE)
    (told,) = await hooks.claim()
    assert told.webhook == watcher
    assert json.loads(told.payload)["data"] == {
        "webhook_id": gone,
        "url": found.url,
        "reason": "gone",
    }
    # What was pending waits, and is due when the endpoint is enabled again.
    await hooks.happen("command.queued")
    assert len(await hooks.waiting(gone)) == 1
    assert await hooks.claim() == []


async def test_only_who_sees_an_endpoint_hears_of_its_end(hooks: Hooks) -> None:
    ended = await hooks.endpoint(events=(EventType.COMMAND_QUEUED,), projects=frozenset({"a"}))
    events = (EventType.ENDPOINT_DISABLED,)
    same = await hooks.endpoint(events=events, projects=frozenset({"a", "b"}))
    other = await hooks.endpoint(events=events, projects=frozenset({"b"}))
    assert await hooks.queue.disable(ended, DisabledReason.FAILING)
    assert not await hooks.queue.disable(ended, DisabledReason.FAILING)
    assert len(await hooks.deliveries(same)) == 1
    assert await hooks.deliveries(other) == []


async def test_days_of_failure_are_told_with_the_next_failure_only(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    assert (await hooks.queue.settle([refused(owed)])).failing_too_long == set()
    await hooks.age(DISABLE_AFTER_S - 60)
    (owed,) = await hooks.claim()
    assert (await hooks.queue.settle([refused(owed)])).failing_too_long == set()
    await hooks.age(120)
    (owed,) = await hooks.claim()
    assert (await hooks.queue.settle([refused(owed)])).failing_too_long == {webhook}
    (owed,) = await hooks.claim()
    await hooks.queue.settle([accepted(owed)])
    found = await hooks.webhooks.get(webhook)
    assert found is not None
    assert found.failing_since is None


async def test_a_key_is_told_of_its_own_projects_only(hooks: Hooks) -> None:
    key = await hooks.key(frozenset({"a"}))
    webhook = await hooks.endpoint(owner=key, projects=frozenset({"a", "b"}))
    await hooks.happen("command.queued", project="b")
    await hooks.happen("command.queued", project="c")
    assert await hooks.deliveries(webhook) == []
    await hooks.happen("command.queued", project="a")
    assert [one.project for one in await hooks.deliveries(webhook)] == ["a"]


async def test_an_endpoint_whose_projects_were_narrowed_sends_nothing_of_the_others(
    hooks: Hooks,
) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued", project="a")
    found = await hooks.webhooks.get(webhook)
    assert found is not None
    change = WebhookChange(
        seen_at=found.updated_at,
        was_enabled=True,
        url=found.url,
        description="",
        events=found.events,
        project_ids=frozenset({"b"}),  # type: ignore[arg-type]
        is_ordered=False,
        is_enabled=True,
        owner=None,
    )
    await hooks.webhooks.change(webhook, change, ACTOR)
    assert [owed.is_allowed for owed in await hooks.claim()] == [False]


async def test_with_its_key_an_endpoint_ends(hooks: Hooks) -> None:
    key = await hooks.key(None)
    webhook = await hooks.endpoint(owner=key)
    await hooks.happen("command.queued")
    await hooks.revoke(key)
    # Before any tick: nothing is sent, nothing more is owed.
    assert await hooks.claim() == []
    await hooks.happen("command.started")
    assert len(await hooks.deliveries(webhook)) == 1

    ticked = await hooks.queue.tick()
    assert (ticked.ended, ticked.enabled) == (1, 0)
    found = await hooks.webhooks.get(webhook)
    assert found is not None
    assert found.disabled_reason is DisabledReason.KEY_ENDED


async def test_of_more_than_may_wait_the_oldest_are_dead_and_counted(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    ids = await hooks.happen(*["command.queued"] * 10)
    assert await hooks.queue.bury_overflow(pending_max=10) == 0
    assert await hooks.queue.bury_overflow(pending_max=7) == 3
    dead = await hooks.log.list_of(
        webhook, within=None, status=DeliveryStatus.DEAD, before=None, limit=100
    )
    assert {one.reason for one in dead} == {DeadReason.OVERFLOW}
    assert len(await hooks.waiting(webhook)) == 7
    found = await hooks.webhooks.get(webhook)
    assert found is not None
    assert found.overflowed == 3
    assert len(ids) == 10


async def test_a_dead_delivery_that_is_asked_for_again_comes_with_the_same_event(
    hooks: Hooks,
) -> None:
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    dead = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.EXHAUSTED)
    await hooks.queue.settle([Settled(owed=owed, verdict=dead, outcome=outcome(500))])
    assert await hooks.claim() == []

    assert await hooks.log.redeliver(delivery_id(owed.lease.delivery), ACTOR)
    (again,) = await hooks.claim()
    assert (again.event, again.failures, again.attempt) == (owed.event, 0, 2)
    assert not await hooks.log.redeliver(delivery_id(UUID(int=1)), ACTOR)


async def test_a_range_is_asked_for_again_by_time_and_status(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen(*["command.queued"] * 4)
    settled = []
    for number in range(4):
        (owed,) = await hooks.claim(limit=1)
        settled.append(await hooks.delivery(owed))
        if number % 2:
            await hooks.queue.settle([accepted(owed)])
        else:
            dead = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.EXHAUSTED)
            await hooks.queue.settle([Settled(owed=owed, verdict=dead, outcome=outcome(500))])
    since = min(one.created_at for one in settled)
    wanted = Redelivery(webhook=webhook, within=None, since=since, status=DeliveryStatus.DEAD)
    assert await hooks.log.redeliver_since(wanted, ACTOR, limit=1) == 1
    assert await hooks.log.redeliver_since(wanted, ACTOR, limit=10) == 1
    everything = Redelivery(webhook=webhook, within=None, since=since, status=None)
    assert await hooks.log.redeliver_since(everything, ACTOR, limit=10) == 2
    assert len(await hooks.waiting(webhook)) == 4


async def test_a_deleted_endpoint_is_sent_nothing(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued")
    assert await hooks.webhooks.delete(webhook, ACTOR)
    assert not await hooks.webhooks.delete(webhook, ACTOR)
    assert await hooks.claim() == []
    assert await hooks.webhooks.get(webhook) is None
    await hooks.happen("command.queued")
    assert len(await hooks.deliveries(webhook)) == 1


def _gone(owed: Owed) -> Settled:
    verdict = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.GONE)
    return Settled(owed=owed, verdict=verdict, outcome=outcome(410))


async def test_old_deliveries_go_with_their_attempts_and_messages(
    hooks: Hooks, pools: Pools
) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued", "command.started")
    for _ in range(2):
        (owed,) = await hooks.claim()
        await hooks.queue.settle([accepted(owed)])
    upkeep = PostgresUpkeep(pool=pools.housekeeping, holder="one")
    async with upkeep.store_turn() as store:
        assert store is not None
        assert await store.forget_deliveries(older_s=60, limit=10) == 0
        # So old that everything was made before.
        assert await store.forget_deliveries(older_s=-60, limit=1) == 1
        assert await store.forget_deliveries(older_s=-60, limit=10) == 1
        assert await store.forget_deliveries(older_s=-2 * 86_400, limit=10) == 2
    assert await counted(pools) == (0, 0, 0)
    assert await hooks.deliveries(webhook) == []


async def test_a_delivery_has_the_trace_of_the_command_it_tells_of(
    hooks: Hooks, pools: Pools
) -> None:
    world = postgres_world(pools)
    await world.project()
    webhook = await hooks.endpoint(is_ordered=True)
    trace = TraceContext(trace_id="4b" * 16, span_id="ab" * 8, is_sampled=True, state="a=1")
    traced, silent = replace(world.new(), trace=trace), world.new()
    for new in (traced, silent):
        await world.commands.insert(new)
    # One that is no longer stored, and a message of no command.
    await hooks.happen("command.lost")
    await hooks.log.ping(webhook, {}, ACTOR, idempotency=None)

    found = []
    for _ in range(4):
        (owed,) = await hooks.claim()
        found.append(owed.trace)
        await hooks.queue.settle([accepted(owed)])
    assert found == [trace, None, None, None]


async def test_what_is_still_to_be_sent_is_never_put_away_and_can_be_sent(
    hooks: Hooks, pools: Pools
) -> None:
    """It waits: of an endpoint that is disabled for longer than anything is kept."""
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued", "command.started")
    (sending,) = await hooks.claim()
    upkeep = PostgresUpkeep(pool=pools.housekeeping, holder="one")
    async with upkeep.store_turn() as store:
        assert store is not None
        assert await store.forget_deliveries(older_s=-2 * 86_400, limit=10) == 0
        assert await counted(pools) == (2, 0, 2)
        await hooks.queue.settle([accepted(sending)])
        assert await store.forget_deliveries(older_s=-2 * 86_400, limit=10) == 1
        (owed,) = await hooks.claim()
        assert owed.event != sending.event
        await hooks.queue.settle([refused(owed)])
        assert await store.forget_deliveries(older_s=-2 * 86_400, limit=10) == 0
        await hooks.webhooks.delete(webhook, ACTOR)
        assert await store.forget_deliveries(older_s=-2 * 86_400, limit=10) == 1
    assert await counted(pools) == (0, 0, 0)


async def counted(pools: Pools) -> tuple[int, ...] | None:
    """Deliveries, attempts and messages there are."""
    counts = "select (select count(*) from deliveries), (select count(*) from delivery_attempts)"
    counts += ", (select count(*) from webhook_messages)"
    async with pools.requests.connection() as connection:
        return await (await connection.execute(counts)).fetchone()


async def test_a_trace_is_found_that_was_stored_after_the_claim_had_begun(
    pools: Pools,
) -> None:
    """The claim of a delivery sees what came since its statement began; so must this."""
    world = postgres_world(pools)
    await world.project()
    trace = TraceContext(trace_id="4b" * 16, span_id="ab" * 8, is_sampled=True)
    new = replace(world.new(), trace=trace)
    payload = json.dumps({"data": {"command_id": new.id}})
    ask = "select message_trace(%s) from (select pg_advisory_lock(7) offset 0) turn"
    waits = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    found = []

    async def claim() -> None:
        async with pools.housekeeping.connection() as connection:
            found.append(await (await connection.execute(ask, (payload,))).fetchone())
            await connection.execute("select pg_advisory_unlock(7)")

    async with pools.appends.connection() as connection:
        await connection.execute("select pg_advisory_lock(7)")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim)
            with trio.fail_after(60):
                while (await (await connection.execute(waits)).fetchone()) == (0,):
                    await trio.sleep(0.01)
            await world.commands.insert(new)
            await connection.execute("select pg_advisory_unlock(7)")
    assert found == [(trace.traceparent,)]
