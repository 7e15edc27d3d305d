"""What the housekeeper asks of the store."""

from typing import Protocol


class Upkeep(Protocol):
    """Duties that are idempotent and safe to do from several servers at once."""

    async def ensure_output_partitions(self, *, days_ahead: int) -> None:
        """Make the partitions of today and of the days that follow. Errors: SERVICE_UNAVAILABLE."""
        ...
