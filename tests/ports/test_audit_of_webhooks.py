"""No change of an endpoint without its entry, no entry without its change."""

from datetime import UTC, datetime

import pytest
import uuid_utils.compat

from rdev.domain.deliveries import DeadReason, DeliveryStatus, Redelivery, Settled, Verdict
from rdev.domain.deliveries import delivery_id as to_delivery_id
from rdev.domain.idempotency import Idempotency
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.webhooks import (
    DisabledReason,
    EventType,
    NewWebhook,
    SecretRotation,
    SigningKey,
    WebhookChange,
    WebhookId,
    webhook_id,
)
from tests.fakes.store import ACTOR
from tests.ports.conftest import Pools
from tests.ports.hooks import Hooks, accepted, outcome, postgres_hooks

URL = "https://hooks.example.com:8443/services/canary-in-a-path?key=canary-in-a-query"
_ENTRIES = """
select action, target, actor, request_id, detail from audit_entries
where action like 'webhook.%' order by id
"""

Entry = tuple[str, str, str, str | None, dict[str, object]]


@pytest.fixture
async def hooks(pools: Pools) -> Hooks:
    return postgres_hooks(pools.requests)


async def entries(pools: Pools) -> list[Entry]:
    async with pools.requests.connection() as connection:
        return await (await connection.execute(_ENTRIES)).fetchall()


async def change(hooks: Hooks, webhook: WebhookId) -> None:
    seen = await hooks.webhooks.get(webhook)
    wanted = WebhookChange(
        seen_at=datetime.now(UTC) if seen is None else seen.updated_at,
        was_enabled=True,
        url=URL,
        description="",
        events=(EventType.PING,),
        project_ids=None,
        is_ordered=False,
        is_enabled=True,
        owner=None,
    )
    changed = await hooks.webhooks.change(webhook, wanted, ACTOR)
    assert (changed is None) == (seen is None)


async def test_what_changes_an_endpoint_is_entered_once_and_no_secret_of_it(
    hooks: Hooks, pools: Pools
) -> None:
    webhook = await hooks.endpoint(url=URL, secret=b"canary-secret")
    await change(hooks, webhook)
    await hooks.webhooks.rotate(
        SecretRotation(webhook=webhook, key=SigningKey(sealed=b"canary-fresh"), grace_s=5), ACTOR
    )
    for _ in range(2):
        await hooks.webhooks.delete(webhook, ACTOR)

    found = await entries(pools)
    assert [entry[:4] for entry in found] == [
        (f"webhook.{what}", webhook, ACTOR.key_id, ACTOR.request_id)
        for what in ("created", "changed", "rotated", "deleted")
    ]
    assert found[0][4]["origin"] == "https://hooks.example.com:8443"
    assert found[2][4] == {"grace_s": 5, "signature_scheme": "v1"}
    assert "canary" not in str(found)


async def test_what_changes_nothing_is_not_entered(hooks: Hooks, pools: Pools) -> None:
    unknown = webhook_id(uuid_utils.compat.uuid7())
    await change(hooks, unknown)
    rotation = SecretRotation(webhook=unknown, key=SigningKey(sealed=b"x"), grace_s=5)
    assert await hooks.webhooks.rotate(rotation, ACTOR) is None
    assert await hooks.log.ping(unknown, {}, ACTOR, idempotency=None) is None
    nothing = Redelivery(
        webhook=unknown, within=None, since=datetime.fromtimestamp(0, UTC), status=None
    )
    assert await hooks.log.redeliver_since(nothing, ACTOR, limit=10) == 0
    assert await entries(pools) == []


def new_webhook(key: Idempotency) -> NewWebhook:
    return NewWebhook(
        id=webhook_id(uuid_utils.compat.uuid7()),
        url=URL,
        description="",
        events=(EventType.PING,),
        project_ids=None,
        is_ordered=False,
        is_enabled=True,
        owner=ADMIN_KEY_ID,
        key=SigningKey(sealed=b"sealed"),
        idempotency=key,
    )


async def test_replays_make_nothing_and_are_not_entered(hooks: Hooks, pools: Pools) -> None:
    def key(name: str) -> Idempotency:
        return Idempotency(key_id=ADMIN_KEY_ID, key=name, digest=b"d" * 32)

    made = [await hooks.webhooks.insert(new_webhook(key("new")), ACTOR) for _ in range(2)]
    webhook = made[0].webhook.id
    rotated = [
        await hooks.webhooks.rotate(
            SecretRotation(
                webhook=webhook, key=SigningKey(sealed=b"x"), grace_s=5, idempotency=key("turn")
            ),
            ACTOR,
        )
        for _ in range(2)
    ]
    pings = [await hooks.log.ping(webhook, {}, ACTOR, idempotency=key("ping")) for _ in range(2)]

    assert made[1].webhook.id == webhook
    assert [one and one.is_replay for one in made] == [False, True]
    assert [one and one.is_replay for one in rotated] == [False, True]
    assert [one and one.is_replay for one in pings] == [False, True]
    assert len(await hooks.deliveries(webhook)) == 1
    assert [entry[0] for entry in await entries(pools)] == [
        "webhook.created",
        "webhook.rotated",
        "webhook.tested",
    ]


async def test_what_is_asked_for_again_is_entered(hooks: Hooks, pools: Pools) -> None:
    webhook = await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    await hooks.queue.settle([accepted(owed)])
    delivery = to_delivery_id(owed.lease.delivery)
    since = datetime.fromtimestamp(0, UTC)

    assert await hooks.log.redeliver(delivery, ACTOR)
    (again,) = await hooks.claim()
    await hooks.queue.settle([accepted(again)])
    wanted = Redelivery(webhook=webhook, within=None, since=since, status=DeliveryStatus.DELIVERED)
    assert await hooks.log.redeliver_since(wanted, ACTOR, limit=10) == 1

    _, one, many = await entries(pools)
    assert one[:2] == ("webhook.redelivered", delivery)
    assert many[:2] == ("webhook.redelivered", webhook)
    assert many[4] == {"since": since.isoformat(), "status": "delivered", "count": 1}


async def test_what_the_server_disables_it_enters_itself(hooks: Hooks, pools: Pools) -> None:
    failing, gone = [await hooks.endpoint() for _ in range(2)]
    owner = await hooks.key(None)
    orphan = await hooks.endpoint(owner=owner, events=(EventType.PING,))
    await hooks.happen("command.queued")
    (owed,) = [one for one in await hooks.claim() if one.webhook == gone]
    verdict = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.GONE)
    await hooks.queue.settle([Settled(owed=owed, verdict=verdict, outcome=outcome(410))])
    for _ in range(2):
        await hooks.queue.disable(failing, DisabledReason.FAILING)
    await hooks.revoke(owner)
    ticks = [await hooks.queue.tick() for _ in range(2)]
    assert [(one.ended, one.enabled) for one in ticks] == [(1, 0), (0, 0)]

    def entry(webhook: WebhookId, reason: DisabledReason) -> Entry:
        return ("webhook.disabled", webhook, "server", None, {"reason": reason.value})

    assert [one for one in await entries(pools) if one[0] != "webhook.created"] == [
        entry(gone, DisabledReason.GONE),
        entry(failing, DisabledReason.FAILING),
        entry(orphan, DisabledReason.KEY_ENDED),
    ]
