"""The housekeeper: at the start, every hour, and again soon where it failed."""

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.services.housekeeper import DAYS_AHEAD, INTERVAL_S, Housekeeper
from tests.services.scripted import backoff


class NotedUpkeep:
    """Remembers when it was asked, and fails where it is told to."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.error: RdevError | None = None

    async def ensure_output_partitions(self, *, days_ahead: int) -> None:
        assert days_ahead == DAYS_AHEAD
        await trio.lowlevel.checkpoint()
        self.at.append(trio.current_time())
        if self.error is not None:
            raise self.error


async def test_it_works_at_the_start_and_every_hour(nursery: trio.Nursery) -> None:
    upkeep = NotedUpkeep()
    await nursery.start(Housekeeper(upkeep=upkeep, backoff=backoff).run)
    await trio.sleep(2.5 * INTERVAL_S)
    assert upkeep.at == [0, INTERVAL_S, 2 * INTERVAL_S]


async def test_a_database_that_is_gone_is_asked_again_soon(nursery: trio.Nursery) -> None:
    upkeep = NotedUpkeep()
    upkeep.error = RdevError(ErrorCode.SERVICE_UNAVAILABLE, "gone")
    await nursery.start(Housekeeper(upkeep=upkeep, backoff=backoff).run)
    await trio.sleep(60)
    assert 10 < len(upkeep.at) < 60
    upkeep.error = None
    await trio.sleep(10)
    asked = len(upkeep.at)
    await trio.sleep(INTERVAL_S / 2)
    assert len(upkeep.at) == asked


async def test_any_other_error_is_a_fault() -> None:
    upkeep = NotedUpkeep()
    upkeep.error = RdevError(ErrorCode.INTERNAL_ERROR, "no")
    with pytest.raises(RdevError):
        await Housekeeper(upkeep=upkeep, backoff=backoff).run()


async def test_stop_ends_it_at_once() -> None:
    housekeeper = Housekeeper(upkeep=NotedUpkeep(), backoff=backoff)
    async with trio.open_nursery() as own:
        await own.start(housekeeper.run)
        await trio.sleep(10)
        housekeeper.stop()
        housekeeper.stop()
    assert trio.current_time() == 10
