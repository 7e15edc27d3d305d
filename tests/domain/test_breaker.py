"""The breaker as a state machine on virtual time, beside a naive model of its promises."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from rdev.domain.breaker import (
    Breaker,
    BreakerReason,
    BreakerSettings,
    BreakerState,
    CallOutcome,
    Permit,
    WindowCounts,
)

CLOSED, HALF_OPEN, OPEN = BreakerState.CLOSED, BreakerState.HALF_OPEN, BreakerState.OPEN
SUCCESS, FAILURE = CallOutcome.SUCCESS, CallOutcome.FAILURE
NOTHING_SAID = (CallOutcome.IGNORED, CallOutcome.CANCELLED)


class Machine(RuleBasedStateMachine):
    """Calls begin and end in any order, at any time; the model counts for itself."""

    permits = Bundle("permits")

    @initialize(calls_min=st.integers(1, 6), permits=st.integers(1, 3), chance=st.floats(0, 0.99))
    def begin(self, calls_min: int, permits: int, chance: float) -> None:
        self.now_s = 1_000.0
        self.settings = BreakerSettings(window_s=10, calls_min=calls_min, permits=permits)
        self.breaker = Breaker(
            settings=self.settings, random=lambda: chance, changed=self.on_change
        )
        self.state = CLOSED
        # (second, failed, slow) of the calls since the last change of state.
        self.ended: list[tuple[int, bool, bool]] = []
        self.trials: set[Permit] = set()
        self.changed_at_s = self.now_s
        self.shortest_s = 0.0
        self.openings = 0
        self.hinted = False

    def on_change(self, state: BreakerState, reason: BreakerReason) -> None:
        self.state = state
        self.ended, self.trials = [], set()
        if state is CLOSED:
            self.openings = 0
        if state is OPEN:
            ceiling_s = min(60.0, 5.0 * 2**self.openings)
            self.openings += 1
            self.shortest_s = 0.75 * ceiling_s
            # From the deadline on where it was not decided, else from now.
            late = reason is BreakerReason.TRIAL_UNDECIDED
            self.changed_at_s = self.deadline_s if late else self.now_s
            self.hinted = False
        if state is HALF_OPEN:
            self.deadline_s = self.now_s + self.settings.half_open_s

    @rule(target=permits)
    def call(self) -> Permit | None:
        before = self.breaker.state(self.now_s)
        is_refused = self.breaker.refuses(self.now_s)
        permit = self.breaker.acquire(self.now_s)
        assert (permit is None) == is_refused
        if before is OPEN and not self.hinted:
            # No call before its time, and none is refused after the longest of it.
            if self.now_s < self.changed_at_s + self.shortest_s:
                assert permit is None
            if self.now_s >= self.changed_at_s + self.shortest_s / 0.75:
                assert permit is not None
        if permit is not None and permit.is_trial:
            self.trials.add(permit)
        if permit is not None:
            assert permit.is_trial == (self.breaker.state(self.now_s) is HALF_OPEN)
        return permit

    @rule(permit=consumes(permits), outcome=st.sampled_from(CallOutcome))
    def end(self, permit: Permit | None, outcome: CallOutcome) -> None:
        if permit is None:
            return
        self.breaker.state(self.now_s)  # lets a deadline that passed come first, as time does
        counts = permit.generation == self.breaker.generation
        was = self.state
        is_slow = self.now_s - permit.began_s > self.settings.slow_s
        self.trials.discard(permit)
        if counts and was is CLOSED and outcome not in NOTHING_SAID:
            self.ended.append((int(self.now_s), outcome is FAILURE, is_slow))
        before = self.breaker.generation
        self.breaker.resolve(permit, outcome, self.now_s)
        if not counts or outcome in NOTHING_SAID:
            assert self.breaker.generation == before
        if counts and was is HALF_OPEN and outcome is FAILURE:
            assert self.state is OPEN
        # Whoever says it again says nothing.
        after = self.breaker.generation, self.breaker.window(self.now_s)
        self.breaker.resolve(permit, FAILURE, self.now_s)
        assert after == (self.breaker.generation, self.breaker.window(self.now_s))

    @rule(seconds=st.one_of(st.floats(0, 3), st.sampled_from([0.5, 5.0, 10.0, 30.0, 61.0])))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def hint(self) -> None:
        self.breaker.try_now(self.now_s)
        self.hinted = True
        assert not self.breaker.refuses(self.now_s) or self.state is HALF_OPEN

    @invariant()
    def no_more_trials_than_permits(self) -> None:
        self.breaker.state(self.now_s)
        assert len(self.trials) <= self.settings.permits

    @invariant()
    def the_window_equals_a_recount(self) -> None:
        self.breaker.state(self.now_s)
        recent = [one for one in self.ended if one[0] > int(self.now_s) - self.settings.window_s]
        assert self.breaker.window(self.now_s) == WindowCounts(
            calls=len(recent),
            failures=sum(failed for _, failed, _ in recent),
            slow=sum(slow for _, _, slow in recent),
        )

    @invariant()
    def it_is_open_as_soon_as_there_is_reason(self) -> None:
        if self.breaker.state(self.now_s) is not CLOSED or not self.ended:
            return
        if self.ended[-1][0] == int(self.now_s):
            counts = self.breaker.window(self.now_s)
            assert counts.calls < self.settings.calls_min or (
                2 * counts.failures < counts.calls and 2 * counts.slow < counts.calls
            )

    def teardown(self) -> None:
        """Whatever happened, also to permits that nobody gives back: it decides, and recovers."""
        if not hasattr(self, "breaker"):
            return
        self.now_s += self.settings.half_open_s
        assert self.breaker.state(self.now_s) in (CLOSED, OPEN)
        self.now_s += self.settings.open_most_s
        for _ in range(self.settings.permits):
            permit = self.breaker.acquire(self.now_s)
            assert permit is not None
            self.breaker.resolve(permit, SUCCESS, self.now_s)
        assert self.breaker.state(self.now_s) is CLOSED


@pytest.mark.slow
def test_the_promises_hold_whatever_is_called_when() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None)
    )


@pytest.mark.full
@pytest.mark.timeout(7_200)
def test_the_promises_hold_over_ten_thousand_runs() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=10_000, stateful_step_count=50, deadline=None)
    )


class Told:
    """A breaker with the defaults, and what it told."""

    def __init__(self, chance: float = 0.0) -> None:
        self.changes: list[tuple[BreakerState, BreakerReason]] = []
        self.breaker = Breaker(
            settings=BreakerSettings(),
            random=lambda: chance,
            changed=lambda state, reason: self.changes.append((state, reason)),
        )

    def call(self, outcome: CallOutcome, at_s: float, *, takes_s: float = 0.0) -> None:
        permit = self.breaker.acquire(at_s)
        assert permit is not None
        self.breaker.resolve(permit, outcome, at_s + takes_s)


def opened_at(at_s: float, chance: float = 0.0) -> Told:
    told = Told(chance)
    for _ in range(20):
        told.call(FAILURE, at_s)
    assert told.breaker.state(at_s) is OPEN
    return told


def test_half_of_twenty_calls_open_it_and_fewer_do_not() -> None:
    told = Told()
    for number in range(19):
        told.call(FAILURE if number < 9 else SUCCESS, 100 + number)
    assert told.breaker.state(119) is CLOSED
    assert told.breaker.window(119) == WindowCounts(calls=19, failures=9, slow=0)

    told.call(FAILURE, 119)

    assert told.changes == [(OPEN, BreakerReason.FAILURES)]
    assert told.breaker.reason is BreakerReason.FAILURES
    assert told.breaker.window(119).calls == 0


def test_calls_of_more_than_thirty_seconds_ago_are_forgotten() -> None:
    told = Told()
    for _ in range(19):
        told.call(FAILURE, 100.9)

    told.call(FAILURE, 130.0)

    assert told.breaker.state(130) is CLOSED
    assert told.breaker.window(130).calls == 1


@given(st.lists(st.integers(0, 70), min_size=1, max_size=60))
def test_the_window_equals_a_recount_after_any_pauses(pauses: list[int]) -> None:
    told = Told()
    ended: list[int] = []
    for now_s in accumulate(pauses, initial=1_000):
        told.call(SUCCESS, now_s + 0.5)
        ended.append(now_s)
        recent = [second for second in ended if second > now_s - 30]
        assert told.breaker.window(now_s).calls == len(recent)


def test_calls_that_are_slow_open_it_although_they_succeed() -> None:
    told = Told()
    for number in range(20):
        told.call(SUCCESS, 100 + number / 4, takes_s=5.1 if number % 2 else 5.0)

    assert told.changes == [(OPEN, BreakerReason.SLOW)]


@pytest.mark.parametrize("outcome", NOTHING_SAID)
def test_what_says_nothing_counts_as_nothing(outcome: CallOutcome) -> None:
    told = Told()
    for _ in range(100):
        told.call(outcome, 100, takes_s=50)

    assert told.changes == []
    assert told.breaker.window(150).calls == 0


def test_open_it_refuses_until_its_time_is_over() -> None:
    told = opened_at(100.0)

    assert told.breaker.refuses(104.9)
    assert told.breaker.acquire(104.9) is None
    assert told.breaker.retry_after_s(104.0) == 1.0
    assert told.breaker.retry_after_s(104.999) == 0.1
    assert not told.breaker.refuses(105.0)
    assert told.breaker.state(105.0) is OPEN

    assert told.breaker.acquire(105.0) is not None
    assert told.changes[-1] == (HALF_OPEN, BreakerReason.DUE)


def test_three_trials_at_once_and_in_all_close_it() -> None:
    breaker = opened_at(100.0).breaker
    trials = [breaker.acquire(105.0) for _ in range(4)]
    assert [trial is not None for trial in trials] == [True, True, True, False]
    assert breaker.retry_after_s(105.0) == 1.0

    for number, trial in enumerate(trials[:3]):
        assert breaker.state(106.0) is HALF_OPEN
        assert breaker.acquire(106.0) is None, number
        assert trial is not None
        breaker.resolve(trial, SUCCESS, 106.0)

    assert breaker.state(106.0) is CLOSED
    assert breaker.reason is BreakerReason.RECOVERED


@pytest.mark.parametrize("outcome", NOTHING_SAID)
def test_a_trial_that_says_nothing_gives_its_permit_back(outcome: CallOutcome) -> None:
    told = opened_at(100.0)
    for _ in range(10):
        told.call(outcome, 105.0)
    for _ in range(3):
        told.call(SUCCESS, 105.0)

    assert told.breaker.state(105.0) is CLOSED


@pytest.mark.parametrize(("outcome", "takes_s"), [(FAILURE, 0.0), (SUCCESS, 5.1)])
def test_one_bad_trial_opens_it_again_for_longer(outcome: CallOutcome, takes_s: float) -> None:
    told = opened_at(100.0)

    told.call(outcome, 105.0, takes_s=takes_s)

    assert told.changes[-1] == (OPEN, BreakerReason.TRIAL_FAILED)
    assert told.breaker.refuses(105.0 + takes_s + 9.9)
    assert not told.breaker.refuses(105.0 + takes_s + 10.0)


def test_a_trial_that_hangs_cannot_hold_it_half_open() -> None:
    told = opened_at(100.0)
    hanging = told.breaker.acquire(105.0)
    assert hanging is not None
    assert told.breaker.state(134.9) is HALF_OPEN

    # Seen long after: it was open from its deadline on, for ten seconds.
    assert told.breaker.state(140.0) is OPEN
    assert told.breaker.reason is BreakerReason.TRIAL_UNDECIDED
    assert told.breaker.refuses(144.9)
    assert not told.breaker.refuses(145.0)

    told.call(SUCCESS, 145.0)
    told.breaker.resolve(hanging, FAILURE, 146.0)
    assert told.breaker.state(146.0) is HALF_OPEN


def test_the_time_grows_to_a_minute_and_begins_anew_after_a_recovery() -> None:
    told = opened_at(0.0)
    now_s, lengths = 0.0, []
    for _ in range(6):
        length_s = next(
            tenths / 10 for tenths in range(1_000) if not told.breaker.refuses(now_s + tenths / 10)
        )
        lengths.append(length_s)
        now_s += length_s
        told.call(FAILURE, now_s)
    assert lengths == [5, 10, 20, 40, 60, 60]

    now_s += 60
    for _ in range(3):
        told.call(SUCCESS, now_s)
    for _ in range(20):
        told.call(FAILURE, now_s)
    assert not told.breaker.refuses(now_s + 5)


def test_how_long_it_was_due_and_nobody_called_is_told() -> None:
    told = opened_at(100.0)
    assert told.breaker.overdue_s(104.0) == 0
    assert told.breaker.overdue_s(107.0) == 2

    assert told.breaker.acquire(107.0) is not None
    assert told.breaker.overdue_s(136.0) == 0
    # The trial was not decided: open from 137 on, for ten seconds.
    assert told.breaker.overdue_s(150.0) == 3
    for _ in range(3):
        told.call(SUCCESS, 150.0)
    assert told.breaker.overdue_s(999.0) == 0


def test_chance_takes_up_to_a_quarter_of_the_time() -> None:
    breaker = opened_at(100.0, chance=0.999).breaker

    assert breaker.refuses(103.75)
    assert not breaker.refuses(103.76)


def test_a_sign_of_life_makes_it_due_at_once() -> None:
    told = opened_at(100.0)

    told.breaker.try_now(101.0)

    assert not told.breaker.refuses(101.0)
    for _ in range(3):
        told.call(SUCCESS, 101.0)
    assert told.breaker.state(101.0) is CLOSED
    told.breaker.try_now(101.0)
    assert told.breaker.state(101.0) is CLOSED


def test_a_late_result_of_an_earlier_generation_changes_nothing() -> None:
    told = Told()
    late = told.breaker.acquire(100.0)
    assert late is not None
    for _ in range(20):
        told.call(FAILURE, 100.0)
    for _ in range(3):
        told.call(SUCCESS, 105.0)

    told.breaker.resolve(late, FAILURE, 106.0)

    assert told.breaker.window(106.0).calls == 0


def test_what_is_seen_without_a_permit_counts_in_its_generation() -> None:
    told = Told()
    generation = told.breaker.generation
    for _ in range(20):
        told.breaker.observe(generation, FAILURE, 100.0)
    assert told.breaker.state(100.0) is OPEN
    told.breaker.observe(told.breaker.generation, FAILURE, 101.0)
    assert not told.breaker.refuses(105.0)

    first = told.breaker.acquire(105.0)
    assert first is not None
    told.breaker.resolve(first, CallOutcome.IGNORED, 105.0)
    for _ in range(3):
        told.breaker.observe(generation, FAILURE, 106.0)
        told.breaker.observe(first.generation, SUCCESS, 106.0)
    assert told.breaker.state(106.0) is CLOSED
