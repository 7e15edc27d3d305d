"""The `WebhookStore` and `DeliveryLog` ports, on the fakes and on PostgreSQL."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
import uuid_utils.compat

from rdev.adapters.postgres.pool import Pool
from rdev.domain.deliveries import (
    DeadReason,
    DeliveryId,
    DeliveryStatus,
    Redelivery,
    Settled,
    Verdict,
    delivery_id,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.signing import SignatureScheme
from rdev.domain.webhooks import (
    ROTATION_GRACE_S,
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
from rdev.ports.webhooks import DeliveryLog, WebhookStore
from tests.fakes.store import ACTOR
from tests.fakes.webhooks import FakeDeliveryLog, FakeWebhooks, HookState
from tests.ports.conftest import Pools
from tests.ports.hooks import Hooks, accepted, outcome, postgres_hooks

KEY = Idempotency(key_id=ADMIN_KEY_ID, key="once", digest=b"one request")
OTHER_REQUEST = replace(KEY, digest=b"another")
SECRET = SigningKey(sealed=b"sealed")
PAIR = SigningKey(sealed=b"sealed too", public_key="whpk_one")
OTHER_PAIR = SigningKey(sealed=b"sealed again", public_key="whpk_two")
DEMO, OTHER = ProjectId("demo"), ProjectId("other")
UNKNOWN = webhook_id(uuid_utils.compat.uuid7())


@dataclass(slots=True, kw_only=True)
class World:
    """Both ports of one store; `owe` makes a delivery of a project, `end` its end."""

    webhooks: WebhookStore
    log: DeliveryLog
    owe: Callable[[WebhookId, ProjectId], Awaitable[DeliveryId]]
    end: Callable[[DeliveryId, DeliveryStatus], Awaitable[None]]
    disable: Callable[[WebhookId, DisabledReason], Awaitable[None]]
    age: Callable[[float], Awaitable[None]]
    # Actions and targets of the audit log, oldest first.
    entries: Callable[[], Awaitable[list[tuple[str, str]]]]

    async def made(self, **fields: object) -> Webhook:
        return (await self.webhooks.insert(new_webhook(**fields), ACTOR)).webhook

    async def stored(self, webhook: WebhookId) -> Webhook:
        found = await self.webhooks.get(webhook)
        assert found is not None
        return found

    async def listed(self, webhook: WebhookId, **narrowed: object) -> list[DeliveryId]:
        wanted = {"within": None, "status": None, "before": None, "limit": 100, **narrowed}
        return [one.id for one in await self.log.list_of(webhook, **wanted)]  # type: ignore[arg-type]


def new_webhook(**fields: object) -> NewWebhook:
    new = NewWebhook(
        id=webhook_id(uuid_utils.compat.uuid7()),
        url="https://hooks.example.com/",
        description="of a test",
        events=(EventType.COMMAND_QUEUED, EventType.PING),
        project_ids=frozenset({DEMO, OTHER}),
        is_ordered=False,
        is_enabled=True,
        owner=ADMIN_KEY_ID,
        key=SECRET,
    )
    return replace(new, **fields)  # type: ignore[arg-type]


def change_of(seen: Webhook, **fields: object) -> WebhookChange:
    change = WebhookChange(
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
    return replace(change, **fields)  # type: ignore[arg-type]


def fake_world() -> World:
    state = HookState()

    async def owe(webhook: WebhookId, project: ProjectId) -> DeliveryId:
        return state.owe(webhook, "command.queued", project=project)

    async def end(delivery: DeliveryId, status: DeliveryStatus) -> None:
        state.end(delivery, status)

    async def disable(webhook: WebhookId, reason: DisabledReason) -> None:
        state.disable(webhook, reason)

    async def age(seconds: float) -> None:
        state.age(seconds)

    async def entries() -> list[tuple[str, str]]:
        return state.entries

    return World(
        webhooks=FakeWebhooks(state),
        log=FakeDeliveryLog(state),
        owe=owe,
        end=end,
        disable=disable,
        age=age,
        entries=entries,
    )


def postgres_world(pool: Pool) -> World:
    hooks = postgres_hooks(pool)

    async def disable(webhook: WebhookId, reason: DisabledReason) -> None:
        await hooks.queue.disable(webhook, reason)

    async def age(seconds: float) -> None:
        await hooks.age(seconds)

    return World(
        webhooks=hooks.webhooks,
        log=hooks.log,
        owe=partial(_owe, hooks),
        end=partial(_end, hooks),
        disable=disable,
        age=age,
        entries=partial(_entries, pool),
    )


async def _owe(hooks: Hooks, webhook: WebhookId, project: ProjectId) -> DeliveryId:
    await hooks.happen("command.queued", project=project)
    return (await hooks.deliveries(webhook))[-1].id


async def _end(hooks: Hooks, delivery: DeliveryId, status: DeliveryStatus) -> None:
    """Claim until it is this one's turn; the others are given back."""
    others = []
    while True:
        (owed,) = await hooks.queue.claim(holder="one", limit=1, untrusted_limit=1)
        if delivery_id(owed.lease.delivery) == delivery:
            break
        others.append(owed.lease)
    dead = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.EXHAUSTED)
    over = accepted(owed)
    if status is DeliveryStatus.DEAD:
        over = Settled(owed=owed, verdict=dead, outcome=outcome(500))
    await hooks.queue.settle([over])
    await hooks.queue.release(others, sent=False)


async def _entries(pool: Pool) -> list[tuple[str, str]]:
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "select action, target from audit_entries where actor <> 'server' order by xid, id"
        )
        return [(action, target) for action, target in await cursor.fetchall()]


@pytest.fixture
async def real(pools: Pools) -> World:
    return postgres_world(pools.requests)


@pytest.fixture(params=["fake", "postgres"])
def world(request: pytest.FixtureRequest) -> World:
    return fake_world() if request.param == "fake" else request.getfixturevalue("real")


async def test_what_was_made_is_found_as_it_was_said(world: World) -> None:
    new = new_webhook(key=PAIR, is_ordered=True)
    made = (await world.webhooks.insert(new, ACTOR)).webhook
    assert await world.stored(new.id) == made
    said = (made.url, made.description, made.events, made.project_ids, made.is_ordered, made.owner)
    assert said == (
        new.url,
        new.description,
        new.events,
        new.project_ids,
        new.is_ordered,
        new.owner,
    )
    assert (made.scheme, made.public_key) == (SignatureScheme.V1A, "whpk_one")
    assert (made.is_enabled, made.disabled_reason, made.previous_until) == (True, None, None)
    assert await world.webhooks.get(UNKNOWN) is None
    off = await world.made(is_enabled=False)
    assert (off.disabled_reason, off.disabled_at) != (None, None)


async def test_a_repeat_makes_nothing_and_tells_what_there_is_now(world: World) -> None:
    made = await world.made(idempotency=KEY)
    await world.webhooks.change(made.id, change_of(made, description="other"), ACTOR)
    again = await world.webhooks.insert(new_webhook(idempotency=KEY), ACTOR)
    assert (again.webhook.id, again.webhook.description) == (made.id, "other")
    assert again.is_replay
    with pytest.raises(RdevError) as other:
        await world.webhooks.insert(new_webhook(idempotency=OTHER_REQUEST), ACTOR)
    assert other.value.code is ErrorCode.IDEMPOTENCY_MISMATCH
    await world.webhooks.delete(made.id, ACTOR)
    with pytest.raises(RdevError) as gone:
        await world.webhooks.insert(new_webhook(idempotency=KEY), ACTOR)
    assert gone.value.code is ErrorCode.GONE


async def test_a_list_is_of_those_within_the_projects_newest_first_by_pages(world: World) -> None:
    everything = await world.made(project_ids=None)
    both = await world.made()
    one = await world.made(project_ids=frozenset({DEMO}))

    async def listed(**narrowed: object) -> list[WebhookId]:
        wanted = {"within": None, "before": None, "limit": 100, **narrowed}
        return [each.id for each in await world.webhooks.list_all(**wanted)]  # type: ignore[arg-type]

    assert await listed() == [one.id, both.id, everything.id]
    assert await listed(limit=2) == [one.id, both.id]
    assert await listed(before=both.id) == [everything.id]
    assert await listed(within={DEMO}) == [one.id]
    assert await listed(within={DEMO, OTHER}) == [one.id, both.id]
    assert await listed(within=set()) == []


async def test_of_what_was_seen_a_change_is_stored_and_of_anything_else_not(world: World) -> None:
    seen = await world.made()
    change = change_of(seen, url="https://moved.example.com/", project_ids=None, is_ordered=True)
    changed = await world.webhooks.change(seen.id, change, ACTOR)
    assert changed is not None
    assert changed == await world.stored(seen.id)
    assert (changed.url, changed.project_ids, changed.is_ordered) == (change.url, None, True)
    assert changed.owner == seen.owner
    assert await world.webhooks.change(seen.id, change, ACTOR) is None
    assert await world.webhooks.change(UNKNOWN, change, ACTOR) is None


async def test_the_reason_for_which_it_was_disabled_stays_until_it_is_enabled(world: World) -> None:
    seen = await world.made()
    await world.disable(seen.id, DisabledReason.GONE)
    assert await world.webhooks.change(seen.id, change_of(seen), ACTOR) is None
    found = await world.stored(seen.id)
    still = await world.webhooks.change(found.id, change_of(found), ACTOR)
    assert still is not None
    assert (still.disabled_reason, still.disabled_at) == (DisabledReason.GONE, found.disabled_at)
    anew = await world.webhooks.change(found.id, change_of(still, is_enabled=True), ACTOR)
    assert anew is not None
    assert (anew.is_enabled, anew.disabled_reason, anew.disabled_at) == (True, None, None)


async def test_the_key_before_is_told_for_as_long_as_it_signs(world: World) -> None:
    made = await world.made(key=PAIR)
    rotation = SecretRotation(webhook=made.id, key=OTHER_PAIR, grace_s=100)
    rotated = await world.webhooks.rotate(rotation, ACTOR)
    assert rotated is not None
    assert (rotated.webhook.public_key, rotated.webhook.previous_public_key) == (
        "whpk_two",
        "whpk_one",
    )
    assert rotated.webhook.previous_until is not None
    await world.age(101)
    over = await world.stored(made.id)
    assert (over.public_key, over.previous_public_key, over.previous_until) == (
        "whpk_two",
        None,
        None,
    )
    assert await world.webhooks.rotate(replace(rotation, webhook=UNKNOWN), ACTOR) is None


async def test_a_rotation_is_repeated_once(world: World) -> None:
    made = await world.made()
    rotation = SecretRotation(webhook=made.id, key=SECRET, grace_s=100, idempotency=KEY)
    first = await world.webhooks.rotate(rotation, ACTOR)
    again = await world.webhooks.rotate(rotation, ACTOR)
    assert first is not None
    assert again == replace(first, is_replay=True)


async def test_a_change_to_another_key_is_a_rotation_of_a_day(world: World) -> None:
    seen = await world.made()
    changed = await world.webhooks.change(seen.id, change_of(seen, key=PAIR), ACTOR)
    assert changed is not None
    assert changed.scheme is SignatureScheme.V1A
    assert changed.previous_public_key is None
    assert changed.previous_until is not None
    await world.age(ROTATION_GRACE_S - 60)
    assert (await world.stored(seen.id)).previous_until is not None
    await world.age(120)
    assert (await world.stored(seen.id)).previous_until is None
    found = await world.stored(seen.id)
    back = await world.webhooks.change(seen.id, change_of(found, key=SECRET), ACTOR)
    assert back is not None
    assert (back.public_key, back.previous_public_key) == (None, "whpk_one")


async def test_what_is_deleted_is_no_more(world: World) -> None:
    made = await world.made()
    assert await world.webhooks.delete(made.id, ACTOR)
    assert await world.webhooks.get(made.id) is None
    assert not await world.webhooks.delete(made.id, ACTOR)
    rotation = SecretRotation(webhook=made.id, key=SECRET, grace_s=1)
    assert await world.webhooks.rotate(rotation, ACTOR) is None
    assert await world.log.ping(made.id, {}, ACTOR, idempotency=None) is None


async def test_deliveries_are_listed_by_project_and_status_newest_first_by_pages(
    world: World,
) -> None:
    hook = await world.made()
    first = await world.owe(hook.id, DEMO)
    second = await world.owe(hook.id, OTHER)
    ping = await world.log.ping(hook.id, {"a": "b"}, ACTOR, idempotency=None)
    assert ping is not None
    third = ping.delivery
    await world.end(first, DeliveryStatus.DELIVERED)
    assert await world.listed(hook.id) == [third, second, first]
    assert await world.listed(hook.id, limit=2) == [third, second]
    assert await world.listed(hook.id, before=second) == [first]
    assert await world.listed(hook.id, within={DEMO}) == [third, first]
    assert await world.listed(hook.id, within=set()) == [third]
    assert await world.listed(hook.id, status=DeliveryStatus.PENDING) == [third, second]
    assert await world.listed(hook.id, status=DeliveryStatus.DELIVERED) == [first]
    assert await world.listed(UNKNOWN) == []
    found = await world.log.get(first)
    assert found is not None
    assert (found.webhook, found.project, found.status) == (hook.id, DEMO, "delivered")
    assert await world.log.payload(first)
    unknown = delivery_id(uuid_utils.compat.uuid7())
    assert await world.log.get(unknown) is None
    assert await world.log.payload(unknown) is None
    assert await world.log.attempts(unknown) == []


async def test_what_is_over_is_sent_again_when_it_is_asked_for(world: World) -> None:
    hook = await world.made()
    delivery = await world.owe(hook.id, DEMO)
    await world.end(delivery, DeliveryStatus.DEAD)
    dead = await world.log.get(delivery)
    assert dead is not None
    assert (dead.status, dead.due) == ("dead", None)
    assert await world.log.redeliver(delivery, ACTOR)
    again = await world.log.get(delivery)
    assert again is not None
    assert (again.status, again.reason, again.finished_at) == ("pending", None, None)
    assert again.event == dead.event
    assert not await world.log.redeliver(delivery_id(uuid_utils.compat.uuid7()), ACTOR)


async def test_of_a_range_the_oldest_of_a_status_and_of_projects_are_sent_again(
    world: World,
) -> None:
    hook = await world.made()
    ids = [await world.owe(hook.id, project) for project in (DEMO, OTHER, DEMO, DEMO)]
    for delivery, status in zip(ids, ("dead", "dead", "delivered", "dead"), strict=True):
        await world.end(delivery, DeliveryStatus(status))
    first = await world.log.get(ids[0])
    assert first is not None
    wanted = Redelivery(
        webhook=hook.id,
        within=frozenset({DEMO}),
        since=first.created_at - timedelta(minutes=1),
        status=DeliveryStatus.DEAD,
    )
    later = replace(wanted, since=datetime(2100, 1, 1, tzinfo=UTC))
    assert await world.log.redeliver_since(later, ACTOR, limit=10) == 0
    assert await world.log.redeliver_since(wanted, ACTOR, limit=1) == 1
    assert await world.listed(hook.id, status=DeliveryStatus.PENDING) == [ids[0]]
    assert await world.log.redeliver_since(wanted, ACTOR, limit=10) == 1
    assert await world.listed(hook.id, status=DeliveryStatus.PENDING) == [ids[3], ids[0]]
    everything = replace(wanted, within=None, status=None)
    assert await world.log.redeliver_since(everything, ACTOR, limit=10) == 2


async def test_a_repeated_ping_is_the_first_whatever_became_of_the_endpoint(world: World) -> None:
    hook = await world.made()
    first = await world.log.ping(hook.id, {}, ACTOR, idempotency=KEY)
    assert first is not None
    await world.disable(hook.id, DisabledReason.GONE)
    again = await world.log.ping(hook.id, {}, ACTOR, idempotency=KEY)
    assert again == replace(first, is_replay=True)
    assert len(await world.listed(hook.id)) == 1
    with pytest.raises(RdevError) as other:
        await world.log.ping(hook.id, {}, ACTOR, idempotency=OTHER_REQUEST)
    assert other.value.code is ErrorCode.IDEMPOTENCY_MISMATCH
    assert await world.log.ping(hook.id, {}, ACTOR, idempotency=replace(KEY, key="two")) is None


async def test_what_changes_something_is_entered_once_and_a_replay_never(world: World) -> None:
    hook = await world.made(idempotency=KEY)
    await world.webhooks.insert(new_webhook(idempotency=KEY), ACTOR)
    await world.webhooks.change(hook.id, change_of(hook, key=PAIR), ACTOR)
    await world.webhooks.change(hook.id, change_of(hook), ACTOR)  # seen too long ago
    await world.webhooks.rotate(SecretRotation(webhook=hook.id, key=SECRET, grace_s=1), ACTOR)
    ping_key = replace(KEY, key="ping")
    for _ in range(2):
        ping = await world.log.ping(hook.id, {}, ACTOR, idempotency=ping_key)
        assert ping is not None
    await world.end(ping.delivery, DeliveryStatus.DELIVERED)
    await world.log.redeliver(ping.delivery, ACTOR)
    await world.webhooks.delete(hook.id, ACTOR)
    assert await world.entries() == [
        ("webhook.created", hook.id),
        ("webhook.changed", hook.id),
        ("webhook.rotated", hook.id),
        ("webhook.tested", hook.id),
        ("webhook.redelivered", ping.delivery),
        ("webhook.deleted", hook.id),
    ]
