"""What an operator wants to know of the database itself."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """The database at one moment.

    `oldest_transaction_s`: for how long the oldest transaction has been open that keeps something
    from being cleaned away. `xmin_age`: how many transactions have begun since the oldest one that
    anybody may still see. `connections`: sessions of clients, of all databases.
    """

    oldest_transaction_s: float
    xmin_age: float
    size_bytes: float
    connections: float
    connections_max: float


class DatabaseVitals(Protocol):
    """Looking at the database."""

    async def look(self) -> Vitals:
        """The database now. Errors: SERVICE_UNAVAILABLE."""
        ...
