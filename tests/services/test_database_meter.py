"""The database is looked at without anybody asking, and what cannot be seen is not made up."""

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.vitals import Vitals
from rdev.services.database_meter import EVERY_S, UNKNOWN, DatabaseMeter

SEEN = Vitals(
    oldest_transaction_s=1.0, xmin_age=2.0, size_bytes=3.0, connections=4.0, connections_max=5.0
)


class Database:
    def __init__(self) -> None:
        self.is_away = False

    async def look(self) -> Vitals:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "away")
        return SEEN


async def test_it_looks_until_it_is_stopped_and_survives_a_database_that_is_gone(
    nursery: trio.Nursery,
) -> None:
    database = Database()
    meter = DatabaseMeter(database=database)
    assert meter.statistics() is UNKNOWN
    await nursery.start(meter.run)
    await trio.sleep(1)
    assert meter.statistics() is SEEN
    database.is_away = True
    await trio.sleep(EVERY_S)
    assert meter.statistics() is UNKNOWN
    database.is_away = False
    await trio.sleep(EVERY_S)
    assert meter.statistics() is SEEN
    meter.stop()
    meter.stop()
