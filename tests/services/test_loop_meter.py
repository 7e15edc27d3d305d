"""How late the event loop is, is told."""

import trio
from trio.testing import MockClock

from rdev.ports.telemetry import Silence
from rdev.services.loop_meter import EVERY_S, LoopMeter


class Told(Silence):
    def __init__(self) -> None:
        self.late_s: list[float] = []

    def loop_was_late(self, late_s: float) -> None:
        self.late_s.append(late_s)


async def test_a_loop_that_is_on_time_is_told_so_four_times_a_second(nursery: trio.Nursery):
    told = Told()
    meter = LoopMeter(telemetry=told)
    await nursery.start(meter.run)
    await trio.sleep(1.05)
    assert len(told.late_s) == 4
    assert max(told.late_s) < 0.001
    meter.stop()


async def test_a_loop_that_was_held_is_told_by_how_much(
    mock_clock: MockClock, nursery: trio.Nursery
):
    told = Told()
    meter = LoopMeter(telemetry=told)
    await nursery.start(meter.run)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(EVERY_S + 0.3)  # something did not give way for so long
    with trio.fail_after(1):
        while not told.late_s:
            await trio.lowlevel.checkpoint()
    assert abs(told.late_s[0] - 0.3) < 0.001
    meter.stop()
