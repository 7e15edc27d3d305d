"""The rate of the last ten seconds."""

from rdev.domain.rate import WINDOW_S, RecentRate


def test_a_steady_rate_is_told() -> None:
    rate = RecentRate()
    for tick in range(200):
        rate.add(tick / 10, 2)
    assert rate.per_s(19.95) == 20


def test_what_is_over_is_forgotten() -> None:
    rate = RecentRate()
    assert rate.per_s(0) == 0
    rate.add(5.0, 100)
    assert rate.per_s(5.0 + WINDOW_S - 1) == 100 / WINDOW_S
    assert rate.per_s(5.0 + WINDOW_S) == 0
