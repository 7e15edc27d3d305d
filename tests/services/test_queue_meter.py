"""The queue is counted without anybody asking, and what cannot be counted is said."""

import trio

from rdev.domain.commands import Priority
from rdev.domain.depths import Depth, Depths, ProjectDepth
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.ports.telemetry import Silence
from rdev.services.queue_meter import EVERY_S, QueueMeter

WAITING = {Priority.HIGH: Depth(queued=2, oldest_wait_s=3.0)}
FOUND = Depths(projects={ProjectId("p"): ProjectDepth(waiting=WAITING)})


class Gate:
    def __init__(self) -> None:
        self.is_away = False

    async def depths(self) -> Depths:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "away")
        return FOUND


class Told(Silence):
    def __init__(self) -> None:
        self.counts: list[Depths | None] = []

    def queue_counted(self, depths: Depths | None) -> None:
        self.counts.append(depths)


async def test_it_counts_until_it_is_stopped_and_survives_a_database_that_is_gone(
    nursery: trio.Nursery,
) -> None:
    gate, told = Gate(), Told()
    meter = QueueMeter(gate=gate, telemetry=told)
    await nursery.start(meter.run)
    await trio.sleep(1)
    assert told.counts == [FOUND]
    gate.is_away = True
    await trio.sleep(EVERY_S)
    gate.is_away = False
    await trio.sleep(EVERY_S)
    assert told.counts == [FOUND, None, FOUND]
    meter.stop()
    meter.stop()
    await trio.sleep(3 * EVERY_S)
    assert len(told.counts) == 3
