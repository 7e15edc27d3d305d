"""What a subsystem is, and how a set of them lives and ends together.

One that crashes, or returns before it was told to stop, takes the others down: a server with a
missing part must not look healthy.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio


class Subsystem(Protocol):
    """A long-running part of the server. It owns exactly one nursery, starts no task elsewhere."""

    @property
    def name(self) -> str:
        """For logs and task names."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> None:
        """Call `started` when it can serve; return only after `stop`, with its work in hand
        finished; raise to take the process down."""
        ...

    def stop(self) -> None:
        """Ask for the end. Synchronous and idempotent."""
        ...


class SubsystemEndedError(Exception):
    """A subsystem returned although nobody had told it to stop."""


async def run_subsystems(
    subsystems: Sequence[Subsystem],
    *,
    stop: trio.Event,
    drain: Callable[[], Awaitable[None]],
    grace_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Start them in order, and at `stop` end them all at once within `grace_s` seconds.

    All at once: in reverse order HTTP would wait for streams that only the hub can end. `drain`
    runs between `stop` and the end of service. What has not ended after the grace is cancelled.
    Errors: whatever a subsystem raised, in a group; SubsystemEndedError.
    """
    async with trio.open_nursery() as nursery:
        for subsystem in subsystems:
            await nursery.start(_supervise, subsystem, stop, name=subsystem.name)
        task_status.started()
        await stop.wait()
        await drain()
        for subsystem in subsystems:
            subsystem.stop()
        nursery.cancel_scope.deadline = trio.current_time() + grace_s


async def _supervise(
    subsystem: Subsystem, stop: trio.Event, *, task_status: trio.TaskStatus[None]
) -> None:
    await subsystem.run(task_status=task_status)
    if not stop.is_set():
        raise SubsystemEndedError(f"{subsystem.name} ended by itself")
