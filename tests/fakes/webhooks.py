"""The ports of endpoints and of the log of deliveries in memory, on the clock of the test."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from uuid import UUID

import trio

from rdev.adapters.webhooks.ed25519 import PrivateKey
from rdev.domain.audit import Action, Actor
from rdev.domain.deliveries import (
    DeadReason,
    Delivery,
    DeliveryAttempt,
    DeliveryId,
    DeliveryStatus,
    Redelivery,
    delivery_id,
    is_delivery_id,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.signing import Secret, SignatureScheme, Signer
from rdev.domain.webhooks import (
    ROTATION_GRACE_S,
    WEBHOOKS_MAX,
    DisabledReason,
    EventType,
    NewWebhook,
    SecretRotation,
    SigningKey,
    Webhook,
    WebhookChange,
    WebhookId,
)
from rdev.ports.webhooks import FreshKey, PingMade, WebhookMade
from tests.fakes.idempotency import KeptKeys

EPOCH_S = 1_800_000_000
_FULL_RETRY_S = 60.0


class ClearBox:
    """Keeps nothing from anybody: what is sealed begins with its scheme, if it is not v1."""

    def __init__(self) -> None:
        self._serial = count(1)

    def make(self, scheme: SignatureScheme, *, of: WebhookId) -> FreshKey:
        key = b"%032d" % next(self._serial)
        if scheme is SignatureScheme.V1:
            return FreshKey(key=SigningKey(sealed=key), secret=Secret(key=key).text)
        public_key = PrivateKey(key).public.text
        return FreshKey(key=SigningKey(sealed=b"v1a" + key, public_key=public_key), secret=None)

    def open(self, sealed: bytes, *, of: WebhookId) -> Signer:
        if not sealed:
            raise RdevError(ErrorCode.INTERNAL_ERROR, f"the secret of {of} is another's")
        if sealed.startswith(b"v1a"):
            return PrivateKey(sealed.removeprefix(b"v1a"))
        return Secret(key=sealed)


@dataclass(slots=True, kw_only=True)
class HookState:
    """What both ports share. `entries`: action and target of what is in the audit log."""

    webhooks: dict[WebhookId, Webhook] = field(default_factory=dict)
    sealed: dict[WebhookId, list[bytes]] = field(default_factory=dict)
    deliveries: dict[DeliveryId, Delivery] = field(default_factory=dict)
    payloads: dict[DeliveryId, bytes] = field(default_factory=dict)
    attempts: dict[DeliveryId, list[DeliveryAttempt]] = field(default_factory=dict)
    keys: KeptKeys = field(default_factory=KeptKeys)
    entries: list[tuple[str, str]] = field(default_factory=list)
    serial: "count[int]" = field(default_factory=lambda: count(1))
    aged_s: float = 0.0

    @property
    def now(self) -> datetime:
        """Another one each time, as the database's is."""
        moved_s = EPOCH_S + self.aged_s + trio.current_time() + next(self.serial) / 1e6
        return datetime.fromtimestamp(moved_s, UTC)

    def owe(
        self, webhook: WebhookId, type_: str, *, project: ProjectId | None, payload: bytes = b"{}"
    ) -> DeliveryId:
        """Another delivery, pending."""
        now = self.now
        # As a UUIDv7: its milliseconds first.
        serial = int(now.timestamp() * 1000) << 80 | 7 << 76 | next(self.serial)
        made = delivery_id(UUID(int=serial))
        self.deliveries[made] = Delivery(
            id=made,
            webhook=webhook,
            event=f"evt_{serial:032x}",
            type=type_,
            project=project,
            status=DeliveryStatus.PENDING,
            reason=None,
            attempts=0,
            due=now,
            created_at=now,
            finished_at=None,
        )
        self.payloads[made] = payload
        self.attempts[made] = []
        return made

    def end(
        self, delivery: DeliveryId, status: DeliveryStatus, reason: DeadReason | None = None
    ) -> None:
        """It was accepted, or is dead."""
        self.deliveries[delivery] = replace(
            self.deliveries[delivery], status=status, reason=reason, due=None, finished_at=self.now
        )

    def disable(self, webhook: WebhookId, reason: DisabledReason) -> None:
        """As the dispatcher does."""
        found = self.webhooks[webhook]
        self.webhooks[webhook] = replace(
            found, is_enabled=False, disabled_reason=reason, disabled_at=self.now
        )

    def age(self, seconds: float) -> None:
        """Let so much time go by."""
        self.aged_s += seconds
        self.keys.age(seconds)

    def shown(self, webhook: WebhookId) -> Webhook | None:
        """As it is now: of a key that is over nothing."""
        found = self.webhooks.get(webhook)
        if found is None or found.previous_until is None or found.previous_until > self.now:
            return found
        return replace(found, previous_until=None, previous_public_key=None)

    def turn(self, webhook: WebhookId, key: SigningKey, grace_s: float) -> None:
        """Another key signs, and the one before for a while."""
        found, now = self.webhooks[webhook], self.now
        self.sealed[webhook] = [key.sealed, self.sealed[webhook][0]]
        self.webhooks[webhook] = replace(
            found,
            public_key=key.public_key,
            previous_public_key=found.public_key,
            previous_until=now + timedelta(seconds=grace_s),
            updated_at=now,
        )


class FakeWebhooks:
    """The `WebhookStore` port."""

    def __init__(self, state: HookState) -> None:
        self._state = state

    async def insert(self, new: NewWebhook, actor: Actor) -> WebhookMade:
        await trio.lowlevel.checkpoint()
        if (earlier := self._replayed(new.idempotency)) is not None:
            return earlier
        if len(self._state.webhooks) >= WEBHOOKS_MAX:
            message = f"there are {WEBHOOKS_MAX} webhooks already"
            raise RdevError(ErrorCode.TOO_MANY_REQUESTS, message, retry_after_s=_FULL_RETRY_S)
        now = self._state.now
        made = Webhook(
            id=new.id,
            url=new.url,
            description=new.description,
            events=new.events,
            project_ids=new.project_ids,
            is_ordered=new.is_ordered,
            owner=new.owner,
            is_enabled=new.is_enabled,
            disabled_reason=None if new.is_enabled else DisabledReason.REQUESTED,
            disabled_at=None if new.is_enabled else now,
            failing_since=None,
            overflowed=0,
            created_at=now,
            updated_at=now,
            previous_until=None,
            public_key=new.key.public_key,
        )
        self._state.webhooks[new.id] = made
        self._state.sealed[new.id] = [new.key.sealed]
        self._did(Action.WEBHOOK_CREATED, new.id, new.idempotency)
        return WebhookMade(webhook=made)

    async def get(self, webhook: WebhookId) -> Webhook | None:
        await trio.lowlevel.checkpoint()
        return self._state.shown(webhook)

    async def list_all(
        self, *, within: Collection[ProjectId] | None, before: WebhookId | None, limit: int
    ) -> list[Webhook]:
        await trio.lowlevel.checkpoint()
        found = [
            one
            for one in self._state.webhooks.values()
            if (before is None or one.id < before)
            and (within is None or (one.project_ids is not None and one.project_ids <= set(within)))
        ]
        return sorted(found, key=lambda one: one.id, reverse=True)[:limit]

    async def change(
        self, webhook: WebhookId, change: WebhookChange, actor: Actor
    ) -> Webhook | None:
        await trio.lowlevel.checkpoint()
        found = self._state.webhooks.get(webhook)
        seen = (change.seen_at, change.was_enabled)
        if found is None or (found.updated_at, found.is_enabled) != seen:
            return None
        now = self._state.now
        reason = None if change.is_enabled else found.disabled_reason or DisabledReason.REQUESTED
        begins_anew = change.is_enabled and not found.is_enabled
        self._state.webhooks[webhook] = replace(
            found,
            url=change.url,
            description=change.description,
            events=change.events,
            project_ids=change.project_ids,
            is_ordered=change.is_ordered,
            owner=change.owner or found.owner,
            is_enabled=change.is_enabled,
            disabled_reason=reason,
            disabled_at=None if change.is_enabled else found.disabled_at or now,
            failing_since=None if begins_anew else found.failing_since,
            updated_at=now,
        )
        if change.key is not None:
            self._state.turn(webhook, change.key, ROTATION_GRACE_S)
        self._did(Action.WEBHOOK_CHANGED, webhook)
        return self._state.shown(webhook)

    async def rotate(self, rotation: SecretRotation, actor: Actor) -> WebhookMade | None:
        await trio.lowlevel.checkpoint()
        if (earlier := self._replayed(rotation.idempotency)) is not None:
            return earlier
        if rotation.webhook not in self._state.webhooks:
            return None
        self._state.turn(rotation.webhook, rotation.key, rotation.grace_s)
        self._did(Action.WEBHOOK_ROTATED, rotation.webhook, rotation.idempotency)
        made = self._state.shown(rotation.webhook)
        assert made is not None
        return WebhookMade(webhook=made)

    async def delete(self, webhook: WebhookId, actor: Actor) -> bool:
        await trio.lowlevel.checkpoint()
        if self._state.webhooks.pop(webhook, None) is None:
            return False
        self._did(Action.WEBHOOK_DELETED, webhook)
        return True

    def _replayed(self, idempotency: Idempotency | None) -> WebhookMade | None:
        made = None if idempotency is None else self._state.keys.find(idempotency)
        if made is None:
            return None
        found = self._state.shown(WebhookId(made))
        if found is None:
            message = "what this Idempotency-Key stood for has been deleted"
            raise RdevError(ErrorCode.GONE, message)
        return WebhookMade(webhook=found, is_replay=True)

    def _did(
        self, action: Action, webhook: WebhookId, idempotency: Idempotency | None = None
    ) -> None:
        self._state.entries.append((action, webhook))
        if idempotency is not None:
            self._state.keys.keep(idempotency, webhook)


class FakeDeliveryLog:
    """The `DeliveryLog` port."""

    def __init__(self, state: HookState) -> None:
        self._state = state

    async def list_of(
        self,
        webhook: WebhookId,
        *,
        within: Collection[ProjectId] | None,
        status: DeliveryStatus | None,
        before: DeliveryId | None,
        limit: int,
    ) -> list[Delivery]:
        await trio.lowlevel.checkpoint()
        found = [
            one
            for one in self._state.deliveries.values()
            if one.webhook == webhook
            and status in (None, one.status)
            and (before is None or one.id < before)
            and (within is None or one.project is None or one.project in within)
        ]
        return sorted(found, key=lambda one: one.id, reverse=True)[:limit]

    async def get(self, delivery: DeliveryId) -> Delivery | None:
        await trio.lowlevel.checkpoint()
        return self._state.deliveries.get(delivery)

    async def payload(self, delivery: DeliveryId) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return self._state.payloads.get(delivery)

    async def attempts(self, delivery: DeliveryId) -> list[DeliveryAttempt]:
        await trio.lowlevel.checkpoint()
        return self._state.attempts.get(delivery, [])

    async def redeliver(self, delivery: DeliveryId, actor: Actor) -> bool:
        await trio.lowlevel.checkpoint()
        if delivery not in self._state.deliveries:
            return False
        self._again(delivery)
        self._state.entries.append((Action.WEBHOOK_REDELIVERED, delivery))
        return True

    async def redeliver_since(self, wanted: Redelivery, actor: Actor, *, limit: int) -> int:
        await trio.lowlevel.checkpoint()
        since = wanted.since.replace(microsecond=wanted.since.microsecond // 1000 * 1000)
        chosen = [
            one.id
            for one in self._state.deliveries.values()
            if one.webhook == wanted.webhook
            and one.created_at >= since
            and one.status is not DeliveryStatus.PENDING
            and wanted.status in (None, one.status)
            and (wanted.within is None or one.project is None or one.project in wanted.within)
        ]
        chosen = sorted(chosen)[:limit]
        for delivery in chosen:
            self._again(delivery)
        if chosen:
            self._state.entries.append((Action.WEBHOOK_REDELIVERED, wanted.webhook))
        return len(chosen)

    async def ping(
        self,
        webhook: WebhookId,
        data: Mapping[str, str],
        actor: Actor,
        *,
        idempotency: Idempotency | None,
    ) -> PingMade | None:
        await trio.lowlevel.checkpoint()
        earlier = None if idempotency is None else self._state.keys.find(idempotency)
        if earlier is not None and is_delivery_id(earlier):
            return PingMade(delivery=DeliveryId(earlier), is_replay=True)
        found = self._state.webhooks.get(webhook)
        if found is None or not found.is_enabled:
            return None
        made = self._state.owe(webhook, EventType.PING, project=None)
        if idempotency is not None:
            self._state.keys.keep(idempotency, made)
        self._state.entries.append((Action.WEBHOOK_TESTED, webhook))
        return PingMade(delivery=made)

    def _again(self, delivery: DeliveryId) -> None:
        self._state.deliveries[delivery] = replace(
            self._state.deliveries[delivery],
            status=DeliveryStatus.PENDING,
            reason=None,
            finished_at=None,
            due=self._state.now,
        )
