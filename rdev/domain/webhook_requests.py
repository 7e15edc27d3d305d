"""The bodies of the webhook routes."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from rdev.domain.deliveries import DeliveryStatus
from rdev.domain.fields import Fields, Json
from rdev.domain.ids import ProjectId, is_project_id
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliverRequest:
    """From when on, and which; status None: all that are no longer pending."""

    since: datetime
    status: DeliveryStatus | None


def parse_webhook(body: Json, *, is_new: bool) -> WebhookRequest:
    """`POST /webhooks` (`is_new`: with a URL and events) or `PATCH /webhooks/{id}`.

    Errors: BAD_REQUEST, all faults. Whether the URL is one that may be sent to is another's
    question.
    """
    fields = Fields(body)
    request = WebhookRequest(
        url=fields.text("url", max_bytes=URL_CHARACTERS_MAX, required=is_new),
        events=_events(fields, required=is_new),
        project_ids=_project_ids(fields),
        names_projects="project_ids" in body,
        description=_description(fields, body),
        is_enabled=_flag(fields, body, "enabled"),
        is_ordered=_flag(fields, body, "ordered"),
    )
    fields.finish()
    return request


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
    text = fields.text("since", max_bytes=64, required=True)
    since = None if text is None else _moment(fields, "since", text)
    status = fields.choice("status", [DeliveryStatus.DEAD, DeliveryStatus.DELIVERED, "all"])
    fields.finish()
    assert since is not None, "finish raised for it"
    if status == "all":
        return RedeliverRequest(since=since, status=None)
    return RedeliverRequest(since=since, status=DeliveryStatus(status or DeliveryStatus.DEAD))


def _events(fields: Fields, *, required: bool) -> tuple[EventType, ...] | None:
    known: Collection[str] = [*EventType]
    found = fields.texts("events", max_items=100, max_bytes=100, required=required)
    if found is None:
        return None
    if not found:
        fields.fault("events", "must name at least one")
    for index, name in enumerate(found):
        if name not in known and name != ALL_EVENTS:
            message = f"must be {ALL_EVENTS} or one of {', '.join(known)}"
            fields.fault("events", message, within=str(index))
    if ALL_EVENTS in found:
        return tuple(EventType)
    return tuple(event for event in EventType if event in found)


def _project_ids(fields: Fields) -> frozenset[ProjectId] | None:
    found = fields.texts("project_ids", max_items=PROJECTS_MAX, max_bytes=100)
    if found is None:
        return None
    if not found:
        fields.fault("project_ids", "must name at least one, or be null")
    for index, name in enumerate(found):
        if not is_project_id(name):
            fields.fault("project_ids", "is no project id", within=str(index))
    return frozenset(ProjectId(name) for name in found)


def _description(fields: Fields, body: Json) -> str | None:
    if body.get("description") == "":
        fields.ignore("description")
        return ""
    return fields.text("description", max_bytes=DESCRIPTION_MAX_BYTES)


def _flag(fields: Fields, body: Json, name: str) -> bool | None:
    fields.ignore(name)
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return value
    fields.fault(name, "must be true or false")
    return None


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
