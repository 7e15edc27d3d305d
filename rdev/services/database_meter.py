"""SUBSYSTEM DatabaseMeter: looks at the database now and then, for those who watch.

Woken by time alone; one statement each time. What could not be looked at is not a number, instead
of an old one. Drops nothing; stops at once.
"""

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.vitals import DatabaseVitals, Vitals
from rdev.services.beat import next_beat_s

# About the interval of a scrape. The size of a database is a look at each of its files.
EVERY_S = 15.0

_NAN = float("nan")
UNKNOWN = Vitals(
    oldest_transaction_s=_NAN,
    xmin_age=_NAN,
    size_bytes=_NAN,
    connections=_NAN,
    connections_max=_NAN,
)


class DatabaseMeter:
    """Looks and remembers."""

    name = "database_meter"

    def __init__(self, *, database: DatabaseVitals) -> None:
        """Looks at nothing yet."""
        self._database = database
        self._last = UNKNOWN
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Survives a database that is gone."""
        task_status.started()
        while not self._stop.is_set():
            await self.run_once()
            with trio.move_on_at(next_beat_s(EVERY_S)):
                await self._stop.wait()

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()

    def statistics(self) -> Vitals:
        """What was seen last; `UNKNOWN` where nothing could be."""
        return self._last

    async def run_once(self) -> None:
        """Look once."""
        try:
            self._last = await self._database.look()
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            self._last = UNKNOWN
