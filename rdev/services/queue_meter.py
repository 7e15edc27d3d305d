"""SUBSYSTEM QueueMeter: has the queue counted now and then, for those who watch.

Woken by time alone. Its counts are the gate's (`depths.py`), which bounds what counting may cost;
where the queue cannot be counted that is said instead of an old number. Drops nothing; stops at
once.
"""

from typing import Protocol

import trio

from rdev.domain.depths import Depths
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import Telemetry
from rdev.services.beat import next_beat_s

# Less than the interval of a scrape.
EVERY_S = 10.0


class Counting(Protocol):
    """What is asked of the gate."""

    async def depths(self) -> Depths:
        """The queue as it is about now. Errors: SERVICE_UNAVAILABLE."""
        ...


class QueueMeter:
    """Counts and tells."""

    name = "queue_meter"

    def __init__(self, *, gate: Counting, telemetry: Telemetry) -> None:
        """Counts nothing yet."""
        self._gate = gate
        self._telemetry = telemetry
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

    async def run_once(self) -> None:
        """Count once, and tell."""
        try:
            self._telemetry.queue_counted(await self._gate.depths())
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            self._telemetry.queue_counted(None)
