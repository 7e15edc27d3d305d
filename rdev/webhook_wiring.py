"""What webhooks are made of; a part of `wiring.py`. It opens and starts nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import uuid_utils.compat

from rdev.adapters.postgres.deliveries import PostgresDeliveries
from rdev.adapters.postgres.delivery_log import PostgresDeliveryLog
from rdev.adapters.postgres.notifier import Notifier
from rdev.adapters.postgres.pool import Pool
from rdev.adapters.postgres.webhooks import PostgresWebhooks
from rdev.adapters.webhooks.dialling import tls_context
from rdev.adapters.webhooks.sealing import AesGcmBox
from rdev.adapters.webhooks.sender import HttpWebhookSender
from rdev.config import Settings
from rdev.domain.backoff import Backoff
from rdev.domain.deliveries import parse_schedule
from rdev.identity import Identity
from rdev.ports.tracing import Tracing
from rdev.services.webhook_dispatcher import (
    DispatcherLimits,
    DispatcherTelemetry,
    WebhookDispatcher,
)
from rdev.services.webhooks import Webhooks

# A delivery's lease outlives its attempt by so much: for storing what came of it.
LEASE_MARGIN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookNeeds:
    """What the rest of the server lends. Deliveries have connections of their own."""

    requests: Pool
    deliveries: Pool
    notifier: Notifier
    telemetry: DispatcherTelemetry
    tracing: Tracing
    backoff: Callable[[], Backoff]
    now: Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookParts:
    """What was built."""

    dispatcher: WebhookDispatcher
    sender: HttpWebhookSender
    webhooks: Webhooks


def build_webhooks(settings: Settings, identity: Identity, needs: WebhookNeeds) -> WebhookParts:
    """Every part, and who needs whom."""
    box = AesGcmBox(identity.secret)
    sender = HttpWebhookSender(
        rules=settings.webhook_rules,
        tls=tls_context(settings.webhook_ca_file),
        connect_s=settings.webhook_connect_s,
        total_s=settings.webhook_total_s,
    )
    dispatcher = WebhookDispatcher(
        queue=PostgresDeliveries(
            pool=needs.deliveries, lease_s=settings.webhook_total_s + LEASE_MARGIN_S
        ),
        sender=sender,
        box=box,
        telemetry=needs.telemetry,
        tracing=needs.tracing,
        backoff=needs.backoff,
        now=needs.now,
        wake_replicas=needs.notifier.webhooks_changed,
        holder=identity.holder,
        limits=DispatcherLimits(
            in_flight_max=settings.webhook_in_flight_max,
            schedule_s=parse_schedule(settings.webhook_schedule),
            pending_max=settings.webhook_pending_max,
        ),
    )

    def changed() -> None:
        dispatcher.endpoints_changed()
        needs.notifier.webhooks_changed()

    webhooks = Webhooks(
        store=PostgresWebhooks(pool=needs.requests),
        log=PostgresDeliveryLog(pool=needs.requests),
        box=box,
        rules=settings.webhook_rules,
        changed=changed,
        new_uuid=uuid_utils.compat.uuid7,
    )
    return WebhookParts(dispatcher=dispatcher, sender=sender, webhooks=webhooks)
