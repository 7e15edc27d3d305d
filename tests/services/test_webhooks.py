"""The use cases of webhooks on the fakes: who sees what, whose an endpoint is, and its keys."""

from dataclasses import dataclass, field
from uuid import UUID

import pytest
import trio
import uuid_utils.compat

from rdev.adapters.webhooks.ed25519 import parse_public
from rdev.domain.deliveries import DeliveryId, DeliveryStatus
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.keys import ADMIN, Grant, Principal, Scope
from rdev.domain.signing import SignatureScheme, parse_secret
from rdev.domain.webhook_requests import RedeliverRequest, parse_webhook, parse_webhook_change
from rdev.domain.webhook_targets import TargetRules
from rdev.domain.webhooks import DisabledReason, Webhook, WebhookId
from rdev.services.webhooks import ShownWebhook, Webhooks
from tests.fakes.store import ACTOR
from tests.fakes.webhooks import ClearBox, FakeDeliveryLog, FakeWebhooks, HookState

DEMO, OTHER = ProjectId("demo"), ProjectId("other")
URL = "https://hooks.example.com/"


def principal(*projects: ProjectId, reads: bool = True, name: str = "a") -> Principal:
    scopes = {Scope.WEBHOOKS_READ, Scope.WEBHOOKS_WRITE} | (
        {Scope.PROJECTS_READ} if reads else set()
    )
    grant = Grant(scopes=frozenset(scopes), project_ids=frozenset(projects) or None)
    return Principal(key_id=KeyId(f"key_{name}"), name=name, grant=grant)


OF_DEMO = principal(DEMO)
BLIND = principal(DEMO, reads=False, name="b")


@dataclass(slots=True, kw_only=True)
class Stage:
    """The service, what it stores, and how often it told the dispatcher."""

    state: HookState = field(default_factory=HookState)
    changes: int = 0
    webhooks: Webhooks = field(init=False)

    def __post_init__(self) -> None:
        self.webhooks = Webhooks(
            store=FakeWebhooks(self.state),
            log=FakeDeliveryLog(self.state),
            box=ClearBox(),
            rules=TargetRules(),
            changed=self._changed,
            new_uuid=_uuid7,
        )

    def _changed(self) -> None:
        self.changes += 1

    async def made(
        self, by: Principal = ADMIN, *, key: Idempotency | None = None, **fields: object
    ) -> ShownWebhook:
        body = {"url": URL, "events": ["command.queued"], **fields}
        return await self.webhooks.create(by, parse_webhook(body), ACTOR, idempotency=key)

    async def change(self, by: Principal, webhook: WebhookId, **fields: object) -> ShownWebhook:
        return await self.webhooks.change(by, webhook, parse_webhook_change(fields), ACTOR)

    async def listed(self, by: Principal, webhook: WebhookId) -> list[DeliveryId]:
        found = await self.webhooks.deliveries(by, webhook, status=None, before=None, limit=10)
        return [one.id for one in found]


def _uuid7() -> UUID:
    return uuid_utils.compat.uuid7()


@pytest.fixture
def stage() -> Stage:
    return Stage()


async def refusal(call: object) -> ErrorCode:
    with pytest.raises(RdevError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code


async def test_the_secret_is_told_once_and_of_v1a_there_is_none(stage: Stage) -> None:
    secret, pair = await stage.made(), await stage.made(signature_scheme="v1a")
    assert secret.secret is not None
    parse_secret(secret.secret)
    assert pair.secret is None
    assert pair.webhook.public_key is not None
    parse_public(pair.webhook.public_key)
    assert secret.webhook.public_key is None
    assert stage.changes == 2


async def test_a_rotation_keeps_the_scheme(stage: Stage) -> None:
    pair = await stage.made(signature_scheme="v1a")
    turned = await stage.webhooks.rotate(ADMIN, pair.webhook.id, ACTOR, grace_s=10)
    assert turned.secret is None
    assert turned.webhook.scheme is SignatureScheme.V1A
    assert turned.webhook.previous_public_key == pair.webhook.public_key
    assert turned.webhook.public_key != pair.webhook.public_key


async def test_the_scheme_it_has_is_no_change_of_its_key(stage: Stage) -> None:
    made = (await stage.made()).webhook
    same = await stage.change(ADMIN, made.id, signature_scheme="v1", description="said")
    assert (same.secret, same.webhook.previous_until) == (None, None)
    assert len(stage.state.sealed[made.id]) == 1
    silent = await stage.change(ADMIN, made.id, signature_scheme=None)
    assert silent.webhook.scheme is SignatureScheme.V1


async def test_another_scheme_makes_no_new_owner_and_is_stored_once_under_contention(
    stage: Stage,
) -> None:
    """Two at once: one makes the key, the other finds it made."""
    made = (await stage.made(OF_DEMO)).webhook
    done: list[ShownWebhook] = []

    async def turn() -> None:
        done.append(await stage.change(principal(DEMO, name="c"), made.id, signature_scheme="v1a"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        nursery.start_soon(turn)
    assert len({one.webhook.public_key for one in done}) == 1
    assert len(stage.state.sealed[made.id]) == 2
    assert done[0].webhook.owner == OF_DEMO.key_id


async def test_a_key_sees_an_endpoint_when_it_sees_all_of_its_projects(stage: Stage) -> None:
    wide = (await stage.made(project_ids=["demo", "other"])).webhook
    everything = (await stage.made()).webhook
    own = (await stage.made(project_ids=["demo"])).webhook
    found = await stage.webhooks.list_all(OF_DEMO, before=None, limit=10)
    assert [one.id for one in found] == [own.id]
    for hidden in (wide, everything):
        calls = [
            stage.webhooks.get(OF_DEMO, hidden.id),
            stage.change(OF_DEMO, hidden.id, signature_scheme="v1a"),
            stage.webhooks.rotate(OF_DEMO, hidden.id, ACTOR, grace_s=0),
            stage.webhooks.test(OF_DEMO, hidden.id, ACTOR),
            stage.webhooks.delete(OF_DEMO, hidden.id, ACTOR),
            stage.listed(OF_DEMO, hidden.id),
        ]
        assert {await refusal(call) for call in calls} == {ErrorCode.NOT_FOUND}
        assert len(stage.state.sealed[hidden.id]) == 1


async def test_a_key_is_told_of_its_own_projects_only(stage: Stage) -> None:
    assert (await stage.made(OF_DEMO)).webhook.project_ids == {DEMO}
    assert await refusal(stage.made(OF_DEMO, project_ids=["other"])) is ErrorCode.FORBIDDEN
    assert await refusal(stage.made(BLIND)) is ErrorCode.FORBIDDEN
    assert (await stage.made(BLIND, events=["ping"])).webhook.owner == BLIND.key_id


@pytest.mark.parametrize(
    "fields", [{"url": URL + "mine"}, {"events": ["*"]}, {"project_ids": None}, {"enabled": True}]
)
async def test_nobody_borrows_the_rights_of_the_owner(
    stage: Stage, fields: dict[str, object]
) -> None:
    made = (await stage.made(OF_DEMO)).webhook
    stage.state.disable(made.id, DisabledReason.GONE)
    assert await refusal(stage.change(BLIND, made.id, **fields)) is ErrorCode.FORBIDDEN
    other = principal(DEMO, name="c")
    changed = await stage.change(other, made.id, **fields)
    assert changed.webhook.owner == other.key_id
    assert changed.webhook.project_ids == {DEMO}


async def test_of_deliveries_a_key_sees_those_of_its_own_projects(stage: Stage) -> None:
    """Also where the endpoint was told of others, before somebody narrowed it."""
    made = (await stage.made(project_ids=["demo", "other"])).webhook
    own, foreign = (
        stage.state.owe(made.id, "command.queued", project=project) for project in (DEMO, OTHER)
    )
    for delivery in (own, foreign):
        stage.state.end(delivery, DeliveryStatus.DEAD)
    await stage.change(ADMIN, made.id, project_ids=["demo"])
    assert await stage.listed(OF_DEMO, made.id) == [own]
    assert await stage.listed(ADMIN, made.id) == [foreign, own]
    for call in (
        stage.webhooks.delivery(OF_DEMO, foreign),
        stage.webhooks.redeliver(OF_DEMO, foreign, ACTOR),
    ):
        assert await refusal(call) is ErrorCode.NOT_FOUND
    assert (await stage.webhooks.delivery(OF_DEMO, own)).payload is not None
    assert (await stage.webhooks.delivery(BLIND, own)).payload is None
    since = made.created_at.replace(year=2000)
    again = RedeliverRequest(since=since, status=None)
    assert await stage.webhooks.redeliver_since(OF_DEMO, made.id, again, ACTOR) == 1
    assert stage.state.deliveries[foreign].status is DeliveryStatus.DEAD


async def test_a_repeat_tells_nothing_of_what_the_key_no_longer_sees(stage: Stage) -> None:
    key = Idempotency(key_id=OF_DEMO.key_id, key="once", digest=b"d" * 32)
    made = (await stage.made(OF_DEMO, key=key)).webhook
    assert (await stage.made(OF_DEMO, key=key)).secret is None
    await stage.change(ADMIN, made.id, project_ids=["other"], url=URL + "theirs")
    assert await refusal(stage.made(OF_DEMO, key=key)) is ErrorCode.NOT_FOUND


async def test_a_repeated_ping_is_the_first_also_when_it_is_disabled_by_then(stage: Stage) -> None:
    key = Idempotency(key_id=ADMIN.key_id, key="once", digest=b"d" * 32)
    made = (await stage.made()).webhook
    first = await stage.webhooks.test(ADMIN, made.id, ACTOR, idempotency=key)
    await stage.change(ADMIN, made.id, enabled=False)
    again = await stage.webhooks.test(ADMIN, made.id, ACTOR, idempotency=key)
    assert (again.delivery, again.is_replay) == (first.delivery, True)
    assert await refusal(stage.webhooks.test(ADMIN, made.id, ACTOR)) is ErrorCode.CONFLICT


async def test_who_loses_every_race_is_told_to_come_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await stage.made()).webhook

    async def never(*_: object) -> Webhook | None:
        return None

    monkeypatch.setattr(FakeWebhooks, "change", never)
    assert await refusal(stage.change(ADMIN, made.id, description="x")) is ErrorCode.CONFLICT
