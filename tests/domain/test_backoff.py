"""Pauses between tries."""

from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.backoff import Backoff


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(random=lambda: 1.0, first_s=1.0, most_s=10.0)
    assert [backoff.next_s() for _ in range(6)] == [1, 2, 4, 8, 10, 10]


@given(random=st.floats(0, 1, exclude_max=True), failures=st.integers(0, 10_000))
def test_a_pause_is_within_its_ceiling_however_often_it_failed(
    random: float, failures: int
) -> None:
    backoff = Backoff(random=lambda: random)
    backoff.failures = min(failures, 32)
    ceiling_s = min(5.0, 0.05 * 2**backoff.failures)
    assert 0.1 * ceiling_s <= backoff.next_s() <= ceiling_s
    for _ in range(min(failures, 100)):
        assert backoff.next_s() <= 5.0
    assert backoff.failures <= 32
