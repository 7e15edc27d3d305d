"""Breakers on trio: every way out of the block resolves the permit."""

import pytest
import trio

from rdev.domain.breaker import BreakerReason, BreakerSettings, BreakerState, CallOutcome
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.breaker import CallBreaker, Unbroken
from rdev.ports.telemetry import Silence
from rdev.services.breaker import STANDINGS, BreakerOpenError, CircuitBreaker, tally_of

SETTINGS = BreakerSettings(calls_min=4)


class Noted(Silence):
    """The changes, in order."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, BreakerState, BreakerReason]] = []

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        self.changes.append((breaker, state, reason))


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def breaker(noted: Noted) -> CircuitBreaker:
    return CircuitBreaker(name="exec", telemetry=noted, settings=SETTINGS)


def unavailable() -> RdevError:
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, "it is gone")


def fail(breaker: CallBreaker, error: BaseException | None = None) -> None:
    error = error or unavailable()
    with pytest.raises(type(error)), breaker.call():
        raise error


def opened(breaker: CircuitBreaker) -> None:
    for _ in range(4):
        fail(breaker)
    assert breaker.refuses


async def test_every_reason_of_a_domain_breaker_is_tallied(breaker: CircuitBreaker) -> None:
    assert {reason for _, reason in STANDINGS} == set(BreakerReason)
    assert {state for state, _ in STANDINGS} == set(BreakerState)
    others = CircuitBreaker(name="exec", telemetry=Silence())
    opened(breaker)

    tally = tally_of([breaker, others, others])

    assert set(tally) == set(STANDINGS)
    assert {standing: count for standing, count in tally.items() if count} == {
        (BreakerState.CLOSED, BreakerReason.NOTHING): 2,
        (BreakerState.OPEN, BreakerReason.FAILURES): 1,
    }


async def test_an_open_breaker_refuses_at_once_and_says_for_how_long(
    breaker: CircuitBreaker, noted: Noted
) -> None:
    opened(breaker)

    with pytest.raises(BreakerOpenError) as caught, breaker.call():
        pytest.fail("the call was made")

    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert caught.value.retry_after_s is not None
    assert 3.75 <= caught.value.retry_after_s <= 5
    assert caught.value.message == "the exec has been failing and is left alone for a moment"
    assert noted.changes == [("exec", BreakerState.OPEN, BreakerReason.FAILURES)]
    statistics = breaker.statistics()
    assert (statistics.state, statistics.refused, statistics.calls) == (2, 1, 0)

    await trio.sleep(caught.value.retry_after_s)
    for _ in range(3):
        with breaker.call():
            assert breaker.statistics().state == 1
    assert breaker.statistics().state == 0
    assert breaker.reason is BreakerReason.RECOVERED


async def test_a_cancelled_call_counts_as_nothing_and_gives_its_permit_back(
    breaker: CircuitBreaker,
) -> None:
    async def hang() -> None:
        with breaker.call():
            await trio.sleep_forever()

    for _ in range(10):
        with trio.move_on_after(1):
            await hang()
    assert breaker.statistics().calls == 0

    opened(breaker)
    await trio.sleep(5)
    for _ in range(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(hang)
            await trio.testing.wait_all_tasks_blocked()
            assert breaker.refuses
            nursery.cancel_scope.cancel()
        assert not breaker.refuses


async def test_a_cancelled_call_was_cancelled_whatever_the_block_says(
    breaker: CircuitBreaker,
) -> None:
    with trio.CancelScope() as scope, breaker.call() as call:
        call.outcome = CallOutcome.FAILURE
        scope.cancel()
        await trio.sleep_forever()

    assert breaker.statistics().calls == 0


async def test_a_timeout_that_became_an_error_is_a_failure(breaker: CircuitBreaker) -> None:
    async def call() -> None:
        with breaker.call():
            with trio.move_on_after(1):
                await trio.sleep_forever()
            raise unavailable()

    with pytest.raises(RdevError):
        await call()

    assert breaker.statistics().failures == 1


@pytest.mark.parametrize(
    ("error", "counted", "failed"),
    [
        (unavailable(), 1, 1),
        (RdevError(ErrorCode.CONFLICT, "somebody was first"), 0, 0),
        (ValueError("a fault of ours"), 0, 0),
        (KeyboardInterrupt(), 0, 0),
        (BaseExceptionGroup("", [KeyboardInterrupt(), unavailable()]), 1, 1),
        (ExceptionGroup("", [ValueError(), ExceptionGroup("", [unavailable()])]), 1, 1),
        (BaseExceptionGroup("", [KeyboardInterrupt(), KeyboardInterrupt()]), 0, 0),
        (BaseExceptionGroup("", [KeyboardInterrupt(), ValueError()]), 0, 0),
    ],
)
async def test_only_what_was_called_can_fail(
    breaker: CircuitBreaker, error: BaseException, counted: int, failed: int
) -> None:
    fail(breaker, error)

    statistics = breaker.statistics()
    assert (statistics.calls, statistics.failures) == (counted, failed)


async def test_the_block_may_know_better(breaker: CircuitBreaker) -> None:
    with breaker.call() as call:
        call.outcome = CallOutcome.FAILURE

    def succeed_and_raise() -> None:
        with breaker.call() as call:
            call.outcome = CallOutcome.SUCCESS
            raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        succeed_and_raise()

    statistics = breaker.statistics()
    assert (statistics.calls, statistics.failures) == (2, 1)


async def test_a_slow_success_is_slow(breaker: CircuitBreaker, noted: Noted) -> None:
    for _ in range(4):
        with breaker.call():
            await trio.sleep(5.5)

    assert noted.changes == [("exec", BreakerState.OPEN, BreakerReason.SLOW)]


async def test_a_sign_of_life_ends_the_wait(breaker: CircuitBreaker) -> None:
    opened(breaker)

    breaker.try_now()

    assert not breaker.refuses
    assert not breaker.is_at_rest


async def test_what_has_no_breaker_is_never_refused() -> None:
    unbroken = Unbroken()
    for _ in range(100):
        fail(unbroken)
    unbroken.try_now()
    with unbroken.call() as call:
        call.outcome = CallOutcome.FAILURE
