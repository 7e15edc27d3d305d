"""How often somebody may: a window that slides in steps and counts every step whole.

The window of W seconds is cut into `SUB_WINDOWS` cells (k = 60). A hit at time t is counted in the
cell that t lies in; it is admitted while the cells that touch [t − W, t] hold fewer hits than the
limit. There are k + 1 of them, the oldest counted whole although W only touches its end. So, for
any arrivals (tests/domain/test_limiter.py, against an exact log):

* never above: no closed interval of length W, wherever it begins, holds more admitted hits than
  the limit;
* late by at most W/k: what is refused at t finds as many admitted hits as the limit in
  (t − W − W/k, t]. The rule is an exact window of a length between W and W + W/k.

A refused hit counts nowhere. Memory: at most k + 1 numbers in pairs for each window, however many
hits. Times are whole microseconds ("ticks") of one clock; cells are cut in integers, so no rounding
can move a hit. `sql/0007_rate_limits.sql` is the same rule in PostgreSQL.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SUB_WINDOWS = 60
TICKS_PER_S = 1_000_000

REQUESTS_MAX = 1_000_000
WINDOW_MAX_S = 86_400

_TEXT = re.compile(r"([0-9]{1,7})/([0-9]{1,5})s")
OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """So many requests in any `window_s` seconds. 1–1,000,000 in 1–86,400 s."""

    requests: int
    window_s: int

    @property
    def window_ticks(self) -> int:
        """The window in microseconds."""
        return self.window_s * TICKS_PER_S


def parse_rate_limit(text: str) -> RateLimit | None:
    """`600/60s`; None for `off`. Errors: ValueError that says what is allowed."""
    if text == OFF:
        return None
    found = _TEXT.fullmatch(text)
    limit = found and RateLimit(requests=int(found[1]), window_s=int(found[2]))
    if (
        not limit
        or not 1 <= limit.requests <= REQUESTS_MAX
        or not 1 <= limit.window_s <= WINDOW_MAX_S
    ):
        raise ValueError(
            f"must be REQUESTS/SECONDSs (like 600/60s; 1–{REQUESTS_MAX:,} in 1–{WINDOW_MAX_S:,} s)"
            f" or {OFF}"
        )
    return limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is limited, by the name that clients see, and how."""

    name: str
    limit: RateLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One use that a policy counts, and whose: a key, a project, an address."""

    policy: Policy
    subject: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a window says to a hit. Ticks count from the moment of the decision.

    `remaining`: further hits that would be admitted at that moment. `reset_ticks`: until hits of
    this window leave it and `remaining` can grow. `retry_ticks`: 0 where it is admitted, else the
    time after which the same hit is admitted if nobody else's is before; one tick earlier it is
    not.
    """

    policy: Policy
    is_admitted: bool
    remaining: int
    reset_ticks: int
    retry_ticks: int

    @property
    def retry_s(self) -> float:
        """`retry_ticks` in seconds."""
        return self.retry_ticks / TICKS_PER_S


class SlidingWindow:
    """The hits of one subject under one policy.

    A clock that is set back by up to a window goes on counting in the newest cell; one that is set
    back further begins anew.
    """

    __slots__ = ("_cells", "_hits", "_used")

    def __init__(self) -> None:
        """No hits yet. Two lists of equal length: cells with hits, ascending, and their hits."""
        self._cells: list[int] = []
        self._hits: list[int] = []
        self._used = 0

    def ask(self, policy: Policy, now: int) -> Decision:
        """What a hit at tick `now` would come to. Forgets what is over, counts nothing."""
        window = policy.limit.window_ticks
        self._forget(_cell_of(self._cells, now, window))
        free = policy.limit.requests - self._used
        is_admitted = free > 0
        retry_at = now if is_admitted else self._leaves_at(self._last_to_leave(1 - free), window)
        return Decision(
            policy=policy,
            is_admitted=is_admitted,
            remaining=max(0, free),
            reset_ticks=self._leaves_at(0, window) - now if self._cells else 0,
            retry_ticks=retry_at - now,
        )

    def take(self, policy: Policy, now: int) -> Decision:
        """As `ask`, and counts the hit where it is admitted; `remaining` is what is left then."""
        window = policy.limit.window_ticks
        cell = _cell_of(self._cells, now, window)
        self._forget(cell)
        if self._used >= policy.limit.requests:
            return self.ask(policy, now)
        if self._cells and self._cells[-1] == cell:
            self._hits[-1] += 1
        else:
            self._cells.append(cell)
            self._hits.append(1)
        self._used += 1
        return Decision(
            policy=policy,
            is_admitted=True,
            remaining=policy.limit.requests - self._used,
            reset_ticks=self._leaves_at(0, window) - now,
            retry_ticks=0,
        )

    def _forget(self, cell: int) -> None:
        """Drop the cells that a window ending in `cell` does not touch, or does not know yet."""
        if self._cells and self._cells[-1] > cell:
            self._cells, self._hits, self._used = [], [], 0
        gone = 0
        while gone < len(self._cells) and self._cells[gone] < cell - SUB_WINDOWS:
            self._used -= self._hits[gone]
            gone += 1
        if gone:
            del self._cells[:gone], self._hits[:gone]

    def _last_to_leave(self, count: int) -> int:
        """The index of the oldest cell with whose end `count` hits have left."""
        index = 0
        while (count := count - self._hits[index]) > 0:
            index += 1
        return index

    def _leaves_at(self, index: int, window: int) -> int:
        """The first tick at which the hits of that cell are no longer counted."""
        return -(-(self._cells[index] + SUB_WINDOWS + 1) * window // SUB_WINDOWS)


def take_all(asked: Sequence[tuple[Policy, SlidingWindow]], now: int) -> list[Decision]:
    """One hit in every window, or in none: a refusal by one consumes nothing in the others.

    The decisions in the order asked; those that would have admitted say so.
    """
    decisions = [window.ask(policy, now) for policy, window in asked]
    if all(decision.is_admitted for decision in decisions):
        return [window.take(policy, now) for policy, window in asked]
    return decisions


def _cell_of(cells: Sequence[int], now: int, window: int) -> int:
    """The cell that is counted in: the clock's, unless it was set back a little."""
    cell = now * SUB_WINDOWS // window
    if cells and cell < cells[-1] <= cell + SUB_WINDOWS:
        return cells[-1]
    return cell
