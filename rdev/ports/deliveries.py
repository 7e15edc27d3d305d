"""What the dispatcher needs from the store of deliveries.

All stamps are the database's. A lease is a fence: what settles or gives back a delivery compares
it, and changes nothing once it is another's. Errors of all: SERVICE_UNAVAILABLE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from rdev.domain.deliveries import DeliveryLease, Owed, OwnerShares, Settled
from rdev.domain.webhooks import DisabledReason, WebhookId


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleResult:
    """What came of a batch: deliveries that were another's by then, endpoints that it disabled, and
    endpoints that have been failing for longer than they may."""

    stale: frozenset[UUID]
    disabled: frozenset[WebhookId]
    failing_too_long: frozenset[WebhookId]


@dataclass(frozen=True, slots=True, kw_only=True)
class TickResult:
    """What a tick found: endpoints that are enabled; leases that had run out; endpoints that were
    disabled because their owner's key has ended."""

    enabled: int
    interrupted: int
    ended: int


class DeliveryQueue(Protocol):
    """Claiming deliveries, and what comes of them."""

    async def claim(
        self, *, holder: str, limit: int, untrusted_limit: int, shares: OwnerShares | None = None
    ) -> list[Owed]:
        """Take what is due under fresh leases, at most `limit`: first of the endpoints that have
        waited longest, at most so many of each as it may have at once. One whose last attempts
        were not accepted, or took longer than `QUICK_S`, or that had none, gets one at a time;
        all those together at most `untrusted_limit`. Of an ordered endpoint the oldest, one at a
        time. With what is taken no owner has more than `shares` gives; who has all of it is passed
        by. None: there is no such bound."""
        ...

    async def settle(self, settled: Sequence[Settled]) -> SettleResult:
        """Store attempts and what follows from them. Each concerns its own delivery only; one whose
        lease is over changes nothing. With an ordered endpoint its failure holds all; one that
        is dead because it is gone disables its endpoint, in the same transaction."""
        ...

    async def release(self, leases: Sequence[DeliveryLease], *, sent: bool) -> None:
        """Give deliveries back, due at once. Without `sent` the attempt did not happen; with it, it
        may have, and stands in the log as `interrupted`."""
        ...

    async def release_holder(self, holder: str) -> int:
        """Give back, as `sent`, what this server held when it died; returns how many."""
        ...

    async def hold(self, webhook: WebhookId, *, for_s: float) -> None:
        """Let nothing be claimed of this endpoint for so long."""
        ...

    async def disable(self, webhook: WebhookId, reason: DisabledReason) -> bool:
        """Stop an endpoint and owe `endpoint.disabled`; False: it was stopped already."""
        ...

    async def tick(self) -> TickResult:
        """Give back what has outlived its lease; stop endpoints whose owner's key has ended."""
        ...

    async def oldest_undelivered_s(self) -> float:
        """How long ago the oldest message was that is still owed to an endpoint that is enabled; 0
        where none is. Its cost is in what is owed."""
        ...

    async def bury_overflow(self, *, pending_max: int) -> int:
        """Of endpoints for which more than `pending_max` wait, make the oldest dead; returns how
        many."""
        ...
