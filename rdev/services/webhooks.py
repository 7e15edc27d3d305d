"""Webhook endpoints and the log of their deliveries: making, changing, asking again.

A key sees an endpoint when it sees all of its projects. Whoever makes or enables one becomes its
owner, and it is told what that key may see. Every change is told to the dispatcher here and to the
other servers. Secrets are shown once, and sealed before they reach the store.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from rdev.domain.audit import Actor
from rdev.domain.deliveries import (
    REDELIVER_MAX,
    Delivery,
    DeliveryAttempt,
    DeliveryId,
    DeliveryStatus,
    Redelivery,
    is_delivery_id,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import NewUuid
from rdev.domain.keys import Principal
from rdev.domain.signing import SignatureScheme
from rdev.domain.webhook_requests import RedeliverRequest, WebhookRequest
from rdev.domain.webhook_targets import TargetRules, parse_target
from rdev.domain.webhooks import (
    NewWebhook,
    SecretRotation,
    Webhook,
    WebhookChange,
    WebhookId,
    is_visible,
    is_webhook_id,
    may_read_commands,
    projects_for,
    webhook_id,
)
from rdev.ports.webhooks import (
    DeliveryLog,
    FreshKey,
    PingMade,
    SecretBox,
    WebhookMade,
    WebhookStore,
)
from rdev.services.shield import commit_shield

# So often a change is made anew, of what another one has made of the endpoint.
CHANGE_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownWebhook:
    """An endpoint that was made, changed or given a key. `secret` is the text of a fresh one of
    scheme v1, and None in a replay."""

    webhook: Webhook
    secret: str | None = field(repr=False)
    is_replay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryDetail:
    """A delivery with what is sent (None: not for who asks) and its attempts, oldest first."""

    delivery: Delivery
    payload: bytes | None
    attempts: list[DeliveryAttempt]


class Webhooks:
    """The use cases of webhooks."""

    def __init__(
        self,
        *,
        store: WebhookStore,
        log: DeliveryLog,
        box: SecretBox,
        rules: TargetRules,
        changed: Callable[[], None],
        new_uuid: NewUuid,
    ) -> None:
        """`changed` says here and to the other servers that endpoints or what is owed to them
        changed; it never waits."""
        self._store = store
        self._log = log
        self._box = box
        self._rules = rules
        self._changed = changed
        self._new_uuid = new_uuid

    async def create(
        self,
        by: Principal,
        request: WebhookRequest,
        actor: Actor,
        *,
        idempotency: Idempotency | None = None,
    ) -> ShownWebhook:
        """Make an endpoint; a secret of scheme v1 is in the answer and nowhere else.

        Errors: BAD_REQUEST for a URL that may not be sent to, as far as it alone tells; FORBIDDEN
        for projects that `by` does not see; NOT_FOUND in a replay where it is not `by`'s to see any
        more; those of `WebhookStore.insert`.
        """
        assert request.url is not None
        assert request.events is not None
        webhook = webhook_id(self._new_uuid())
        fresh = self._box.make(request.scheme or SignatureScheme.V1, of=webhook)
        new = NewWebhook(
            id=webhook,
            url=self._checked(request.url),
            description=request.description or "",
            events=request.events,
            project_ids=projects_for(by.grant, request.project_ids, request.events),
            is_ordered=bool(request.is_ordered),
            is_enabled=request.is_enabled is not False,
            owner=by.key_id,
            key=fresh.key,
            idempotency=idempotency,
        )
        with commit_shield():
            made = await self._store.insert(new, actor)
            self._changed()
        if not is_visible(by.grant, made.webhook.project_ids):
            raise _unknown("webhook", made.webhook.id)
        return _shown(made, fresh)

    async def get(self, by: Principal, webhook: str) -> Webhook:
        """The endpoint as it is now. Errors: NOT_FOUND, also for one that `by` does not see."""
        found = await self._store.get(WebhookId(webhook)) if is_webhook_id(webhook) else None
        if found is None or not is_visible(by.grant, found.project_ids):
            raise _unknown("webhook", webhook)
        return found

    async def list_all(
        self, by: Principal, *, before: WebhookId | None, limit: int
    ) -> list[Webhook]:
        """Endpoints that `by` sees, newest first."""
        return await self._store.list_all(within=by.project_ids, before=before, limit=limit)

    async def change(
        self, by: Principal, webhook: str, request: WebhookRequest, actor: Actor
    ) -> ShownWebhook:
        """Change what the request names. Who enables it, or changes where or of what it is told,
        becomes its owner. With another scheme it has a fresh key, and the one before signs beside
        it for a day.

        Errors: NOT_FOUND; those of `create`; CONFLICT where others change it again and again.
        """
        for _ in range(CHANGE_TRIES):
            found = await self.get(by, webhook)
            fresh = self._key_of(found, request.scheme)
            wanted = self._change_of(by, found, request, fresh)
            with commit_shield():
                changed = await self._store.change(found.id, wanted, actor)
                self._changed()
            if changed is not None:
                return ShownWebhook(webhook=changed, secret=None if fresh is None else fresh.secret)
        message = f"webhook {webhook!r} is being changed by others"
        raise RdevError(ErrorCode.CONFLICT, message, retry_after_s=1.0)

    def _key_of(self, found: Webhook, wanted: SignatureScheme | None) -> FreshKey | None:
        """A key, where it signs with another scheme so far."""
        if wanted is None or wanted is found.scheme:
            return None
        return self._box.make(wanted, of=found.id)

    def _change_of(
        self, by: Principal, found: Webhook, request: WebhookRequest, fresh: FreshKey | None
    ) -> WebhookChange:
        """What becomes of an endpoint as it was found. Errors: those of `create`."""
        is_enabled = found.is_enabled if request.is_enabled is None else request.is_enabled
        wanted = request.project_ids if request.names_projects else found.project_ids
        events = found.events if request.events is None else request.events
        is_adopted = (
            (is_enabled and not found.is_enabled)
            or request.url is not None
            or request.events is not None
            or request.names_projects
        )
        return WebhookChange(
            seen_at=found.updated_at,
            was_enabled=found.is_enabled,
            url=found.url if request.url is None else self._checked(request.url),
            description=found.description if request.description is None else request.description,
            events=events,
            project_ids=projects_for(by.grant, wanted, events) if is_adopted else wanted,
            is_ordered=found.is_ordered if request.is_ordered is None else request.is_ordered,
            is_enabled=is_enabled,
            owner=by.key_id if is_adopted else None,
            key=None if fresh is None else fresh.key,
        )

    async def delete(self, by: Principal, webhook: str, actor: Actor) -> None:
        """End it for ever. Errors: NOT_FOUND."""
        found = await self.get(by, webhook)
        with commit_shield():
            if not await self._store.delete(found.id, actor):
                raise _unknown("webhook", webhook)
            self._changed()

    async def rotate(
        self,
        by: Principal,
        webhook: str,
        actor: Actor,
        *,
        grace_s: int,
        idempotency: Idempotency | None = None,
    ) -> ShownWebhook:
        """Give it another key of its scheme; both sign for `grace_s`. Errors: NOT_FOUND; those of
        `WebhookStore.rotate`."""
        found = await self.get(by, webhook)
        fresh = self._box.make(found.scheme, of=found.id)
        rotation = SecretRotation(
            webhook=found.id,
            key=fresh.key,
            grace_s=grace_s,
            idempotency=idempotency,
        )
        made = await self._store.rotate(rotation, actor)
        if made is None:
            raise _unknown("webhook", webhook)
        return _shown(made, fresh)

    async def test(
        self,
        by: Principal,
        webhook: str,
        actor: Actor,
        *,
        idempotency: Idempotency | None = None,
    ) -> PingMade:
        """Send it a `ping`. Errors: NOT_FOUND; CONFLICT where it is disabled."""
        found = await self.get(by, webhook)
        with commit_shield():
            made = await self._log.ping(
                found.id, {"webhook_id": found.id}, actor, idempotency=idempotency
            )
            self._changed()
        if made is None:
            raise _disabled(found)
        return made

    async def deliveries(
        self,
        by: Principal,
        webhook: str,
        *,
        status: DeliveryStatus | None,
        before: DeliveryId | None,
        limit: int,
    ) -> list[Delivery]:
        """What was owed to it of projects that `by` sees, newest first. Errors: NOT_FOUND."""
        found = await self.get(by, webhook)
        return await self._log.list_of(
            found.id, within=by.project_ids, status=status, before=before, limit=limit
        )

    async def delivery(self, by: Principal, delivery: str) -> DeliveryDetail:
        """One delivery with its attempts, and what is sent where `by` may read commands. Errors:
        NOT_FOUND, also where `by` does not see its endpoint or its project."""
        found = await self._seen(by, delivery)
        is_shown = found.project is None or may_read_commands(by.grant)
        return DeliveryDetail(
            delivery=found,
            payload=await self._log.payload(found.id) if is_shown else None,
            attempts=await self._log.attempts(found.id),
        )

    async def redeliver(self, by: Principal, delivery: str, actor: Actor) -> Delivery:
        """Send it again, under the same event id. Errors: NOT_FOUND; CONFLICT where its endpoint is
        disabled."""
        found = await self._seen(by, delivery)
        self._check_enabled(await self.get(by, found.webhook))
        with commit_shield():
            if not await self._log.redeliver(found.id, actor):
                raise _unknown("delivery", delivery)
            self._changed()
        return await self._seen(by, delivery)

    async def redeliver_since(
        self, by: Principal, webhook: str, request: RedeliverRequest, actor: Actor
    ) -> int:
        """The same for many, the oldest `REDELIVER_MAX`; returns how many."""
        found = await self.get(by, webhook)
        self._check_enabled(found)
        wanted = Redelivery(
            webhook=found.id,
            within=by.project_ids,
            since=request.since,
            status=request.status,
        )
        with commit_shield():
            count = await self._log.redeliver_since(wanted, actor, limit=REDELIVER_MAX)
            self._changed()
        return count

    def _checked(self, url: str) -> str:
        """The URL in its one spelling. Errors: BAD_REQUEST."""
        target = parse_target(url)
        self._rules.check(target)
        return target.url

    def _check_enabled(self, webhook: Webhook) -> None:
        if not webhook.is_enabled:
            raise _disabled(webhook)

    async def _seen(self, by: Principal, delivery: str) -> Delivery:
        known = is_delivery_id(delivery)
        found = await self._log.get(DeliveryId(delivery)) if known else None
        webhook = None if found is None else await self._store.get(found.webhook)
        is_seen = webhook is not None and is_visible(by.grant, webhook.project_ids)
        if (
            found is None
            or not is_seen
            or not (found.project is None or by.grant.sees(found.project))
        ):
            raise _unknown("delivery", delivery)
        return found


def _shown(made: WebhookMade, fresh: FreshKey) -> ShownWebhook:
    """What was made with this key; a replay shows nothing of it."""
    secret = None if made.is_replay else fresh.secret
    return ShownWebhook(webhook=made.webhook, secret=secret, is_replay=made.is_replay)


def _unknown(what: str, name: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no {what} {name!r}")


def _disabled(webhook: Webhook) -> RdevError:
    message = f"webhook {webhook.id!r} is disabled ({webhook.disabled_reason}): enable it first"
    return RdevError(ErrorCode.CONFLICT, message)
