"""What the services need to know how much is queued."""

from typing import Protocol

from rdev.domain.depths import Depths


class QueueDepths(Protocol):
    """Counting the queue."""

    async def count(self) -> Depths:
        """What is queued and running at one moment, by project and priority.

        Its cost is in commands that wait or run, never in those that have ended.
        Errors: SERVICE_UNAVAILABLE.
        """
        ...
