"""Routes of webhook endpoints and their deliveries."""

import base64

from quart import Blueprint, Response, request

from rdev.adapters.http.envelope import accepted, created, no_content, read_json, success
from rdev.adapters.http.exchange import actor, principal
from rdev.adapters.http.idempotency import idempotency_of, replay_headers
from rdev.adapters.http.query import choice_of, cursor_of, limit_of
from rdev.domain.deliveries import (
    Delivery,
    DeliveryAttempt,
    DeliveryId,
    DeliveryStatus,
    is_delivery_id,
)
from rdev.domain.webhook_requests import (
    parse_nothing,
    parse_redeliver,
    parse_rotation,
    parse_webhook,
    parse_webhook_change,
)
from rdev.domain.webhooks import Webhook, WebhookId, is_webhook_id
from rdev.services.webhooks import DeliveryDetail, ShownWebhook, Webhooks


def webhook_routes(webhooks: Webhooks) -> Blueprint:
    """`/webhooks`. A secret is in the answer that made it and in no other."""
    routes = Blueprint("webhooks", __name__)

    @routes.post("/webhooks")
    async def create_webhook() -> Response:
        body = await read_json()
        wanted = parse_webhook(body)
        made = await webhooks.create(principal(), wanted, actor(), idempotency=idempotency_of(body))
        return _once(made)

    @routes.get("/webhooks")
    async def list_webhooks() -> Response:
        limit = limit_of()
        cursor = cursor_of(is_webhook_id)
        before = WebhookId(cursor) if cursor else None
        found = await webhooks.list_all(principal(), before=before, limit=limit + 1)
        more = found[limit - 1].id if len(found) > limit else None
        return success([_shown(one) for one in found[:limit]], next_cursor=more)

    @routes.get("/webhooks/<webhook>")
    async def get_webhook(webhook: str) -> Response:
        return success(_shown(await webhooks.get(principal(), webhook)))

    @routes.patch("/webhooks/<webhook>")
    async def change_webhook(webhook: str) -> Response:
        wanted = parse_webhook_change(await read_json())
        made = await webhooks.change(principal(), webhook, wanted, actor())
        return success(_shown(made.webhook) | {"secret": made.secret})

    @routes.delete("/webhooks/<webhook>")
    async def delete_webhook(webhook: str) -> Response:
        await webhooks.delete(principal(), webhook, actor())
        return no_content()

    @routes.post("/webhooks/<webhook>/rotate-secret")
    async def rotate_secret(webhook: str) -> Response:
        body = await _optional_json()
        made = await webhooks.rotate(
            principal(),
            webhook,
            actor(),
            grace_s=parse_rotation(body),
            idempotency=idempotency_of(body),
        )
        return _once(made)

    @routes.post("/webhooks/<webhook>/test")
    async def test_webhook(webhook: str) -> Response:
        body = await _optional_json()
        parse_nothing(body)
        made = await webhooks.test(principal(), webhook, actor(), idempotency=idempotency_of(body))
        headers = {
            "Location": f"/deliveries/{made.delivery}",
            **replay_headers(is_replay=made.is_replay),
        }
        return accepted({"delivery_id": made.delivery}, headers=headers)

    return routes


def delivery_routes(webhooks: Webhooks) -> Blueprint:
    """`/webhooks/{webhook}/deliveries`, `/deliveries`, and asking for them again."""
    routes = Blueprint("deliveries", __name__)

    @routes.get("/webhooks/<webhook>/deliveries")
    async def list_deliveries(webhook: str) -> Response:
        limit = limit_of()
        cursor = cursor_of(is_delivery_id)
        found = await webhooks.deliveries(
            principal(),
            webhook,
            status=choice_of("status", DeliveryStatus),
            before=DeliveryId(cursor) if cursor else None,
            limit=limit + 1,
        )
        more = found[limit - 1].id if len(found) > limit else None
        return success([_shown_delivery(one) for one in found[:limit]], next_cursor=more)

    @routes.post("/webhooks/<webhook>/redeliver")
    async def redeliver_range(webhook: str) -> Response:
        wanted = parse_redeliver(await read_json())
        count = await webhooks.redeliver_since(principal(), webhook, wanted, actor())
        return accepted({"redelivered": count})

    @routes.get("/deliveries/<delivery>")
    async def get_delivery(delivery: str) -> Response:
        return success(_shown_detail(await webhooks.delivery(principal(), delivery)))

    @routes.post("/deliveries/<delivery>/redeliver")
    async def redeliver(delivery: str) -> Response:
        parse_nothing(await _optional_json())
        return accepted(_shown_delivery(await webhooks.redeliver(principal(), delivery, actor())))

    return routes


async def _optional_json() -> dict[str, object]:
    """The body of a POST in which nothing is required."""
    return await read_json() if request.mimetype or request.content_length else {}


def _once(made: ShownWebhook) -> Response:
    """An endpoint with its secret; null in a replay, and with scheme v1a."""
    return created(
        _shown(made.webhook) | {"secret": made.secret},
        location=f"/webhooks/{made.webhook.id}",
        headers=replay_headers(is_replay=made.is_replay),
    )


def _shown(webhook: Webhook) -> dict[str, object]:
    """An endpoint as clients see it."""
    projects = webhook.project_ids
    return {
        "id": webhook.id,
        "url": webhook.url,
        "description": webhook.description,
        "events": webhook.events,
        "project_ids": None if projects is None else sorted(projects),
        "ordered": webhook.is_ordered,
        "enabled": webhook.is_enabled,
        "disabled_reason": webhook.disabled_reason,
        "disabled_at": webhook.disabled_at,
        "failing_since": webhook.failing_since,
        "overflowed": webhook.overflowed,
        "signature_scheme": webhook.scheme,
        "public_key": webhook.public_key,
        "previous_public_key": webhook.previous_public_key,
        "previous_secret_until": webhook.previous_until,
        "key_id": webhook.owner,
        "created_at": webhook.created_at,
        "updated_at": webhook.updated_at,
    }


def _shown_delivery(delivery: Delivery) -> dict[str, object]:
    """A delivery as clients see it."""
    return {
        "id": delivery.id,
        "webhook_id": delivery.webhook,
        "event_id": delivery.event,
        "type": delivery.type,
        "project": delivery.project,
        "status": delivery.status,
        "reason": delivery.reason,
        "attempt": delivery.attempts,
        "next_attempt_at": delivery.due,
        "created_at": delivery.created_at,
        "finished_at": delivery.finished_at,
    }


def _shown_detail(detail: DeliveryDetail) -> dict[str, object]:
    payload = None if detail.payload is None else detail.payload.decode()
    return _shown_delivery(detail.delivery) | {
        "payload": payload,
        "attempts": [_shown_attempt(one) for one in detail.attempts],
    }


def _shown_attempt(attempt: DeliveryAttempt) -> dict[str, object]:
    """An attempt as clients see it: of the answer's body its text, or base64 of what is none."""
    try:
        body = {"response_body": attempt.body.decode()}
    except UnicodeDecodeError:
        body = {"response_base64": base64.b64encode(attempt.body).decode()}
    return {
        "number": attempt.number,
        "at": attempt.at,
        "status": attempt.status,
        "fault": attempt.fault,
        "detail": attempt.detail,
        "latency_ms": attempt.latency_ms,
        "http_version": attempt.http_version,
        "request_headers": dict(attempt.request_headers),
        "response_truncated": attempt.truncated,
        **body,
    }
