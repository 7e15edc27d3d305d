"""Circuit breakers around calls on trio: what keeps failing is not called for a while.

    with breaker.call():
        await the_thing()

The block's end resolves the permit, however it ends: also cancelled, which counts as nothing and
gives a trial's permit back. A timeout of the caller's own is a cancellation until the caller says
otherwise: turn it into an error inside the block. Overhead: see `bench/limiter.py`.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import trio

from rdev.domain.breaker import (
    Breaker,
    BreakerReason,
    BreakerSettings,
    BreakerState,
    CallOutcome,
    Permit,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import BreakerTelemetry

# For gauges: the higher, the worse.
STATE_NUMBERS = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}

# What a call meets, and why; every pair there is.
Standing: TypeAlias = tuple[BreakerState, BreakerReason]
STANDINGS: tuple[Standing, ...] = (
    (BreakerState.CLOSED, BreakerReason.NOTHING),
    (BreakerState.CLOSED, BreakerReason.RECOVERED),
    (BreakerState.HALF_OPEN, BreakerReason.DUE),
    (BreakerState.OPEN, BreakerReason.FAILURES),
    (BreakerState.OPEN, BreakerReason.SLOW),
    (BreakerState.OPEN, BreakerReason.TRIAL_FAILED),
    (BreakerState.OPEN, BreakerReason.TRIAL_UNDECIDED),
)


class BreakerOpenError(RdevError):
    """SERVICE_UNAVAILABLE, without a call: it would most likely fail."""

    def __init__(self, name: str, retry_after_s: float) -> None:
        """With a delay."""
        message = f"the {name} has been failing and is left alone for a moment"
        super().__init__(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=retry_after_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStatistics:
    """Now: `state` (0 closed, 1 half open, 2 open); in the window `calls`, of which `failures` and
    `slow`. Since the start: calls `refused`."""

    state: int
    calls: int
    failures: int
    slow: int
    refused: int


def unavailable_is_failure(error: Exception) -> CallOutcome:
    """SERVICE_UNAVAILABLE is a failure of what was called; all else is the caller's affair."""
    if isinstance(error, RdevError) and error.code is ErrorCode.SERVICE_UNAVAILABLE:
        return CallOutcome.FAILURE
    return CallOutcome.IGNORED


class CircuitBreaker:
    """One breaker on trio's clock."""

    def __init__(
        self,
        *,
        name: str,
        telemetry: BreakerTelemetry,
        settings: BreakerSettings | None = None,
        outcome_of: Callable[[Exception], CallOutcome] = unavailable_is_failure,
    ) -> None:
        """`name` comes from a closed set: it is a label and stands in what clients are told.
        `outcome_of`: what an error says about what was called."""
        self.name = name
        self.refused = 0
        self.outcome_of = outcome_of
        self.breaker = Breaker(
            settings=settings or BreakerSettings(),
            random=random.random,
            changed=lambda state, reason: telemetry.breaker_changed(name, state, reason),
        )

    def call(self) -> "GuardedCall":
        """Around one call. Errors: BreakerOpenError on entry; the block's own go through."""
        return GuardedCall(self)

    def check(self) -> int:
        """For a call whose end is far away and seen apart: the generation to `observe` it by.

        It takes no permit. Errors: BreakerOpenError.
        """
        with GuardedCall(self) as call:
            call.outcome = CallOutcome.IGNORED
        return self.breaker.generation

    def observe(self, generation: int, outcome: CallOutcome) -> None:
        """How a call went that `check` let through."""
        self.breaker.observe(generation, outcome, trio.current_time())

    @property
    def refuses(self) -> bool:
        """Whether a call now would be refused."""
        return self.breaker.refuses(trio.current_time())

    @property
    def is_at_rest(self) -> bool:
        """Whether forgetting it would change nothing."""
        now_s = trio.current_time()
        is_closed = self.breaker.state(now_s) is BreakerState.CLOSED
        return is_closed and self.breaker.window(now_s).calls == 0

    @property
    def is_deserted(self) -> bool:
        """Whether nobody called for longer than its longest pause after it was due: what it knew is
        old. It may be forgotten, unless a call is under way."""
        overdue_s = self.breaker.overdue_s(trio.current_time())
        return overdue_s > self.breaker.settings.open_most_s

    @property
    def reason(self) -> BreakerReason:
        """Why it is in its state."""
        return self.breaker.reason

    def standing(self, now_s: float) -> Standing:
        """What a call would meet now: one that is open and due is half open to it."""
        state = self.breaker.state(now_s)
        if state is BreakerState.OPEN and not self.breaker.refuses(now_s):
            return BreakerState.HALF_OPEN, BreakerReason.DUE
        return state, self.breaker.reason

    def tally(self) -> Mapping[Standing, int]:
        """As `tally_of`, of this one."""
        return tally_of((self,))

    def try_now(self) -> None:
        """See `Breaker.try_now`."""
        self.breaker.try_now(trio.current_time())

    def statistics(self) -> BreakerStatistics:
        """What is and what was."""
        now_s = trio.current_time()
        state = self.breaker.state(now_s)
        counts = self.breaker.window(now_s)
        return BreakerStatistics(
            state=STATE_NUMBERS[state],
            calls=counts.calls,
            failures=counts.failures,
            slow=counts.slow,
            refused=self.refused,
        )


def tally_of(breakers: Iterable[CircuitBreaker]) -> Mapping[Standing, int]:
    """How many stand how, for each of `STANDINGS`. Cost: in the breakers."""
    now_s = trio.current_time()
    tally = dict.fromkeys(STANDINGS, 0)
    for breaker in breakers:
        tally[breaker.standing(now_s)] += 1
    return tally


class GuardedCall:
    """One call: a permit from the block's first step to its last."""

    __slots__ = ("_guard", "_permit", "outcome")

    def __init__(self, guard: CircuitBreaker) -> None:
        """Made by `CircuitBreaker.call`."""
        self._guard = guard
        self._permit: Permit | None = None
        # Set by a block that knows better than its exception says.
        self.outcome: CallOutcome | None = None

    def __enter__(self) -> "GuardedCall":
        """Take a permit. Errors: BreakerOpenError."""
        guard = self._guard
        now_s = trio.current_time()
        self._permit = guard.breaker.acquire(now_s)
        if self._permit is None:
            guard.refused += 1
            raise BreakerOpenError(guard.name, guard.breaker.retry_after_s(now_s))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Resolve it."""
        outcome = self.outcome or CallOutcome.SUCCESS
        if error is not None:
            outcome = self._judge(error)
        assert self._permit is not None
        self._guard.breaker.resolve(self._permit, outcome, trio.current_time())

    def _judge(self, error: BaseException) -> CallOutcome:
        """What an exception says. Of a group: a failure if one in it is, cancelled if all are."""
        if isinstance(error, BaseExceptionGroup):
            found = {self._judge(inner) for inner in error.exceptions}
            if len(found) == 1:
                return found.pop()
            return CallOutcome.FAILURE if CallOutcome.FAILURE in found else CallOutcome.IGNORED
        if not isinstance(error, Exception):
            return CallOutcome.CANCELLED
        return self.outcome or self._guard.outcome_of(error)
