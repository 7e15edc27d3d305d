"""What goes first: days by age, then by size; never what is still written."""

from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.retention import BatchSize, OutputDay, Retention, days_to_drop

TODAY = date(2026, 3, 1)
KEEP = Retention(days=7, log_max_bytes=100)


def day(age_days: int, size_bytes: int = 1, *, is_settled: bool = True) -> OutputDay:
    return OutputDay(
        day=TODAY - timedelta(days=age_days),
        age_days=age_days,
        size_bytes=size_bytes,
        is_settled=is_settled,
    )


def ages(dropped: list[OutputDay]) -> list[int]:
    return [one.age_days for one in dropped]


def test_days_that_are_over_long_enough_go() -> None:
    stored = [day(age) for age in (12, 9, 8, 7, 1, 0, -1, -2)]
    assert ages(days_to_drop(stored, KEEP)) == [12, 9, 8]


def test_the_oldest_go_while_all_is_too_much() -> None:
    stored = [day(5, 60), day(4, 30), day(3, 30), day(1, 30), day(0, 30)]
    assert ages(days_to_drop(stored, KEEP)) == [5, 4]


def test_today_stays_however_large_it_is() -> None:
    assert ages(days_to_drop([day(1, 1), day(0, 10_000), day(-1, 1)], KEEP)) == [1]


def test_a_day_in_which_a_command_lives_stays_and_others_go_for_it() -> None:
    stored = [day(10, 90, is_settled=False), day(2, 20), day(1, 20)]
    assert ages(days_to_drop(stored, KEEP)) == [2, 1]


@given(
    st.lists(
        st.tuples(st.integers(-3, 30), st.integers(0, 80), st.booleans()),
        max_size=12,
        unique_by=lambda drawn: drawn[0],  # there is one partition a day
    ),
    st.integers(1, 10),
    st.integers(0, 300),
)
def test_what_is_dropped_was_due_and_nothing_due_stays(
    drawn: list[tuple[int, int, bool]], days: int, most: int
) -> None:
    keep = Retention(days=days, log_max_bytes=most)
    stored = [day(age, size, is_settled=settled) for age, size, settled in drawn]
    dropped = days_to_drop(stored, keep)
    assert all(one.age_days >= 1 and one.is_settled for one in dropped)
    assert ages(dropped) == sorted(ages(dropped), reverse=True)
    left = [one for one in stored if one not in dropped]
    left_bytes = sum(one.size_bytes for one in left)
    droppable = [one for one in left if one.is_settled and one.age_days >= 1]
    assert not [one for one in droppable if one.age_days > days]
    assert left_bytes <= most or not droppable
    # Not one day too many: with the youngest that went, it was too old or all was too much.
    if dropped and dropped[-1].age_days <= days:
        assert left_bytes + dropped[-1].size_bytes > most


def test_a_batch_shrinks_where_it_is_slow_and_grows_again() -> None:
    size = BatchSize()
    assert size.rows == 1_000
    for _ in range(3):
        size.took(0.2)
    assert size.rows == 125
    size.took(0.08)
    assert size.rows == 125
    for _ in range(9):
        size.took(0.01)
    assert size.rows == 1_000
    for _ in range(20):
        size.took(5)
    assert size.rows == 1
