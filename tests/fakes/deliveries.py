"""The `DeliveryQueue` port in memory, on the clock of the test."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from uuid import UUID

import trio

from rdev.domain.deliveries import (
    DISABLE_AFTER_S,
    QUICK_S,
    DeadReason,
    DeliveryLease,
    DeliveryStatus,
    Owed,
    OwnerShares,
    Settled,
)
from rdev.domain.webhooks import LANE_CAP, DisabledReason, WebhookId, webhook_id
from rdev.ports.deliveries import SettleResult, TickResult


@dataclass(slots=True, kw_only=True)
class Endpoint:
    url: str
    secret: bytes
    previous_secret: bytes | None = None
    is_ordered: bool = False
    owner: UUID | None = None
    is_open: bool = True
    is_trusted: bool = False
    served_at_s: float = float("-inf")
    held_until_s: float = float("-inf")
    failing_since_s: float | None = None
    disabled: DisabledReason | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """One delivery. `position` is its order."""

    id: UUID
    position: int
    webhook: WebhookId
    event: str
    payload: bytes
    due_s: float
    created_s: float
    status: str = "pending"
    reason: DeadReason | None = None
    attempt: int = 0
    failures: int = 0
    lease_id: int = 0
    lease_until_s: float = 0.0
    holder: str = ""
    log: list[Settled | None] = field(default_factory=list)


class FakeDeliveries:
    """See the module."""

    def __init__(self, *, lease_s: float = 30.0) -> None:
        self.endpoints: dict[WebhookId, Endpoint] = {}
        self.rows: dict[UUID, Row] = {}
        self._rows_of: dict[WebhookId, list[Row]] = {}
        self._lease_s = lease_s
        self._leases = count(1)

    def endpoint(
        self,
        url: str,
        *,
        secret: bytes = b"",
        is_ordered: bool = False,
        owner: UUID | None = None,
    ) -> WebhookId:
        webhook = webhook_id(UUID(int=len(self.endpoints) + 1))
        self.endpoints[webhook] = Endpoint(
            url=url, secret=secret, is_ordered=is_ordered, owner=owner
        )
        return webhook

    def owe(self, webhook: WebhookId, count: int = 1, payload: bytes = b"{}") -> list[Row]:
        made = []
        for _ in range(count):
            position = len(self.rows) + 1
            due_s = float("-inf") if self.endpoints[webhook].is_ordered else trio.current_time()
            row = Row(
                id=UUID(int=position),
                position=position,
                webhook=webhook,
                event=f"evt_{position:032x}",
                payload=payload,
                due_s=due_s,
                created_s=trio.current_time(),
            )
            self.rows[row.id] = row
            self._rows_of.setdefault(webhook, []).append(row)
            made.append(row)
        return made

    def age(self, seconds: float) -> None:
        """Make everything so much older."""
        for row in self.rows.values():
            row.due_s -= seconds
            row.created_s -= seconds
            row.lease_until_s -= seconds
        for endpoint in self.endpoints.values():
            endpoint.held_until_s -= seconds
            if endpoint.failing_since_s is not None:
                endpoint.failing_since_s -= seconds

    async def claim(
        self, *, holder: str, limit: int, untrusted_limit: int, shares: OwnerShares | None = None
    ) -> list[Owed]:
        await trio.lowlevel.checkpoint()
        found: list[Owed] = []
        held = Counter[UUID | None]()
        untrusted = Counter[UUID | None]()
        if shares is not None:
            held.update({owner: one[0] for owner, one in shares.held.items()})
            untrusted.update({owner: one[1] for owner, one in shares.held.items()})
        for are_trusted in (True, False):
            most = limit - len(found) if are_trusted else min(limit - len(found), untrusted_limit)
            taken = 0
            for _, webhook in sorted(self._waiting(are_trusted)):
                owner = self.endpoints[webhook].owner
                for row in self._heads(webhook)[: max(0, most - taken)]:
                    if shares is not None and (
                        held[owner] >= shares.most
                        or (not are_trusted and untrusted[owner] >= shares.untrusted_most)
                    ):
                        break
                    found.append(self._lease(row, holder))
                    held[owner] += 1
                    untrusted[owner] += not are_trusted
                    taken += 1
        return found

    async def settle(self, settled: Sequence[Settled]) -> SettleResult:
        await trio.lowlevel.checkpoint()
        stale, disabled, too_long = set(), set(), set()
        slow = {
            one.owed.webhook for one in settled if one.outcome and one.outcome.latency_s > QUICK_S
        }
        for one in settled:
            row = self._held(one.owed.lease)
            if row is None:
                stale.add(one.owed.lease.delivery)
                continue
            endpoint = self.endpoints[row.webhook]
            row.status, row.reason = one.verdict.status.value, one.verdict.reason
            row.attempt -= one.outcome is None
            if one.verdict.status is DeliveryStatus.PENDING:
                row.failures += 1
                if endpoint.is_ordered:
                    endpoint.held_until_s = trio.current_time() + one.verdict.again_in_s
                else:
                    row.due_s = trio.current_time() + one.verdict.again_in_s
            if one.outcome is None:
                continue
            row.log.append(one)
            is_good = one.verdict.status is DeliveryStatus.DELIVERED
            endpoint.is_trusted = is_good and row.webhook not in slow
            if is_good:
                endpoint.failing_since_s = None
            elif endpoint.failing_since_s is None:
                endpoint.failing_since_s = trio.current_time()
            elif endpoint.failing_since_s < trio.current_time() - DISABLE_AFTER_S:
                too_long.add(row.webhook)
            if one.verdict.reason is DeadReason.GONE and await self.disable(
                row.webhook, DisabledReason.GONE
            ):
                disabled.add(row.webhook)
        return SettleResult(
            stale=frozenset(stale),
            disabled=frozenset(disabled),
            failing_too_long=frozenset(too_long - disabled),
        )

    async def release(self, leases: Sequence[DeliveryLease], *, sent: bool) -> None:
        await trio.lowlevel.checkpoint()
        for lease in leases:
            if (row := self._held(lease)) is not None:
                self._give_back(row, sent=sent)

    async def release_holder(self, holder: str) -> int:
        await trio.lowlevel.checkpoint()
        mine = [
            one for one in self.rows.values() if (one.status, one.holder) == ("sending", holder)
        ]
        for row in mine:
            self._give_back(row, sent=True)
        return len(mine)

    async def hold(self, webhook: WebhookId, *, for_s: float) -> None:
        await trio.lowlevel.checkpoint()
        endpoint = self.endpoints[webhook]
        endpoint.held_until_s = max(endpoint.held_until_s, trio.current_time() + for_s)

    async def disable(self, webhook: WebhookId, reason: DisabledReason) -> bool:
        endpoint = self.endpoints[webhook]
        if not endpoint.is_open:
            return False
        endpoint.is_open, endpoint.disabled = False, reason
        return True

    async def tick(self) -> TickResult:
        await trio.lowlevel.checkpoint()
        now_s = trio.current_time()
        late = [
            row
            for row in self.rows.values()
            if row.status == "sending" and row.lease_until_s < now_s
        ]
        for row in late:
            self._give_back(row, sent=True)
        enabled = sum(endpoint.is_open for endpoint in self.endpoints.values())
        return TickResult(enabled=enabled, interrupted=len(late), ended=0)

    async def oldest_undelivered_s(self) -> float:
        await trio.lowlevel.checkpoint()
        now_s = trio.current_time()
        waits_s = [
            now_s - row.created_s
            for row in self.rows.values()
            if row.status == "sending"
            or (row.status == "pending" and self.endpoints[row.webhook].is_open)
        ]
        return max(waits_s, default=0.0)

    async def bury_overflow(self, *, pending_max: int) -> int:
        await trio.lowlevel.checkpoint()
        buried = 0
        for webhook in self.endpoints:
            rows = [
                row
                for row in self.rows.values()
                if row.webhook == webhook and row.status == "pending"
            ]
            for row in rows[: max(0, len(rows) - pending_max)]:
                row.status, row.reason = "dead", DeadReason.OVERFLOW
                buried += 1
        return buried

    def _waiting(self, are_trusted: bool) -> list[tuple[float, WebhookId]]:
        now_s = trio.current_time()
        return [
            (max(heads[0].due_s, endpoint.served_at_s), webhook)
            for webhook, endpoint in self.endpoints.items()
            if endpoint.is_open
            and endpoint.held_until_s <= now_s
            and endpoint.is_trusted == are_trusted
            and (heads := self._heads(webhook))
        ]

    def _heads(self, webhook: WebhookId) -> list[Row]:
        endpoint = self.endpoints[webhook]
        rows = self._rows_of.get(webhook, [])
        cap = 1 if endpoint.is_ordered or not endpoint.is_trusted else LANE_CAP
        room = cap - sum(row.status == "sending" for row in rows)
        due = [row for row in rows if row.status == "pending" and row.due_s <= trio.current_time()]
        return sorted(due, key=lambda row: (row.due_s, row.position))[: max(0, room)]

    def _lease(self, row: Row, holder: str) -> Owed:
        endpoint = self.endpoints[row.webhook]
        row.status, row.holder, row.lease_id = "sending", holder, next(self._leases)
        row.lease_until_s = trio.current_time() + self._lease_s
        row.attempt += 1
        endpoint.served_at_s = trio.current_time()
        return Owed(
            lease=DeliveryLease(delivery=row.id, id=row.lease_id),
            webhook=row.webhook,
            event=row.event,
            attempt=row.attempt,
            failures=row.failures,
            is_ordered=endpoint.is_ordered,
            is_trusted=endpoint.is_trusted,
            is_allowed=True,
            url=endpoint.url,
            payload=row.payload,
            owner=endpoint.owner,
            secrets=(endpoint.secret,)
            if endpoint.previous_secret is None
            else (endpoint.secret, endpoint.previous_secret),
        )

    def _held(self, lease: DeliveryLease) -> Row | None:
        row = self.rows[lease.delivery]
        return row if (row.status, row.lease_id) == ("sending", lease.id) else None

    def _give_back(self, row: Row, *, sent: bool) -> None:
        row.status = "pending"
        if sent:
            row.log.append(None)
        else:
            row.attempt -= 1
