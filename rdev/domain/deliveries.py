"""Deliveries: an event that is owed to an endpoint, its attempts, and what follows from each.

Owns the schedule. A delivery is `pending` until a receiver accepts it (`delivered`) or there is
nothing more to try (`dead`, with a reason); the dead are kept and can be asked for again.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NewType
from uuid import UUID

from rdev.domain.ids import ProjectId
from rdev.domain.sending import Outcome
from rdev.domain.traces import TraceContext
from rdev.domain.webhooks import WebhookId

DeliveryId = NewType("DeliveryId", str)
DELIVERY_PREFIX = "dlv_"
EVENT_PREFIX = "evt_"

# Seconds from one failure to the next attempt. Source: Standard Webhooks; the HTTP contract.
SCHEDULE_S = (5.0, 30.0, 120.0, 600.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0)
SCHEDULE_STEPS_MAX = 30
SCHEDULE_STEP_MAX_S = 172_800.0
# A pause is longer or shorter than the schedule's by up to this part of it.
JITTER = 0.2
# A receiver cannot ask for more than this.
RETRY_AFTER_MAX_S = 86_400.0
# An endpoint that has accepted nothing for so long is disabled with its next failure.
DISABLE_AFTER_S = 432_000.0
# An answer that took longer is slow: whoever answers so holds what others wait for, and is given
# one attempt at a time.
QUICK_S = 2.0
# So many wait for one endpoint; of more the oldest are dead.
PENDING_MAX = 100_000
# One call asks for so many again.
REDELIVER_MAX = 10_000


class DeliveryStatus(StrEnum):
    """Where a delivery stands; one whose attempt is under way is pending."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class DeadReason(StrEnum):
    """Why a delivery is not tried again."""

    EXHAUSTED = "exhausted"  # the schedule is over
    GONE = "gone"  # the receiver answered 410
    OVERFLOW = "overflow"  # more than `PENDING_MAX` waited
    NOT_ALLOWED = "not_allowed"  # the endpoint may no longer be told of the project


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A delivery as clients see it. `due`: not before; None where it is not pending."""

    id: DeliveryId
    webhook: WebhookId
    event: str
    type: str
    project: ProjectId | None
    status: DeliveryStatus
    reason: DeadReason | None
    attempts: int
    due: datetime | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryAttempt:
    """One attempt, from the log. `fault` is a `SendFault`, or `interrupted`: the server that made
    it ended, and nobody knows whether it arrived."""

    number: int
    at: datetime
    status: int | None
    fault: str | None
    detail: str
    latency_ms: int | None
    http_version: str | None
    request_headers: Mapping[str, str]
    body: bytes
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryLease:
    """The right to make one attempt, until it runs out; a fence."""

    delivery: UUID
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """A claimed delivery with all that its attempt needs. `failures` are those before this attempt.
    `is_trusted`: the endpoint accepted its last attempt, and quickly; `is_allowed`: it may be told
    of the project. `secrets` are sealed, the newest first. `owner` is the key that the endpoint
    speaks for, None the bootstrap key. `trace` is that of the command it tells of."""

    lease: DeliveryLease
    webhook: WebhookId
    event: str
    attempt: int
    failures: int
    is_ordered: bool
    is_trusted: bool
    is_allowed: bool
    url: str
    payload: bytes = field(repr=False)
    secrets: tuple[bytes, ...] = field(repr=False)
    owner: UUID | None = None
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerShares:
    """What one owner may have under way in one server: `most` attempts, of them `untrusted_most` of
    endpoints that are not trusted; and what owners have there now, in all and untrusted."""

    most: int
    untrusted_most: int
    held: Mapping[UUID | None, tuple[int, int]]

    def is_used_up(self, owner: UUID | None) -> bool:
        """Whether it has all of it, so that what else it is owed is for other servers."""
        held, untrusted = self.held.get(owner, (0, 0))
        return held >= self.most or untrusted >= self.untrusted_most


def share_out(in_flight_max: int, under_way: Iterable[Owed]) -> OwnerShares:
    """Half of all places is one owner's at most, and half of those for untrusted endpoints, which
    are half of all. So whatever one owner's endpoints do, the other half is for the others."""
    held: dict[UUID | None, tuple[int, int]] = {}
    for owed in under_way:
        taken, untrusted = held.get(owed.owner, (0, 0))
        held[owed.owner] = taken + 1, untrusted + (not owed.is_trusted)
    return OwnerShares(
        most=max(1, in_flight_max // 2), untrusted_most=max(1, in_flight_max // 4), held=held
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Redelivery:
    """What is asked for again, of one endpoint: those made since then that have this status (None:
    delivered or dead), `within` some projects, or all."""

    webhook: WebhookId
    within: frozenset[ProjectId] | None
    since: datetime
    status: DeliveryStatus | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from an attempt: `delivered`, `dead` for a reason, or again in `again_in_s`."""

    status: DeliveryStatus
    reason: DeadReason | None = None
    again_in_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """An attempt that is over, to be stored. `outcome` None: nothing was sent."""

    owed: Owed
    verdict: Verdict
    outcome: Outcome | None


def delivery_id(uuid: UUID) -> DeliveryId:
    """The wire form of a delivery's UUID."""
    return DeliveryId(DELIVERY_PREFIX + uuid.hex)


def delivery_uuid(delivery: DeliveryId) -> UUID:
    """The UUID inside a delivery id that was made by `delivery_id` or passed `is_delivery_id`."""
    return UUID(delivery.removeprefix(DELIVERY_PREFIX))


def is_delivery_id(text: str) -> bool:
    """Whether the text has the form of a delivery's id; says nothing about existence."""
    digits = text.removeprefix(DELIVERY_PREFIX)
    return len(digits) == 32 and text != digits and set(digits) <= set("0123456789abcdef")


def parse_schedule(text: str) -> tuple[float, ...]:
    """Pauses in seconds, with commas between: `5,30,120`. Errors: ValueError."""
    steps = []
    for part in text.split(","):
        try:
            step_s = float(part)
        except ValueError:
            raise ValueError("must be seconds, separated by commas") from None
        if not 0 < step_s <= SCHEDULE_STEP_MAX_S:
            raise ValueError(f"each pause must be over 0 and at most {SCHEDULE_STEP_MAX_S:g} s")
        steps.append(step_s)
    if len(steps) > SCHEDULE_STEPS_MAX:
        raise ValueError(f"must have at most {SCHEDULE_STEPS_MAX} pauses")
    return tuple(steps)


def judge(
    owed: Owed,
    outcome: Outcome,
    *,
    schedule_s: tuple[float, ...],
    now: datetime,
    random: Callable[[], float],
) -> Verdict:
    """What follows from this outcome. `random` gives numbers in [0, 1).

    1. 2xx: delivered. 2. 410: dead, and the endpoint with it. 3. The schedule is over: dead.
    4. Else again, after the schedule's next pause with its jitter, or what `Retry-After` asks for
    where that is longer.
    """
    if outcome.is_accepted:
        return Verdict(status=DeliveryStatus.DELIVERED)
    if outcome.is_gone:
        return Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.GONE)
    if owed.failures >= len(schedule_s):
        return Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.EXHAUSTED)
    pause_s = schedule_s[owed.failures] * (1 - JITTER + 2 * JITTER * random())
    asked_s = outcome.retry_after_s(now) or 0.0
    again_in_s = max(pause_s, min(asked_s, RETRY_AFTER_MAX_S))
    return Verdict(status=DeliveryStatus.PENDING, again_in_s=again_in_s)
