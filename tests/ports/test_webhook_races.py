"""Changes of an endpoint that meet each other, an attempt, or the server that disables it."""

from dataclasses import replace

import pytest
import trio
import uuid_utils.compat

from rdev.adapters.postgres.pool import open_pool
from rdev.adapters.postgres.webhooks import PostgresWebhooks
from rdev.domain.deliveries import DeadReason, DeliveryStatus, Settled, Verdict
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.webhooks import (
    WEBHOOKS_MAX,
    DisabledReason,
    EventType,
    NewWebhook,
    SecretRotation,
    SigningKey,
    Webhook,
    WebhookChange,
    WebhookId,
    webhook_id,
)
from rdev.ports.webhooks import WebhookStore
from tests.fakes.store import ACTOR
from tests.ports.conftest import Pools
from tests.ports.hooks import Hooks, accepted, outcome, postgres_hooks, refused
from tests.ports.test_migrations_with_data import back_and_forth

ROUNDS = 30


@pytest.fixture
async def hooks(pools: Pools) -> Hooks:
    return postgres_hooks(pools.requests)


async def stored(hooks: Hooks, webhook: WebhookId) -> Webhook:
    found = await hooks.webhooks.get(webhook)
    assert found is not None
    return found


def change_of(seen: Webhook) -> WebhookChange:
    """A change that changes nothing."""
    return WebhookChange(
        seen_at=seen.updated_at,
        was_enabled=seen.is_enabled,
        url=seen.url,
        description=seen.description,
        events=seen.events,
        project_ids=seen.project_ids,
        is_ordered=seen.is_ordered,
        is_enabled=seen.is_enabled,
        owner=None,
    )


async def test_a_change_that_did_not_see_the_end_does_not_undo_it(hooks: Hooks) -> None:
    seen = await stored(hooks, await hooks.endpoint())
    await hooks.queue.disable(seen.id, DisabledReason.GONE)
    change = replace(change_of(seen), description="said before it was gone")
    assert await hooks.webhooks.change(seen.id, change, ACTOR) is None
    found = await stored(hooks, seen.id)
    assert (found.is_enabled, found.disabled_reason) == (False, DisabledReason.GONE)


async def test_of_two_changes_of_the_same_state_one_holds(hooks: Hooks) -> None:
    seen = await stored(hooks, await hooks.endpoint())
    moved = replace(change_of(seen), url="https://moved.example.com/")
    assert await hooks.webhooks.change(seen.id, moved, ACTOR) is not None
    assert await hooks.webhooks.change(seen.id, change_of(seen), ACTOR) is None
    assert (await stored(hooks, seen.id)).url == "https://moved.example.com/"


async def test_what_was_under_way_when_the_order_was_asked_for_keeps_to_it(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    first, second = await hooks.happen("command.queued", "command.started")
    (owed,) = await hooks.claim()
    seen = await stored(hooks, webhook)
    await hooks.webhooks.change(webhook, replace(change_of(seen), is_ordered=True), ACTOR)
    await hooks.queue.settle([refused(owed, again_in_s=30)])
    assert await hooks.claim() == []  # the failure holds the rest

    await hooks.age(31)
    (again,) = await hooks.claim()
    assert again.event == f"evt_{first.hex}"
    await hooks.queue.settle([accepted(again)])
    assert [one.event for one in await hooks.claim()] == [f"evt_{second.hex}"]


async def test_what_was_under_way_when_the_order_was_given_up_waits_its_pause(
    hooks: Hooks,
) -> None:
    webhook = await hooks.endpoint(is_ordered=True)
    await hooks.happen("command.queued", "command.started")
    (owed,) = await hooks.claim()
    seen = await stored(hooks, webhook)
    await hooks.webhooks.change(webhook, replace(change_of(seen), is_ordered=False), ACTOR)
    await hooks.queue.settle([refused(owed, again_in_s=30)])
    assert [one.event for one in await hooks.claim()] != [owed.event]


async def test_who_enables_an_endpoint_has_what_waits_sent_now(hooks: Hooks) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    await hooks.queue.settle([refused(owed, again_in_s=70_000)])
    await hooks.queue.disable(webhook, DisabledReason.FAILING)
    seen = await stored(hooks, webhook)
    await hooks.webhooks.change(webhook, replace(change_of(seen), is_enabled=True), ACTOR)
    assert [one.event for one in await hooks.claim()] == [owed.event]


@pytest.mark.slow
async def test_changes_and_answers_410_and_overflows_never_wait_in_a_ring(hooks: Hooks) -> None:
    """A deadlock would be SERVICE_UNAVAILABLE of one of them."""
    webhook = await hooks.endpoint()
    gone = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.GONE)

    async def settle() -> None:
        for owed in await hooks.claim():
            await hooks.queue.settle([Settled(owed=owed, verdict=gone, outcome=outcome(410))])

    async def change(is_ordered: bool) -> None:
        seen = await stored(hooks, webhook)
        wanted = replace(change_of(seen), is_enabled=True, is_ordered=is_ordered)
        await hooks.webhooks.change(webhook, wanted, ACTOR)

    async def bury() -> None:
        await hooks.queue.bury_overflow(pending_max=10)

    for number in range(ROUNDS):
        await hooks.happen(*["command.queued"] * 20)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(settle)
                nursery.start_soon(bury)
                nursery.start_soon(change, number % 2 == 0)


async def test_there_are_so_many_endpoints_and_no_more(hooks: Hooks, pools: Pools) -> None:
    """A replay is answered all the same, and one that is deleted makes room."""
    key = Idempotency(key_id=ADMIN_KEY_ID, key="new", digest=b"d" * 32)
    made = await hooks.webhooks.insert(new_webhook(key), ACTOR)
    async with pools.requests.connection() as connection:
        await connection.execute(
            "insert into webhook_lanes (webhook_id, cap) select gen_random_uuid(), 1"
            " from generate_series(2, %s)",
            (WEBHOOKS_MAX,),
        )
    with pytest.raises(RdevError) as full:
        await hooks.webhooks.insert(new_webhook(None), ACTOR)
    assert full.value.code is ErrorCode.TOO_MANY_REQUESTS
    assert full.value.retry_after_s is not None
    again = await hooks.webhooks.insert(new_webhook(key), ACTOR)
    assert (again.webhook.id, again.is_replay) == (made.webhook.id, True)
    other = replace(key, digest=b"e" * 32)
    with pytest.raises(RdevError, match="IDEMPOTENCY_MISMATCH"):
        await hooks.webhooks.insert(new_webhook(other), ACTOR)

    await hooks.webhooks.delete(made.webhook.id, ACTOR)
    assert not (await hooks.webhooks.insert(new_webhook(None), ACTOR)).is_replay


async def test_however_many_are_made_at_once_there_are_never_too_many(
    hooks: Hooks, pools: Pools
) -> None:
    """Of two servers, each with connections of its own; one place is left, then none."""
    left = 3
    async with pools.requests.connection() as connection:
        await connection.execute(
            "insert into webhook_lanes (webhook_id, cap) select gen_random_uuid(), 1"
            " from generate_series(1, %s)",
            (WEBHOOKS_MAX - left,),
        )
    ended: list[ErrorCode | None] = []

    async def make(store: WebhookStore, number: int) -> None:
        key = Idempotency(key_id=ADMIN_KEY_ID, key=f"{number}", digest=b"d" * 32)
        try:
            await store.insert(new_webhook(key if number % 2 else None), ACTOR)
            ended.append(None)
        except RdevError as error:
            ended.append(error.code)

    async with open_pool(pools.settings, wait_s=60.0) as others:
        servers = [hooks.webhooks, PostgresWebhooks(pool=others)]
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for number in range(24):
                    nursery.start_soon(make, servers[number % 2], number)
    assert ended.count(None) == left
    assert ended.count(ErrorCode.TOO_MANY_REQUESTS) == 24 - left
    async with pools.requests.connection() as connection:
        row = await (await connection.execute("select count(*) from webhook_lanes")).fetchone()
    assert row == (WEBHOOKS_MAX,)


def new_webhook(key: Idempotency | None) -> NewWebhook:
    return NewWebhook(
        id=webhook_id(uuid_utils.compat.uuid7()),
        url="https://hooks.example.com/",
        description="",
        events=(EventType.PING,),
        project_ids=None,
        is_ordered=False,
        is_enabled=True,
        owner=ADMIN_KEY_ID,
        key=SigningKey(sealed=b"sealed"),
        idempotency=key,
    )


async def test_a_build_without_v1a_stops_such_endpoints_and_keeps_what_they_are_owed(
    hooks: Hooks, pools: Pools
) -> None:
    """Back and forth over 0015: one of v1a, one in whose grace v1a signs, and one that has none."""
    pair = SigningKey(sealed=b"pair", public_key="whpk_1")
    of_pair, turned, plain = [
        await hooks.endpoint(projects=frozenset({project}), public_key=public_key)
        for project, public_key in (("a", "whpk_0"), ("b", "whpk_0"), ("c", None))
    ]
    for webhook, key in ((turned, SigningKey(sealed=b"secret")), (plain, SigningKey(sealed=b"s"))):
        rotation = SecretRotation(webhook=webhook, key=key, grace_s=1_000)
        await hooks.webhooks.rotate(rotation, ACTOR)
    for project in "abc":
        await hooks.happen("command.queued", project=project)
    await back_and_forth(pools, "0015")

    # (Connections of the pool have prepared what the tables were.)
    async with open_pool(pools.settings, wait_s=60.0) as pool:
        after = postgres_hooks(pool)
        claimed = {owed.webhook: owed.secrets for owed in await after.claim()}
        assert claimed == {turned: (b"secret",), plain: (b"s", b"sealed")}
        stopped = await stored(after, of_pair)
        assert not stopped.is_enabled
        assert len(await after.waiting(of_pair)) == 1
        rotation = SecretRotation(webhook=of_pair, key=pair, grace_s=0)
        await after.webhooks.rotate(rotation, ACTOR)
        seen = await stored(after, of_pair)
        await after.webhooks.change(of_pair, replace(change_of(seen), is_enabled=True), ACTOR)
        (owed,) = await after.claim()
        assert (owed.webhook, owed.secrets) == (of_pair, (b"pair",))
