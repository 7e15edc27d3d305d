"""The window against an exact log: never above the limit, late by at most a sixtieth."""

import random
from bisect import bisect_left, bisect_right
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdev.domain.limiter import (
    SUB_WINDOWS,
    TICKS_PER_S,
    Decision,
    Policy,
    RateLimit,
    SlidingWindow,
    parse_rate_limit,
    take_all,
)

START = 1_767_225_600 * TICKS_PER_S


class ExactLog:
    """Every admitted hit with its time: what the window is compared with."""

    def __init__(self) -> None:
        self.times: list[int] = []

    def held(self, since: int, until: int) -> int:
        """Hits in (since, until]."""
        return bisect_right(self.times, until) - bisect_right(self.times, since)

    def most_in_any(self, length: int) -> int:
        """The most hits in any closed interval of that length."""
        return max(
            (bisect_right(self.times, at + length) - index for index, at in enumerate(self.times)),
            default=0,
        )


def policy(requests: int, window_s: int) -> Policy:
    return Policy(name="key", limit=RateLimit(requests=requests, window_s=window_s))


@st.composite
def traces(draw: st.DrawFn) -> tuple[Policy, list[int]]:
    """A policy, and arrivals that aim at the edges of its cells, in bursts and alone."""
    window_s = draw(st.sampled_from([1, 7, 60, 86_400]))
    requests = draw(st.integers(1, 12))
    window = window_s * TICKS_PER_S
    cell = window // SUB_WINDOWS
    gaps = st.one_of(
        st.just(0),
        st.integers(0, 3),
        st.integers(0, cell),
        st.sampled_from([cell - 1, cell, cell + 1, window - 1, window, window + 1, window + cell]),
        st.integers(0, 2 * window),
    )
    first = START + draw(st.integers(0, window))
    return policy(requests, window_s), list(
        accumulate(draw(st.lists(gaps, min_size=1, max_size=40)), initial=first)
    )


def check_bounds(asked: Policy, arrivals: list[int]) -> None:
    """Both bounds, that refusals consume nothing, and that the delay is exact; hit by hit."""
    length = asked.limit.window_ticks
    limit = asked.limit.requests
    log, window, twin = ExactLog(), SlidingWindow(), SlidingWindow()
    for now in arrivals:
        decision = window.take(asked, now)
        if decision.is_admitted:
            # The exact log over W admits whatever is admitted here.
            assert log.held(now - length - 1, now) < limit
            log.times.append(now)
            assert decision == twin.take(asked, now)
        else:
            # The exact log over W + W/k refuses whatever is refused here.
            assert log.held(now - length - (length // SUB_WINDOWS + 1), now) >= limit
            at = now + decision.retry_ticks
            assert not copy(window).take(asked, at - 1).is_admitted
            assert copy(window).take(asked, at).is_admitted
            assert decision.retry_ticks <= length + length // SUB_WINDOWS + 1
        assert decision.remaining == left(window, asked, now)
        assert 0 < decision.reset_ticks <= length + length // SUB_WINDOWS + 1
    assert log.most_in_any(length) <= limit


def copy(window: SlidingWindow) -> SlidingWindow:
    other = SlidingWindow()
    other._cells, other._hits, other._used = window._cells[:], window._hits[:], window._used
    return other


def left(window: SlidingWindow, asked: Policy, now: int) -> int:
    """How many more hits are admitted at once."""
    other = copy(window)
    return next(number for number in range(10**9) if not other.take(asked, now).is_admitted)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None)
@given(traces())
def test_never_above_the_limit_and_late_by_at_most_a_sub_window(
    trace: tuple[Policy, list[int]],
) -> None:
    check_bounds(*trace)


@pytest.mark.full
@pytest.mark.timeout(3_600)
@settings(max_examples=100_000, deadline=None)
@given(traces())
def test_the_bounds_hold_over_a_hundred_thousand_traces(trace: tuple[Policy, list[int]]) -> None:
    check_bounds(*trace)


def test_the_bounds_hold_under_steady_overload() -> None:
    """What bursts at the edges do not show: many hits a cell, over many windows."""
    chance = random.Random(7)
    for requests, per_window in ((100, 300), (600, 1_000)):
        asked = policy(requests, 60)
        gap = asked.limit.window_ticks // per_window
        gaps = [chance.randrange(2 * gap) for _ in range(4 * per_window)]
        arrivals = list(accumulate(gaps, initial=START))
        log, window = ExactLog(), SlidingWindow()
        for now in arrivals:
            if window.take(asked, now).is_admitted:
                log.times.append(now)
        assert log.most_in_any(asked.limit.window_ticks) <= requests
        # Four windows of overload admit nearly four limits: the price is a sixtieth.
        assert len(log.times) >= 3.8 * requests


def test_the_attack_on_two_counters_admits_no_more_than_the_limit() -> None:
    """A burst at the end of a clock minute and another at its beginning."""
    asked, window = policy(100, 60), SlidingWindow()
    minute = 60 * TICKS_PER_S
    edges = [START + minute - 10_000] * 200 + [START + minute + 10_000] * 200

    assert sum(window.take(asked, now).is_admitted for now in edges) == 100


def test_what_is_left_and_when_more_is_left_are_told() -> None:
    asked, window = policy(2, 60), SlidingWindow()
    later = START + 10 * TICKS_PER_S

    first = window.take(asked, START)
    second = window.take(asked, later)
    third = window.take(asked, later)

    # The first hit's cell is one second long and begins with it.
    assert first == Decision(
        policy=asked, is_admitted=True, remaining=1, reset_ticks=61_000_000, retry_ticks=0
    )
    assert (second.remaining, second.reset_ticks) == (0, 51_000_000)
    assert third == Decision(
        policy=asked,
        is_admitted=False,
        remaining=0,
        reset_ticks=51_000_000,
        retry_ticks=51_000_000,
    )


def test_a_limit_that_was_lowered_lets_as_many_leave_as_are_too_many() -> None:
    window = SlidingWindow()
    for second in range(3):
        assert window.take(policy(3, 60), START + second * TICKS_PER_S).is_admitted

    refused = window.take(policy(1, 60), START + 2 * TICKS_PER_S)

    # The hits of the seconds 0, 1 and 2 leave at 61, 62 and 63.
    assert refused.reset_ticks == 59 * TICKS_PER_S
    assert refused.retry_ticks == 61 * TICKS_PER_S


def test_one_refusal_consumes_nothing_anywhere() -> None:
    wide, narrow = policy(5, 60), policy(1, 60)
    windows = [(wide, SlidingWindow()), (narrow, SlidingWindow())]

    first, second = take_all(windows, START), take_all(windows, START)

    assert [one.is_admitted for one in first] == [True, True]
    assert [one.is_admitted for one in second] == [True, False]
    assert [one.remaining for one in second] == [4, 0]
    assert windows[0][1].ask(wide, START).remaining == 4


def test_a_clock_set_back_by_less_than_a_window_never_lets_more_in() -> None:
    asked, window = policy(1, 60), SlidingWindow()
    assert window.take(asked, START).is_admitted

    back = START - 30 * TICKS_PER_S
    refused = window.take(asked, back)

    assert not refused.is_admitted
    assert refused.retry_ticks == 91 * TICKS_PER_S
    assert not copy(window).take(asked, back + refused.retry_ticks - 1).is_admitted
    assert window.take(asked, back + refused.retry_ticks).is_admitted


def test_a_clock_that_was_far_ahead_does_not_lock_out_until_then() -> None:
    asked, window = policy(1, 60), SlidingWindow()
    assert window.take(asked, START + 3_600 * TICKS_PER_S).is_admitted

    assert window.take(asked, START).is_admitted
    assert not window.take(asked, START).is_admitted


def test_memory_is_bounded_by_the_number_of_cells() -> None:
    asked, window = policy(1_000_000, 60), SlidingWindow()
    for number in range(20_000):
        window.take(asked, START + number * 10_000)

    assert len(window._cells) == len(window._hits) == SUB_WINDOWS + 1
    assert bisect_left(window._cells, window._cells[-1]) == SUB_WINDOWS


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("600/60s", RateLimit(requests=600, window_s=60)),
        ("1/1s", RateLimit(requests=1, window_s=1)),
        ("1000000/86400s", RateLimit(requests=1_000_000, window_s=86_400)),
        ("off", None),
    ],
)
def test_a_limit_is_written_as_requests_in_seconds(text: str, limit: RateLimit | None) -> None:
    assert parse_rate_limit(text) == limit


@pytest.mark.parametrize(
    "text",
    [
        "",
        "600",
        "600/60",
        "0/60s",
        "1/0s",
        "1000001/60s",
        "1/86401s",
        "-1/60s",
        "6.5/1s",
        "OFF",
        " 600/60s",
        "600/1m",
        "٦/60s",
    ],
)
def test_anything_else_is_no_limit(text: str) -> None:
    with pytest.raises(ValueError, match="must be REQUESTS"):
        parse_rate_limit(text)
