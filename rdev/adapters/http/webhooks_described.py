"""How the routes of webhooks are described; see `describe.py`."""

from typing import Final

from rdev.adapters.http.describe import Answer, Described, Description, Parameter
from rdev.adapters.http.query import PAGE
from rdev.adapters.http.schemas import (
    COUNT,
    FLAG,
    MOMENT,
    PROJECT_ID,
    TEXT,
    an_id,
    by_name,
    maybe,
    one_of,
    record,
    several,
)
from rdev.domain.deliveries import DeadReason, DeliveryStatus
from rdev.domain.errors import ErrorCode
from rdev.domain.signing import SignatureScheme
from rdev.domain.webhook_requests import (
    parse_nothing,
    parse_redeliver,
    parse_rotation,
    parse_webhook,
    parse_webhook_change,
)
from rdev.domain.webhooks import DisabledReason, EventType

_MEMBERS: Final = {
    "id": an_id("whk_"),
    "url": TEXT,
    "description": TEXT,
    "events": several(one_of(EventType)),
    "project_ids": {"type": ["array", "null"], "items": PROJECT_ID},
    "ordered": FLAG,
    "enabled": FLAG,
    "disabled_reason": maybe(one_of(DisabledReason)),
    "disabled_at": maybe(MOMENT),
    "failing_since": maybe(MOMENT),
    "overflowed": COUNT,
    "signature_scheme": one_of(SignatureScheme),
    "public_key": maybe(TEXT),
    "previous_public_key": maybe(TEXT),
    "previous_secret_until": maybe(MOMENT),
    "key_id": TEXT,
    "created_at": MOMENT,
    "updated_at": MOMENT,
}
_WEBHOOK: Final = record(_MEMBERS)
_DELIVERY_MEMBERS: Final = {
    "id": an_id("dlv_"),
    "webhook_id": an_id("whk_"),
    "event_id": an_id("evt_"),
    "type": one_of(EventType),
    "project": maybe(PROJECT_ID),
    "status": one_of(DeliveryStatus),
    "reason": maybe(one_of(DeadReason)),
    "attempt": COUNT,
    "next_attempt_at": maybe(MOMENT),
    "created_at": MOMENT,
    "finished_at": maybe(MOMENT),
}
_DELIVERY: Final = record(_DELIVERY_MEMBERS)
_ATTEMPT: Final = record(
    {
        "number": COUNT,
        "at": MOMENT,
        "status": maybe(COUNT),
        "fault": maybe(TEXT),
        "detail": TEXT,
        "latency_ms": maybe(COUNT),
        "http_version": maybe(TEXT),
        "request_headers": by_name(TEXT),
        "response_truncated": FLAG,
        "response_body": TEXT,
        "response_base64": TEXT,
    },
    optional=["response_body", "response_base64"],
)
_DETAIL: Final = record(
    {**_DELIVERY_MEMBERS, "payload": maybe(TEXT), "attempts": several(_ATTEMPT)}
)
_WITH_SECRET: Final = record({**_MEMBERS, "secret": maybe(TEXT)})
_SHOWN_ONCE: Final = Answer(
    about="made; `secret` is shown here once, null with `v1a`",
    schema=_WITH_SECRET,
    headers=("Location", "Idempotent-Replayed"),
)
_STATUS: Final = Parameter(
    name="status", about="only those that stand there", schema=one_of(DeliveryStatus)
)

DESCRIBED: Described = {
    ("POST", "/webhooks"): Description(
        summary="Tell a URL what happens",
        tag="webhooks",
        about="The endpoint speaks for the key: it is told what the key may see.",
        body=parse_webhook,
        example={"url": "https://hooks.example.com/rdev", "events": ["command.failed"]},
        answers={201: _SHOWN_ONCE},
        errors=(ErrorCode.CONFLICT, ErrorCode.GONE),
        is_idempotent=True,
    ),
    ("GET", "/webhooks"): Description(
        summary="The endpoints that the key sees",
        tag="webhooks",
        parameters=PAGE,
        answers={200: Answer(about="a page, newest first", schema=_WEBHOOK, is_page=True)},
    ),
    ("GET", "/webhooks/{webhook}"): Description(
        summary="One endpoint",
        tag="webhooks",
        answers={200: Answer(about="the endpoint", schema=_WEBHOOK)},
    ),
    ("PATCH", "/webhooks/{webhook}"): Description(
        summary="Change an endpoint",
        tag="webhooks",
        about="Who enables it, or changes its URL, events or projects, is who it speaks for."
        " Another `signature_scheme` is a rotation: the key before signs for a day more.",
        body=parse_webhook_change,
        example={"enabled": True},
        answers={
            200: Answer(
                about="the endpoint; `secret` where it now signs with `v1`", schema=_WITH_SECRET
            )
        },
        errors=(ErrorCode.CONFLICT,),
    ),
    ("DELETE", "/webhooks/{webhook}"): Description(
        summary="End an endpoint", tag="webhooks", answers={204: Answer(about="it is gone")}
    ),
    ("POST", "/webhooks/{webhook}/rotate-secret"): Description(
        summary="Give an endpoint another secret, or pair of keys",
        tag="webhooks",
        about="Of the same scheme; both sign until the grace is over.",
        body=parse_rotation,
        example={"grace_s": 3600},
        answers={201: _SHOWN_ONCE},
        errors=(ErrorCode.CONFLICT, ErrorCode.GONE),
        is_idempotent=True,
    ),
    ("POST", "/webhooks/{webhook}/test"): Description(
        summary="Send an endpoint a ping",
        tag="webhooks",
        body=parse_nothing,
        example={},
        answers={
            202: Answer(
                about="it is owed",
                schema=record({"delivery_id": an_id("dlv_")}),
                headers=("Location", "Idempotent-Replayed"),
            )
        },
        errors=(ErrorCode.CONFLICT,),
        is_idempotent=True,
    ),
    ("GET", "/webhooks/{webhook}/deliveries"): Description(
        summary="What was owed to an endpoint",
        tag="webhooks",
        parameters=(_STATUS, *PAGE),
        answers={200: Answer(about="a page, newest first", schema=_DELIVERY, is_page=True)},
    ),
    ("POST", "/webhooks/{webhook}/redeliver"): Description(
        summary="Send many deliveries again",
        tag="webhooks",
        about="The oldest 10,000 since then; the dead, unless another status is asked for.",
        body=parse_redeliver,
        example={"since": "2026-01-15T10:30:00Z", "status": "dead"},
        answers={202: Answer(about="how many", schema=record({"redelivered": COUNT}))},
        errors=(ErrorCode.CONFLICT,),
    ),
    ("GET", "/deliveries/{delivery}"): Description(
        summary="One delivery with its attempts",
        tag="webhooks",
        answers={200: Answer(about="the delivery", schema=_DETAIL)},
    ),
    ("POST", "/deliveries/{delivery}/redeliver"): Description(
        summary="Send a delivery again",
        tag="webhooks",
        about="Under the same event id, from the start of the schedule.",
        body=parse_nothing,
        example={},
        answers={202: Answer(about="the delivery", schema=_DELIVERY)},
        errors=(ErrorCode.CONFLICT,),
    ),
}
