"""Webhook endpoints: who is told of which events, where, and for whom.

An endpoint speaks for a key, its owner: it is told only of projects that this key may see, and of
nothing once the key is revoked or has expired. Whoever enables an endpoint becomes its owner.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NewType
from uuid import UUID

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.keys import Grant, Scope
from rdev.domain.signing import SignatureScheme

WebhookId = NewType("WebhookId", str)

WEBHOOK_PREFIX = "whk_"
# How many endpoints there may be in all: a claim asks each of them.
WEBHOOKS_MAX = 1_000
# Attempts at once, of an endpoint that is not ordered.
LANE_CAP = 4
# How long the secret before a rotation goes on signing.
ROTATION_GRACE_S = 86_400


class EventType(StrEnum):
    """What an endpoint can ask for. `PING` comes only when it is asked for."""

    COMMAND_QUEUED = "command.queued"
    COMMAND_STARTED = "command.started"
    COMMAND_COMPLETED = "command.completed"
    COMMAND_FAILED = "command.failed"
    COMMAND_CANCELLED = "command.cancelled"
    COMMAND_TIMED_OUT = "command.timed_out"
    COMMAND_LOST = "command.lost"
    COMMAND_EXPIRED = "command.expired"
    PROJECT_STATUS = "project.status"
    ENDPOINT_DISABLED = "endpoint.disabled"
    PING = "ping"


_ABOUT_ENDPOINTS = frozenset({EventType.ENDPOINT_DISABLED, EventType.PING})


class DisabledReason(StrEnum):
    """Why an endpoint is told nothing."""

    REQUESTED = "requested"
    GONE = "gone"  # its receiver answered 410
    FAILING = "failing"  # nothing was accepted for days
    KEY_ENDED = "key_ended"  # its owner was revoked or has expired


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """A key of an endpoint as it is stored: what signs is sealed, and of scheme v1a (None with v1)
    `public_key` is what its receiver verifies with (`whpk_…`)."""

    sealed: bytes = field(repr=False)
    public_key: str | None = None

    @property
    def scheme(self) -> SignatureScheme:
        """What it signs with."""
        return SignatureScheme.V1 if self.public_key is None else SignatureScheme.V1A


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """An endpoint as it is stored. `project_ids` None: all projects of the owner. `failing_since`:
    the first failure after the last success. `public_key`: that of its key, None with scheme v1;
    `previous_public_key`: that of the key before, while it signs too (until `previous_until`)."""

    id: WebhookId
    url: str
    description: str
    events: tuple[EventType, ...]
    project_ids: frozenset[ProjectId] | None
    is_ordered: bool
    owner: KeyId
    is_enabled: bool
    disabled_reason: DisabledReason | None
    disabled_at: datetime | None
    failing_since: datetime | None
    overflowed: int
    created_at: datetime
    updated_at: datetime
    previous_until: datetime | None
    public_key: str | None = None
    previous_public_key: str | None = None

    @property
    def scheme(self) -> SignatureScheme:
        """What its requests are signed with."""
        return SignatureScheme.V1 if self.public_key is None else SignatureScheme.V1A


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWebhook:
    """An endpoint to be stored."""

    id: WebhookId
    url: str
    description: str
    events: tuple[EventType, ...]
    project_ids: frozenset[ProjectId] | None
    is_ordered: bool
    is_enabled: bool
    owner: KeyId
    key: SigningKey
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookChange:
    """What becomes of an endpoint that was seen as it was at `seen_at`, enabled or not. `owner` is
    set where it has a new one, `key` where it signs with another scheme: then the key before signs
    beside it for `ROTATION_GRACE_S`."""

    seen_at: datetime
    was_enabled: bool
    url: str
    description: str
    events: tuple[EventType, ...]
    project_ids: frozenset[ProjectId] | None
    is_ordered: bool
    is_enabled: bool
    owner: KeyId | None
    key: SigningKey | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRotation:
    """A fresh key for an endpoint; the one before signs for `grace_s` seconds more."""

    webhook: WebhookId
    key: SigningKey
    grace_s: int
    idempotency: Idempotency | None = None


def webhook_id(uuid: UUID) -> WebhookId:
    """The wire form of an endpoint's UUID."""
    return WebhookId(WEBHOOK_PREFIX + uuid.hex)


def webhook_uuid(webhook: WebhookId) -> UUID:
    """The UUID inside an endpoint's id that was made by `webhook_id` or passed `is_webhook_id`."""
    return UUID(webhook.removeprefix(WEBHOOK_PREFIX))


def is_webhook_id(text: str) -> bool:
    """Whether the text has the form of an endpoint's id; says nothing about existence."""
    digits = text.removeprefix(WEBHOOK_PREFIX)
    return len(digits) == 32 and text != digits and set(digits) <= set("0123456789abcdef")


def is_visible(holder: Grant, project_ids: frozenset[ProjectId] | None) -> bool:
    """Whether a key sees an endpoint of these projects: only where it sees all of them."""
    if holder.project_ids is None:
        return True
    return project_ids is not None and project_ids <= holder.project_ids


def may_read_commands(holder: Grant) -> bool:
    """Whether a key may know what events of commands and projects tell."""
    return holder.may(Scope.PROJECTS_READ) or holder.may(Scope.PROJECTS_EXECUTE)


def projects_for(
    holder: Grant, wanted: frozenset[ProjectId] | None, events: Collection[EventType]
) -> frozenset[ProjectId] | None:
    """Of which projects an endpoint of this key is told: those it wants, or all the key sees.

    Errors: FORBIDDEN for projects that the key does not see, and for events of commands and
    projects where it may not read those.
    """
    if not may_read_commands(holder) and not _ABOUT_ENDPOINTS.issuperset(events):
        message = "a key that may not read commands cannot be told of them"
        raise RdevError(ErrorCode.FORBIDDEN, message, details={"scope": Scope.PROJECTS_READ.value})
    if wanted is None:
        return holder.project_ids
    foreign = sorted(project for project in wanted if not holder.sees(project))
    if foreign:
        message = f"the key has no right to the projects {', '.join(foreign)}"
        raise RdevError(ErrorCode.FORBIDDEN, message)
    return wanted
