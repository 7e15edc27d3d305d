"""SUBSYSTEM WebhookDispatcher: sends what is owed to endpoints, until it is accepted or dead.

Woken by commits here and on other replicas, by attempts that end, and by a tick each second, which
also gives back what outlived its lease and stops endpoints whose key has ended. Three loops: claim,
settle, and the tick's duties; each attempt is a task. Bounds: `in_flight_max` attempts in this
process; endpoints whose last attempt was not accepted, or slowly, have one each, and never more
than half of them together; one owner has half of either at most; the others' own caps are the
store's. An endpoint that keeps failing is left alone by its breaker, for pauses that grow; what it
is owed lies in the store and nobody waits for it. An attempt counts when its outcome is stored:
what a crash leaves is sent again, under the same `webhook-id`.
At stop nothing more is claimed, attempts in hand have `STOP_S` to end, and the rest is given back.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.breaker import BreakerSettings, CallOutcome
from rdev.domain.deliveries import (
    PENDING_MAX,
    SCHEDULE_S,
    DeadReason,
    DeliveryLease,
    DeliveryStatus,
    Owed,
    OwnerShares,
    Settled,
    Verdict,
    judge,
    share_out,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.sending import Outcome, OutgoingRequest, SendFault
from rdev.domain.signing import Signer, sign
from rdev.domain.webhook_targets import parse_target
from rdev.domain.webhooks import DisabledReason, WebhookId
from rdev.ports.deliveries import DeliveryQueue
from rdev.ports.telemetry import BreakerTelemetry, WebhookTelemetry
from rdev.ports.tracing import Tracing, Untraced, within
from rdev.ports.webhooks import SecretBox, WebhookSender
from rdev.services.beat import next_beat_s
from rdev.services.breaker import BreakerOpenError, CircuitBreaker, Standing, tally_of
from rdev.services.shield import commit_shield

# The floor: with every wake-up lost, nothing waits longer than this.
TICK_S = 1.0
# From one claim to the next, however many commits there are.
PAUSE_S = 0.005
# What attempts in hand are given at stop, and what giving the rest back may take.
STOP_S = 5.0
RELEASE_S = 5.0
# Between two looks at how much waits for each endpoint.
OVERFLOW_EVERY_S = 15.0
# One settle stores at most so many.
SETTLE_MAX = 200

# Endpoints are failing one attempt at a time by then; three in a row are enough to leave it alone.
# How slow a receiver may be, the sender's timeout says.
BREAKER = BreakerSettings(
    window_s=60,
    calls_min=3,
    failure_rate=0.8,
    slow_rate=1.1,
    open_first_s=2.0,
    open_most_s=120.0,
    permits=1,
    half_open_s=60.0,
)

# Of statuses that are no acceptance.
_CLASSES = {3: "3xx", 4: "4xx", 5: "5xx"}

_log = logging.getLogger("rdev.webhooks")


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherStatistics:
    """Now: attempts `in_flight`, of them `untrusted` of endpoints that did not accept the last one
    quickly;
    `endpoints` enabled; `breakers_open`. Since the start: `claimed`, `delivered`, `failed`
    attempts, `dead` deliveries, `stale` outcomes, `interrupted` attempts, deliveries that were
    `overflow`. `oldest_undelivered_s`: for how long the oldest message has waited, up to
    `OVERFLOW_EVERY_S` ago; 0 where none does."""

    in_flight: int
    untrusted: int
    endpoints: int
    breakers_open: int
    claimed: int
    delivered: int
    failed: int
    dead: int
    stale: int
    interrupted: int
    overflow: int
    oldest_undelivered_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherLimits:
    """`in_flight_max` attempts at once; pauses between the attempts of one delivery, in seconds;
    how many may wait for one endpoint."""

    in_flight_max: int = 256
    schedule_s: tuple[float, ...] = SCHEDULE_S
    pending_max: int = PENDING_MAX


class DispatcherTelemetry(WebhookTelemetry, BreakerTelemetry, Protocol):
    """Attempts, and the endpoints' breakers."""


class WebhookDispatcher:
    """Claim, permit, send, settle."""

    name = "webhooks"

    def __init__(
        self,
        *,
        queue: DeliveryQueue,
        sender: WebhookSender,
        box: SecretBox,
        telemetry: DispatcherTelemetry,
        backoff: Callable[[], Backoff],
        now: Callable[[], datetime],
        wake_replicas: Callable[[], None],
        holder: str,
        limits: DispatcherLimits,
        tracing: Tracing | None = None,
    ) -> None:
        """`holder` names this server across its restarts; `wake_replicas` says that other servers
        may find something to claim, and does not wait."""
        self._queue = queue
        self._sender = sender
        self._box = box
        self._telemetry = telemetry
        self._backoff = backoff
        self._now = now
        self._wake_replicas = wake_replicas
        self._holder = holder
        self._limits = limits
        self._tracing = tracing or Untraced()
        self._in_flight: dict[DeliveryLease, Owed] = {}
        self._ended: list[Settled] = []
        self._breakers: dict[WebhookId, CircuitBreaker] = {}
        self._wakeup = trio.Event()
        self._has_ended = trio.Event()
        self._is_idle = trio.Event()
        self._stop = trio.Event()
        # Unknown until the first tick: then a wake-up without endpoints costs nothing.
        self._endpoints = 1
        self._claimed = self._delivered = self._failed = self._dead = 0
        self._stale = self._interrupted = self._overflow = 0
        self._oldest_s = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Survives a database that is gone: it tries again with pauses."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick_loop)
            nursery.start_soon(self._settle_loop)
            async with trio.open_nursery() as attempts:
                async with trio.open_nursery() as claims:
                    claims.start_soon(self._claim_loop, attempts)
                    task_status.started()
                    await self._stop.wait()
                    claims.cancel_scope.cancel()
                with trio.move_on_after(STOP_S):
                    while self._in_flight:
                        self._is_idle = trio.Event()
                        await self._is_idle.wait()
                attempts.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
        await self._give_back()

    def stop(self) -> None:
        """Claim nothing more. Idempotent."""
        self._stop.set()
        self.wake()

    def wake(self) -> None:
        """Something may be owed. Never waits; without endpoints it costs nothing."""
        if self._endpoints:
            self._wakeup.set()

    def endpoints_changed(self) -> None:
        """There may be an endpoint now. Never waits."""
        self._endpoints = max(1, self._endpoints)
        self.wake()

    def statistics(self) -> DispatcherStatistics:
        """What is and what was."""
        return DispatcherStatistics(
            in_flight=len(self._in_flight),
            untrusted=self._untrusted,
            endpoints=self._endpoints,
            breakers_open=sum(breaker.refuses for breaker in self._breakers.values()),
            claimed=self._claimed,
            delivered=self._delivered,
            failed=self._failed,
            dead=self._dead,
            stale=self._stale,
            interrupted=self._interrupted,
            overflow=self._overflow,
            oldest_undelivered_s=self._oldest_s,
        )

    def tally(self) -> Mapping[Standing, int]:
        """How many endpoints' breakers stand how; those of endpoints at rest, or not called any
        more, are forgotten."""
        return tally_of(self._breakers.values())

    async def claim_once(self, attempts: trio.Nursery) -> int:
        """Claim as much as there are permits, and start the attempts. Returns how many: 0 means
        that there is nothing more, or no permit. Errors: SERVICE_UNAVAILABLE."""
        limit = self._limits.in_flight_max - len(self._in_flight)
        if limit <= 0 or self._stop.is_set():
            return 0
        untrusted_limit = max(0, self._limits.in_flight_max // 2 - self._untrusted)
        with commit_shield():
            found = await self._queue.claim(
                holder=self._holder,
                limit=limit,
                untrusted_limit=untrusted_limit,
                shares=self._shares(),
            )
            for owed in found:
                self._in_flight[owed.lease] = owed
                attempts.start_soon(self._attempt, owed, name=owed.event)
        self._claimed += len(found)
        if len(found) == limit or self._is_used_up(found):
            self._wake_replicas()
        return len(found)

    async def tick_once(self) -> None:
        """What no wake-up tells of. Errors: SERVICE_UNAVAILABLE."""
        found = await self._queue.tick()
        self._endpoints = found.enabled
        self._interrupted += found.interrupted
        if found.ended:
            _log.warning("webhooks of ended keys disabled", extra={"count": found.ended})
        self._forget_breakers()

    async def settle_once(self) -> None:
        """Store what has ended, as one statement. Errors: SERVICE_UNAVAILABLE; nothing is lost."""
        batch = self._ended[:SETTLE_MAX]
        with commit_shield():
            result = await self._queue.settle(batch)
            del self._ended[: len(batch)]
            for one in batch:
                self._count(one, is_stale=one.owed.lease.delivery in result.stale)
                self._leave(one.owed)
        self.wake()
        for webhook in result.disabled:
            _log.warning("webhook disabled", extra={"webhook_id": webhook, "reason": "gone"})
        for webhook in result.failing_too_long:
            if await self._queue.disable(webhook, DisabledReason.FAILING):
                _log.warning("webhook disabled", extra={"webhook_id": webhook, "reason": "failing"})

    async def _attempt(self, owed: Owed) -> None:
        """One attempt to its end; it holds its permit until its outcome is stored."""
        try:
            self._end(await self._outcome(owed))
        except BreakerOpenError as error:
            await self._leave_alone(owed, error.retry_after_s or 1.0)
        except Exception as error:  # noqa: BLE001  # one receiver must not end all others' service
            facts = {"webhook_id": owed.webhook, "error": repr(error)}
            _log.error("webhook attempt met a defect", extra=facts, exc_info=error)
            outcome = _unsendable("the server failed on it; its log says how")
            self._end(Settled(owed=owed, verdict=self._judge(owed, outcome), outcome=outcome))

    def _end(self, settled: Settled) -> None:
        self._ended.append(settled)
        self._has_ended.set()

    async def _outcome(self, owed: Owed) -> Settled:
        """Errors: BreakerOpenError, before anything was sent."""
        if not owed.is_allowed:
            verdict = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.NOT_ALLOWED)
            return Settled(owed=owed, verdict=verdict, outcome=None)
        with self._breaker(owed.webhook).call() as call:
            outcome = await self._send(owed)
            call.outcome = CallOutcome.SUCCESS if outcome.is_accepted else CallOutcome.FAILURE
        return Settled(owed=owed, verdict=self._judge(owed, outcome), outcome=outcome)

    def _judge(self, owed: Owed, outcome: Outcome) -> Verdict:
        return judge(
            owed,
            outcome,
            schedule_s=self._limits.schedule_s,
            now=self._now(),
            random=random.random,
        )

    async def _send(self, owed: Owed) -> Outcome:
        try:
            target = parse_target(owed.url)
            signers = self._signers(owed)
        except RdevError as error:
            # Another server's secret, or a URL that a newer version took: nothing is sent.
            facts = {"webhook_id": owed.webhook, "error": str(error)}
            _log.error("webhook cannot be sent", extra=facts)
            return _unsendable(error.message)
        headers = sign(owed.event, int(self._now().timestamp()), owed.payload, signers)
        return await self._follow(
            owed, OutgoingRequest(target=target, headers=headers, body=owed.payload)
        )

    def _signers(self, owed: Owed) -> list[Signer]:
        """The newest first. Errors: those of `SecretBox.open` for the newest; one in its grace that
        does not open signs no more, since a rotation is what mends that."""
        newest, *before = owed.secrets
        signers = [self._box.open(newest, of=owed.webhook)]
        for one in before:
            try:
                signers.append(self._box.open(one, of=owed.webhook))
            except RdevError as error:
                facts = {"webhook_id": owed.webhook, "error": str(error)}
                _log.warning("the webhook's key before does not open", extra=facts)
        return signers

    async def _follow(self, owed: Owed, request: OutgoingRequest) -> Outcome:
        """Send it as a part of its command's trace. The receiver is told where it stands there, and
        nothing of what other systems had handed on (`tracestate`): that is not for third parties.
        """
        span = self._tracing.delivery(owed, request.target)
        if span.context is not None:
            headers = {**request.headers, "traceparent": span.context.traceparent}
            request = replace(request, headers=headers)
        fault: str | None = "cancelled"
        try:
            outcome = await self._sender.send(request)
            span.tell(status_code=outcome.status, http_version=outcome.http_version)
            fault = None if outcome.is_accepted else came_to(outcome)
        finally:
            span.end(fault)
        return outcome

    def _breaker(self, webhook: WebhookId) -> CircuitBreaker:
        breaker = self._breakers.get(webhook)
        if breaker is None:
            breaker = CircuitBreaker(name="webhook", telemetry=self._telemetry, settings=BREAKER)
            self._breakers[webhook] = breaker
        return breaker

    def _forget_breakers(self) -> None:
        """Those at rest, and those nobody calls any more: endpoints are deleted, or owed nothing.
        Pauses and half open are bounded, so each is gone five minutes after its last call."""
        used = {owed.webhook for owed in self._in_flight.values()}
        for webhook, breaker in list(self._breakers.items()):
            if webhook not in used and (breaker.is_at_rest or breaker.is_deserted):
                del self._breakers[webhook]

    async def _leave_alone(self, owed: Owed, for_s: float) -> None:
        """The endpoint's breaker is open: nothing of it is claimed until it may be tried again."""
        with commit_shield():
            try:
                await self._queue.hold(owed.webhook, for_s=for_s)
                await self._queue.release([owed.lease], sent=False)
            except RdevError as error:
                _check_unavailable(error)  # its lease runs out
            self._leave(owed)

    def _is_used_up(self, found: Sequence[Owed]) -> bool:
        """Whether an owner got all that it may have here: other servers may have more for it."""
        if not found:
            return False
        shares = self._shares()
        return any(shares.is_used_up(owed.owner) for owed in found)

    def _shares(self) -> OwnerShares:
        return share_out(self._limits.in_flight_max, self._in_flight.values())

    @property
    def _untrusted(self) -> int:
        return sum(not owed.is_trusted for owed in self._in_flight.values())

    def _leave(self, owed: Owed) -> None:
        self._in_flight.pop(owed.lease, None)
        if not self._in_flight:
            self._is_idle.set()

    def _count(self, one: Settled, *, is_stale: bool) -> None:
        if is_stale:
            self._stale += 1
            return
        self._delivered += one.verdict.status is DeliveryStatus.DELIVERED
        self._failed += one.outcome is not None and not one.outcome.is_accepted
        if one.outcome is not None:
            with within(one.owed.trace):
                self._telemetry.webhook_attempted(came_to(one.outcome), one.outcome.latency_s)
        if one.verdict.status is DeliveryStatus.DEAD:
            self._dead += 1
            self._telemetry.webhook_dead(one.verdict.reason or "")

    async def _claim_loop(self, attempts: trio.Nursery) -> None:
        backoff = self._backoff()
        is_back = False
        while not self._stop.is_set():
            self._wakeup = trio.Event()
            next_at_s = trio.current_time() + PAUSE_S
            try:
                if not is_back:
                    # What this server held when it died; it is dead, the state folder is ours.
                    self._interrupted += await self._queue.release_holder(self._holder)
                    is_back = True
                await self.claim_once(attempts)
            except RdevError as error:
                _check_unavailable(error)
                await trio.sleep(backoff.next_s())
                continue
            backoff = self._backoff()
            with trio.move_on_at(next_beat_s(TICK_S)):
                await self._wakeup.wait()
            await trio.sleep_until(next_at_s)

    async def _settle_loop(self) -> None:
        backoff = self._backoff()
        while True:
            if not self._ended:
                self._has_ended = trio.Event()
                await self._has_ended.wait()
            try:
                await self.settle_once()
                backoff = self._backoff()
            except RdevError as error:
                _check_unavailable(error)
                await trio.sleep(backoff.next_s())

    async def _tick_loop(self) -> None:
        overflow_at_s = trio.current_time() + OVERFLOW_EVERY_S
        while True:
            try:
                await self.tick_once()
                if trio.current_time() >= overflow_at_s:
                    overflow_at_s = trio.current_time() + OVERFLOW_EVERY_S
                    await self._count_pending()
            except RdevError as error:
                _check_unavailable(error)
            await trio.sleep_until(next_beat_s(TICK_S))

    async def _count_pending(self) -> None:
        """What may not wait any longer is dead; how long the rest has waited."""
        buried = await self._queue.bury_overflow(pending_max=self._limits.pending_max)
        self._overflow += buried
        if buried:
            self._telemetry.webhook_dead(DeadReason.OVERFLOW, buried)
        self._oldest_s = await self._queue.oldest_undelivered_s()

    async def _give_back(self) -> None:
        """Store what has ended, and give back the rest: it may have been sent."""
        # shielded: what is given back now need not wait for its lease
        with trio.move_on_after(RELEASE_S, shield=True):
            try:
                while self._ended:
                    await self.settle_once()
                if self._in_flight:
                    await self._queue.release(list(self._in_flight), sent=True)
                    self._in_flight.clear()
            except RdevError as error:
                _check_unavailable(error)
                _log.warning("deliveries were not given back", extra={"error": str(error)})


def came_to(outcome: Outcome) -> str:
    """What an attempt is counted as: a closed set, whatever an endpoint answers."""
    if outcome.is_accepted:
        return "accepted"
    if outcome.fault is not None:
        return outcome.fault
    return _CLASSES.get((outcome.status or 0) // 100, "other")


def _unsendable(detail: str) -> Outcome:
    return Outcome(
        status=None,
        fault=SendFault.DENIED,
        detail=detail,
        latency_s=0.0,
        request_headers={},
        body=b"",
        truncated=False,
        http_version=None,
        retry_after=None,
    )


def _check_unavailable(error: RdevError) -> None:
    """The database is away: that passes. Anything else is a defect."""
    if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
        raise error
