"""What is kept, for how long, and what goes first. Days are UTC; sizes are bytes on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

from rdev.domain.ids import AttemptId, CommandId, ProjectId

# So long what happened to commands is kept for the feeds (the contract: 7 days).
FEED_KEPT_S = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDay:
    """The stored output of all commands that were accepted on one day.

    `age_days` by the store's clock: 0 is today, less than 0 a day that was made ahead.
    `is_settled`: all commands of the day have ended, so nothing is written there any more.
    """

    day: date
    age_days: int
    size_bytes: int
    is_settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long what has ended is kept, and how many bytes of output in all."""

    days: int
    log_max_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that has ended, as the housekeeper needs to know it.

    `attempt` is its last one; the first, where none began.
    """

    command: CommandId
    attempt: AttemptId
    project: ProjectId
    ended_at: datetime


def days_to_drop(stored: Sequence[OutputDay], retention: Retention) -> list[OutputDay]:
    """The days whose output goes, oldest first; never today's, and none in which a command waits
    or runs.

    1. Every day that was over more than `retention.days` days ago.
    2. Then the oldest, while all that is stored is more than `retention.log_max_bytes`.
    """
    dropped: list[OutputDay] = []
    size_bytes = sum(one.size_bytes for one in stored)
    for one in sorted(stored, key=lambda one: one.day):
        is_old = one.age_days > retention.days
        if one.age_days < 1 or not (is_old or size_bytes > retention.log_max_bytes):
            break
        if one.is_settled:
            dropped.append(one)
            size_bytes -= one.size_bytes
    return dropped


class BatchSize:
    """How many rows the next statement may take: as many as take at most `MOST_S`."""

    MOST_ROWS = 1_000
    MOST_S = 0.1

    def __init__(self) -> None:
        self.rows = self.MOST_ROWS

    def took(self, seconds: float) -> None:
        """The last statement took so long: half as many next time, or up to twice as many."""
        if seconds > self.MOST_S:
            self.rows = max(1, self.rows // 2)
        elif seconds < self.MOST_S / 2:
            self.rows = min(self.MOST_ROWS, self.rows * 2)
