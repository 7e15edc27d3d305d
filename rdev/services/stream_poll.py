"""SUBSYSTEM StreamPoll: the floor under the streams when notifications are lost.

Once a second it asks the log how far the watched streams stand that other servers write, and has
their readers look where a number has moved. So with every NOTIFY lost no line is later than that
second (measured without: 15 s, the next heartbeat). Bounds: `BATCH_MAX` streams in a statement.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId
from rdev.ports.output import OutputLog
from rdev.services.beat import next_beat_s

POLL_S = 1.0
BATCH_MAX = 1_000


class StreamPoll:
    """One loop; keeps one number for each watched stream."""

    name = "stream-poll"

    def __init__(
        self,
        *,
        log: OutputLog,
        holder: str,
        watched: Callable[[], Collection[CommandId]],
        wake_each: Callable[[Iterable[CommandId]], None],
    ) -> None:
        """What `holder`, this server, runs is published here and not asked for. `wake_each` does
        not wait."""
        self._log = log
        self._holder = holder
        self._watched = watched
        self._wake_each = wake_each
        self._heads: Mapping[CommandId, int] = {}
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Poll until `stop`. Survives a database that is gone: the next turn looks again."""
        task_status.started()
        while not self._stop.is_set():
            with trio.move_on_at(next_beat_s(POLL_S)):
                await self._stop.wait()
                return
            try:
                await self.run_once()
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()

    async def run_once(self) -> None:
        """Wake the readers of streams that moved; of new ones too, whose readers may have looked
        before the last move. Errors: SERVICE_UNAVAILABLE."""
        watched = tuple(self._watched())
        heads: dict[CommandId, int] = {}
        for first in range(0, len(watched), BATCH_MAX):
            batch = watched[first : first + BATCH_MAX]
            heads |= await self._log.heads(batch, written_by_others_than=self._holder)
        moved = [command for command, seq in heads.items() if self._heads.get(command) != seq]
        self._heads = heads
        self._wake_each(moved)
