"""The bodies of the webhook routes."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from rdev.domain.deliveries import DeliveryStatus
from rdev.domain.fields import Fields, Json
from rdev.domain.ids import PROJECT_PATTERN, ProjectId
from rdev.domain.signing import SignatureScheme
from rdev.domain.webhook_targets import URL_CHARACTERS_MAX
from rdev.domain.webhooks import ROTATION_GRACE_S, EventType

DESCRIPTION_MAX_BYTES = 500
PROJECTS_MAX = 200
GRACE_MAX_S = 7 * 86_400
# Stands for every type there is, also those that come later.
ALL_EVENTS: Final = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookRequest:
    """What a client says of an endpoint; None where nothing was said. `names_projects`: it said
    something of projects, if only that they are all (null)."""

    url: str | None
    events: tuple[EventType, ...] | None
    project_ids: frozenset[ProjectId] | None
    names_projects: bool
    description: str | None
    is_enabled: bool | None
    is_ordered: bool | None
    scheme: SignatureScheme | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliverRequest:
    """From when on, and which; status None: all that are no longer pending."""

    since: datetime
    status: DeliveryStatus | None


def parse_webhook(body: Json) -> WebhookRequest:
    """`POST /webhooks`: with a URL and events. Errors: BAD_REQUEST, all faults. Whether the URL is
    one that may be sent to is another's question."""
    return _webhook(body, is_new=True)


def parse_webhook_change(body: Json) -> WebhookRequest:
    """`PATCH /webhooks/{id}`. Errors: BAD_REQUEST, all faults."""
    return _webhook(body, is_new=False)


def parse_rotation(body: Json) -> int:
    """`POST /webhooks/{id}/rotate-secret`: the grace in seconds. Errors: BAD_REQUEST."""
    fields = Fields(body)
    grace_s = fields.integer("grace_s", least=0, most=GRACE_MAX_S)
    fields.finish()
    return ROTATION_GRACE_S if grace_s is None else grace_s


def parse_nothing(body: Json) -> None:
    """A body in which nothing may stand. Errors: BAD_REQUEST."""
    Fields(body).finish()


def parse_redeliver(body: Json) -> RedeliverRequest:
    """`POST /webhooks/{id}/redeliver`; without a status the dead. Errors: BAD_REQUEST."""
    fields = Fields(body)
    text = fields.text("since", max_bytes=64, required=True, about="a time of RFC 3339")
    since = None if text is None else _moment(fields, "since", text)
    status = fields.choice("status", [DeliveryStatus.DEAD, DeliveryStatus.DELIVERED, "all"])
    fields.finish()
    assert since is not None, "finish raised for it"
    if status == "all":
        return RedeliverRequest(since=since, status=None)
    return RedeliverRequest(since=since, status=DeliveryStatus(status or DeliveryStatus.DEAD))


def _webhook(body: Json, *, is_new: bool) -> WebhookRequest:
    fields = Fields(body)
    description = fields.text("description", max_bytes=DESCRIPTION_MAX_BYTES)
    request = WebhookRequest(
        url=fields.text("url", max_bytes=URL_CHARACTERS_MAX, required=is_new),
        events=_events(fields, required=is_new),
        project_ids=_project_ids(fields),
        names_projects="project_ids" in body,
        description="" if "description" in body and description is None else description,
        is_enabled=fields.flag("enabled"),
        is_ordered=fields.flag("ordered", about="one at a time, in sequence"),
        scheme=_scheme(fields),
    )
    fields.finish()
    return request


def _events(fields: Fields, *, required: bool) -> tuple[EventType, ...] | None:
    found = fields.texts(
        "events",
        max_items=100,
        max_bytes=100,
        min_items=1,
        required=required,
        choices=[ALL_EVENTS, *EventType],
        about=f"{ALL_EVENTS} is every type there is now",
    )
    if found is None:
        return None
    return tuple(event for event in EventType if event in found or ALL_EVENTS in found)


def _scheme(fields: Fields) -> SignatureScheme | None:
    found = fields.choice(
        "signature_scheme",
        list(SignatureScheme),
        about="`v1` with a secret of both sides (the default), `v1a` with a public key",
    )
    return None if found is None else SignatureScheme(found)


def _project_ids(fields: Fields) -> frozenset[ProjectId] | None:
    found = fields.texts(
        "project_ids",
        max_items=PROJECTS_MAX,
        max_bytes=40,
        min_items=1,
        pattern=PROJECT_PATTERN,
        mismatch="is no project id",
        about="null is all that the key sees",
    )
    return None if found is None else frozenset(ProjectId(name) for name in found)


def _moment(fields: Fields, name: str, text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        fields.fault(name, "must be a time of RFC 3339, as 2026-01-15T10:30:00Z")
        return None
    if found.tzinfo is None:
        fields.fault(name, "must name its time zone, as 2026-01-15T10:30:00Z")
        return None
    try:
        return found.astimezone(UTC)
    except OverflowError:
        fields.fault(name, "is out of range")
        return None
