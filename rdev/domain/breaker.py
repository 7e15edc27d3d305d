"""When to stop calling what keeps failing: closed, open, half_open.

* **closed**: every call is let through and its outcome counted, over the last `window_s` seconds.
  With at least `calls_min` calls there, of which `failure_rate` failed or `slow_rate` took longer
  than `slow_s`, it opens.
* **open**: calls are refused, for `open_first_s`, doubled at each opening that follows without a
  recovery, up to `open_most_s`, less up to a quarter of it by chance.
* **half_open**: the first call after that, and up to `permits` at once and in all, are trials. As
  many successes close it; one failure, or a slow call, opens it again; what is neither gives its
  permit back. Not decided after `half_open_s`, it is open again: a trial that hangs cannot hold it.

A permit always resolves, as one of `CallOutcome`, and once: what comes later changes nothing. Each
change of state begins a new generation; the outcome of a call of an earlier one is not counted.
Times are seconds of one clock that only goes forward. Bounds: three numbers for each second of the
window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """What happens to a call."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class BreakerReason(StrEnum):
    """Why it is in its state."""

    NOTHING = "nothing"  # it never left closed
    FAILURES = "failures"
    SLOW = "slow"
    DUE = "due"  # half open: its time was over
    TRIAL_FAILED = "trial_failed"
    TRIAL_UNDECIDED = "trial_undecided"
    RECOVERED = "recovered"


class CallOutcome(StrEnum):
    """How a call ended, as far as it says something about what was called.

    `ignored` says nothing about it (the caller's own fault); `cancelled`: the caller went away.
    """

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """Times in seconds, rates from 0 to 1 of the calls in the window."""

    window_s: int = 30
    calls_min: int = 20
    failure_rate: float = 0.5
    slow_rate: float = 0.5
    slow_s: float = 5.0
    open_first_s: float = 5.0
    open_most_s: float = 60.0
    permits: int = 3
    half_open_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCounts:
    """The calls of the window; one that failed slowly is both."""

    calls: int
    failures: int
    slow: int


class Permit:
    """The right to one call. Give it back with `Breaker.resolve`."""

    __slots__ = ("began_s", "generation", "is_resolved", "is_trial")

    def __init__(self, *, generation: int, began_s: float, is_trial: bool) -> None:
        self.generation = generation
        self.began_s = began_s
        self.is_trial = is_trial
        self.is_resolved = False


class Breaker:
    """One breaker; see the module. Synchronous: no decision is ever interrupted."""

    def __init__(
        self,
        *,
        settings: BreakerSettings,
        random: Callable[[], float],
        changed: Callable[[BreakerState, BreakerReason], None] = lambda state, reason: None,
    ) -> None:
        """`random` gives numbers in [0, 1); `changed` is told of each change of state."""
        self.settings = settings
        self.reason = BreakerReason.NOTHING
        self.generation = 0
        self._state = BreakerState.CLOSED
        self._random = random
        self._changed = changed
        self._window = _Window(settings.window_s)
        # Open: until when. Half open: when it must be decided.
        self._until_s = 0.0
        self._openings = 0
        self._trials = 0
        self._successes = 0

    def state(self, now_s: float) -> BreakerState:
        """The state now. One that is open and due stays open until a call comes."""
        self._settle(now_s)
        return self._state

    def refuses(self, now_s: float) -> bool:
        """Whether a call that came now would be refused."""
        self._settle(now_s)
        if self._state is BreakerState.OPEN:
            return now_s < self._until_s
        return (
            self._state is BreakerState.HALF_OPEN
            and self._trials + self._successes >= self.settings.permits
        )

    def acquire(self, now_s: float) -> Permit | None:
        """The right to a call now; None where it is refused."""
        if self._state is BreakerState.CLOSED:
            return Permit(generation=self.generation, began_s=now_s, is_trial=False)
        if self.refuses(now_s):
            return None
        if self._state is BreakerState.OPEN:
            self._change(BreakerState.HALF_OPEN, BreakerReason.DUE)
            self._until_s = now_s + self.settings.half_open_s
        self._trials += 1
        return Permit(generation=self.generation, began_s=now_s, is_trial=True)

    def resolve(self, permit: Permit, outcome: CallOutcome, now_s: float) -> None:
        """The call is over. Has an effect once, and only in the permit's own generation."""
        if permit.is_resolved:
            return
        permit.is_resolved = True
        self._settle(now_s)
        if permit.generation != self.generation:
            return
        if permit.is_trial:
            self._trials -= 1
        self.observe(
            permit.generation,
            outcome,
            now_s,
            is_slow=now_s - permit.began_s > self.settings.slow_s,
        )

    def observe(
        self, generation: int, outcome: CallOutcome, now_s: float, *, is_slow: bool = False
    ) -> None:
        """What was seen of a call that began in that generation, with or without a permit.

        Cases: 1. an earlier generation: nothing; 2. it says nothing: nothing; 3. closed: count it,
        and open where that is too much; 4. half open: one step to either side. An open breaker has
        no calls of its own generation.
        """
        self._settle(now_s)
        if generation != self.generation:
            return
        if outcome is CallOutcome.IGNORED or outcome is CallOutcome.CANCELLED:
            return
        failed = outcome is CallOutcome.FAILURE
        if self._state is BreakerState.CLOSED:
            self._window.add(now_s, failed=failed, slow=is_slow)
            self._judge(now_s)
        elif self._state is BreakerState.HALF_OPEN:
            self._judge_trial(now_s, is_good=not failed and not is_slow)

    def retry_after_s(self, now_s: float) -> float:
        """How long a refused call had better wait; at least a tenth of a second."""
        return max(0.1, self._until_s - now_s) if self._state is BreakerState.OPEN else 1.0

    def try_now(self, now_s: float) -> None:
        """There is a sign that it works again: an open breaker is due at once."""
        self._settle(now_s)
        if self._state is BreakerState.OPEN:
            self._until_s = min(self._until_s, now_s)

    def overdue_s(self, now_s: float) -> float:
        """For how long it has been open and due, and no call came; 0 where it is not."""
        self._settle(now_s)
        return max(0.0, now_s - self._until_s) if self._state is BreakerState.OPEN else 0.0

    def window(self, now_s: float) -> WindowCounts:
        """What is counted now; empty unless closed."""
        return self._window.counts(now_s)

    def _settle(self, now_s: float) -> None:
        """A half-open breaker that was not decided in time is open, as from its deadline on."""
        if self._state is BreakerState.HALF_OPEN and now_s >= self._until_s:
            self._open(self._until_s, BreakerReason.TRIAL_UNDECIDED)

    def _judge(self, now_s: float) -> None:
        window, settings = self._window, self.settings
        if window.calls < settings.calls_min:
            return
        if window.failures >= settings.failure_rate * window.calls:
            self._open(now_s, BreakerReason.FAILURES)
        elif window.slow >= settings.slow_rate * window.calls:
            self._open(now_s, BreakerReason.SLOW)

    def _judge_trial(self, now_s: float, *, is_good: bool) -> None:
        if not is_good:
            self._open(now_s, BreakerReason.TRIAL_FAILED)
            return
        self._successes += 1
        if self._successes >= self.settings.permits:
            self._openings = 0
            self._change(BreakerState.CLOSED, BreakerReason.RECOVERED)

    def _open(self, at_s: float, reason: BreakerReason) -> None:
        settings = self.settings
        ceiling_s = min(settings.open_most_s, settings.open_first_s * 2**self._openings)
        self._openings = min(self._openings + 1, 32)
        self._change(BreakerState.OPEN, reason)
        self._until_s = at_s + ceiling_s * (1 - self._random() / 4)

    def _change(self, state: BreakerState, reason: BreakerReason) -> None:
        self._state, self.reason = state, reason
        self.generation += 1
        self._trials = self._successes = 0
        self._window.clear()
        self._changed(state, reason)


class _Window:
    """Calls by the second they ended in: this second and those before it, `seconds` in all."""

    __slots__ = ("_cells", "_newest", "_seconds", "calls", "failures", "slow")

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # [calls, failures, slow] of a second, at that second modulo the window.
        self._cells = [[0, 0, 0] for _ in range(self._seconds)]
        self._newest = -1
        self.calls = self.failures = self.slow = 0

    def add(self, now_s: float, *, failed: bool, slow: bool) -> None:
        """One more call, ended now."""
        second = int(now_s)
        if second != self._newest:
            self._move_to(second)
        cell = self._cells[second % self._seconds]
        cell[0] += 1
        self.calls += 1
        if failed:
            cell[1] += 1
            self.failures += 1
        if slow:
            cell[2] += 1
            self.slow += 1

    def counts(self, now_s: float) -> WindowCounts:
        """The calls that are in the window now."""
        self._move_to(int(now_s))
        return WindowCounts(calls=self.calls, failures=self.failures, slow=self.slow)

    def _move_to(self, second: int) -> None:
        """Drop what was in the places of the seconds that have begun since."""
        first = max(self._newest + 1, second - self._seconds + 1)
        for passed in range(first, second + 1):
            cell = self._cells[passed % self._seconds]
            self.calls -= cell[0]
            self.failures -= cell[1]
            self.slow -= cell[2]
            cell[:] = (0, 0, 0)
        self._newest = max(self._newest, second)
