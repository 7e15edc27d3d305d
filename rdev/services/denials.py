"""Who was refused: of each address, reason and minute the first is an entry, the rest a count.
An address is what the limiter counts as one: of IPv6 a /64, which is one client's.

Bounds: `PAIRS_MAX` pairs of address and reason a minute; what comes beyond is counted by reason
alone. `WAITING_MAX` entries wait while the database is away; beyond that the oldest are lost, and
counted in `statistics`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio

from rdev.domain.audit import Denial
from rdev.services.limiter import network_of

MINUTE_S = 60.0
PAIRS_MAX = 1_000
WAITING_MAX = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DenialStatistics:
    """What waits to be written, and what was lost while the database was away."""

    waiting: int
    lost: int


class Denials:
    """Collects refusals; nothing here waits. Times are `trio.current_time()`."""

    def __init__(self) -> None:
        self._until_s = float("-inf")
        # The first refusal of each pair in this minute, and how many followed it.
        self._seen: dict[tuple[str | None, str], Denial] = {}
        self._waiting: deque[Denial] = deque()
        self._lost = 0

    def note(self, denial: Denial) -> None:
        """Somebody was refused now."""
        self._turn()
        key = (None if denial.ip is None else network_of(denial.ip), denial.reason)
        if key not in self._seen and len(self._seen) >= PAIRS_MAX:
            key = (None, denial.reason)
            denial = replace(
                denial, actor="anonymous", actor_name="", ip=None, request_id=None, project=None
            )
        first = self._seen.get(key)
        if first is None:
            self._seen[key] = replace(denial, repeated=0)
            self._wait(denial)
        else:
            self._seen[key] = replace(first, repeated=(first.repeated or 0) + 1)

    def take(self, *, is_last: bool = False) -> list[Denial]:
        """What is to be written now; `is_last`: counts of this minute too."""
        self._turn(is_over=is_last)
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def give_back(self, denials: Sequence[Denial]) -> None:
        """They could not be written: they come first the next time."""
        self._waiting.extendleft(reversed(denials))
        self._trim()

    def statistics(self) -> DenialStatistics:
        """What waits, and what was lost."""
        return DenialStatistics(waiting=len(self._waiting), lost=self._lost)

    def _turn(self, *, is_over: bool = False) -> None:
        """Begin another minute where this one is over: what was counted in it becomes entries."""
        now_s = trio.current_time()
        if now_s < self._until_s and not is_over:
            return
        for denial in self._seen.values():
            if denial.repeated:
                self._wait(denial)
        self._seen.clear()
        self._until_s = now_s + MINUTE_S

    def _wait(self, denial: Denial) -> None:
        self._waiting.append(denial)
        self._trim()

    def _trim(self) -> None:
        while len(self._waiting) > WAITING_MAX:
            self._waiting.popleft()
            self._lost += 1
