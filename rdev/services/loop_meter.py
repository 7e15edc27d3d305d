"""SUBSYSTEM LoopMeter: how late the event loop comes to what is due.

Woken by time alone, four times a second; what it tells is by how much later than asked it ran,
which is what every other task waited too. Drops nothing; stops at once.
"""

from typing import Final

import trio

from rdev.ports.telemetry import Telemetry

EVERY_S: Final = 0.25


class LoopMeter:
    """Sleeps and tells."""

    name = "loop_meter"

    def __init__(self, *, telemetry: Telemetry) -> None:
        """Measures nothing yet."""
        self._telemetry = telemetry
        self._stopping = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`."""
        task_status.started()
        with self._stopping:
            while True:
                due_s = trio.current_time() + EVERY_S
                await trio.sleep_until(due_s)
                self._telemetry.loop_was_late(trio.current_time() - due_s)

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stopping.cancel()
