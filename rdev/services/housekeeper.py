"""SUBSYSTEM Housekeeper: what must be done from time to time, whoever does it.

Makes the day partitions of the output ahead of time: at the start and each hour, for today and the
days to come, so that a database that is away for a day costs nothing.
"""

from collections.abc import Callable

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.upkeep import Upkeep

INTERVAL_S = 3_600.0
DAYS_AHEAD = 3


class Housekeeper:
    """One loop; every duty is idempotent, so several servers may do it at once."""

    name = "housekeeper"

    def __init__(self, *, upkeep: Upkeep, backoff: Callable[[], Backoff]) -> None:
        self._upkeep = upkeep
        self._backoff = backoff
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Survives a database that is gone: it tries again with pauses."""
        backoff = self._backoff()
        task_status.started()
        while not self._stop.is_set():
            pause_s = INTERVAL_S
            try:
                await self.run_once()
                backoff = self._backoff()
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                pause_s = backoff.next_s()
            with trio.move_on_after(pause_s):
                await self._stop.wait()

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()

    async def run_once(self) -> None:
        """Every duty once. Errors: SERVICE_UNAVAILABLE."""
        await self._upkeep.ensure_output_partitions(days_ahead=DAYS_AHEAD)
