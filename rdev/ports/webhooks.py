"""What webhooks need: somebody who sends, somebody who keeps secrets, and the store of endpoints.

All stamps of the store are the database's. What is claimed and settled is `ports/deliveries.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rdev.domain.audit import Actor
from rdev.domain.deliveries import (
    Delivery,
    DeliveryAttempt,
    DeliveryId,
    DeliveryStatus,
    Redelivery,
)
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.sending import Outcome, OutgoingRequest
from rdev.domain.signing import SignatureScheme, Signer
from rdev.domain.webhooks import (
    NewWebhook,
    SecretRotation,
    SigningKey,
    Webhook,
    WebhookChange,
    WebhookId,
)


class WebhookSender(Protocol):
    """Sends one request at a time for each caller; any number of callers."""

    async def send(self, request: OutgoingRequest) -> Outcome:
        """POST once and tell what came of it.

        The receiver's name is resolved and every address judged before one of them is dialled;
        nothing inside is ever connected to. No redirect is followed, no proxy used, no cookie kept,
        nothing decompressed. A connection that was kept open and turns out to be dead is replaced
        once; the receiver may so see a request twice, with the same `webhook-id`.
        Errors: none of the receiver's doing; what goes wrong is in the outcome.
        Cancellation: the connection is closed; the receiver may or may not have taken the request.
        Blocks: on the network, at most for the sender's total time.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshKey:
    """A key that was just made: as it is stored, and (of scheme v1 alone) the secret's text, which
    its receiver needs and nobody is shown again."""

    key: SigningKey
    secret: str | None = field(repr=False)


class SecretBox(Protocol):
    """Makes the keys of endpoints, and keeps them so that the database alone gives none away."""

    def make(self, scheme: SignatureScheme, *, of: WebhookId) -> FreshKey:
        """A key like no other. `of` names whose it is; it opens for nobody else. What signs v1a
        leaves this place sealed only."""
        ...

    def open(self, sealed: bytes, *, of: WebhookId) -> Signer:
        """What signs, by the scheme it was made for, whatever else is stored. Errors:
        INTERNAL_ERROR for what another server's secret sealed, or for another endpoint."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookMade:
    """What the store made of a request, or (`is_replay`) of an earlier one with the same
    idempotency key, as it is now."""

    webhook: Webhook
    is_replay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PingMade:
    """A delivery that was asked for, now or (`is_replay`) earlier with the same idempotency key."""

    delivery: DeliveryId
    is_replay: bool = False


class WebhookStore(Protocol):
    """Endpoints. What changes one enters it in the audit log, in the same transaction; a replay
    enters nothing. Errors of all: SERVICE_UNAVAILABLE."""

    async def insert(self, new: NewWebhook, actor: Actor) -> WebhookMade:
        """Store an endpoint and its idempotency key, in one transaction.

        Errors: TOO_MANY_REQUESTS where there are `WEBHOOKS_MAX`; IDEMPOTENCY_MISMATCH; CONFLICT,
        with a delay, when another request with this idempotency key took longer than 2 s.
        """
        ...

    async def get(self, webhook: WebhookId) -> Webhook | None:
        """The endpoint as it is now, or None."""
        ...

    async def list_all(
        self, *, within: Collection[ProjectId] | None, before: WebhookId | None, limit: int
    ) -> list[Webhook]:
        """Endpoints, newest first, those older than `before`, at most `limit`; with `within` only
        those that are limited to some of these projects."""
        ...

    async def change(
        self, webhook: WebhookId, change: WebhookChange, actor: Actor
    ) -> Webhook | None:
        """Store what becomes of it, as it is then; None: there is none, or it is not what was seen
        any more. Being enabled begins anew: what was pending is due, past failures are forgotten.
        Another key is a rotation.
        """
        ...

    async def rotate(self, rotation: SecretRotation, actor: Actor) -> WebhookMade | None:
        """Give it another key; the one before goes on signing beside it for `grace_s`, one
        before that ends now. None: there is none. Errors: those of `insert`."""
        ...

    async def delete(self, webhook: WebhookId, actor: Actor) -> bool:
        """End it for ever with all that is pending; False: there is none."""
        ...


class DeliveryLog(Protocol):
    """What was owed, sent and answered. What is asked for again is entered in the audit log, in the
    same transaction. Errors of all: SERVICE_UNAVAILABLE."""

    async def list_of(
        self,
        webhook: WebhookId,
        *,
        within: Collection[ProjectId] | None,
        status: DeliveryStatus | None,
        before: DeliveryId | None,
        limit: int,
    ) -> list[Delivery]:
        """Deliveries of an endpoint, newest first, those older than `before`, at most `limit`; with
        `within` only those of these projects and of none."""
        ...

    async def get(self, delivery: DeliveryId) -> Delivery | None:
        """The delivery as it is now, or None; also of an endpoint that was deleted."""
        ...

    async def payload(self, delivery: DeliveryId) -> bytes | None:
        """What its attempts send."""
        ...

    async def attempts(self, delivery: DeliveryId) -> list[DeliveryAttempt]:
        """Its attempts, oldest first."""
        ...

    async def redeliver(self, delivery: DeliveryId, actor: Actor) -> bool:
        """Send it again from the start of the schedule, under the same event id; one that is
        pending is due now. False: there is none."""
        ...

    async def redeliver_since(self, wanted: Redelivery, actor: Actor, *, limit: int) -> int:
        """The same for many, the oldest first, at most `limit`; returns how many."""
        ...

    async def ping(
        self,
        webhook: WebhookId,
        data: Mapping[str, str],
        actor: Actor,
        *,
        idempotency: Idempotency | None,
    ) -> PingMade | None:
        """Owe a `ping` to an enabled endpoint; None: there is none, or it is disabled. What the
        idempotency key stands for already is told whatever has become of the endpoint.
        Errors: IDEMPOTENCY_MISMATCH; CONFLICT as those of `WebhookStore.insert`."""
        ...
