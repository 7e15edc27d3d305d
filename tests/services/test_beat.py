"""When ticks are due: together, and never later than their period."""

import pytest
import trio
from trio.testing import MockClock

from rdev.services.beat import next_beat_s


async def test_the_next_beat_is_the_same_for_all_who_ask_between_two(mock_clock: MockClock) -> None:
    mock_clock.jump(17.25)
    first_s = next_beat_s(1.0)
    mock_clock.jump(0.5)
    assert next_beat_s(1.0) == first_s == 18.0


async def test_a_slower_tick_falls_on_a_faster_one(mock_clock: MockClock) -> None:
    mock_clock.jump(18.25)
    assert next_beat_s(2.0) == 20.0
    mock_clock.jump(1.0)
    assert next_beat_s(1.0) == 20.0


@pytest.mark.parametrize("every_s", [0.1, 0.3, 0.7, 1.0, 2.0, 15.0])
async def test_a_beat_is_ahead_and_at_most_its_period_away(
    mock_clock: MockClock, every_s: float
) -> None:
    mock_clock.jump(100_000.0)
    for _ in range(500):
        now_s = trio.current_time()
        beat_s = next_beat_s(every_s)
        assert now_s < beat_s <= now_s + every_s + 1e-6
        mock_clock.jump(beat_s - now_s)
