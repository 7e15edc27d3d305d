"""How often something happened lately."""

from collections import deque

WINDOW_S = 10.0


class RecentRate:
    """Events per second over the last `WINDOW_S` seconds; memory: one entry for each second.

    The times are any clock's that only goes forward, in seconds.
    """

    def __init__(self) -> None:
        # (whole second, events in it), oldest first.
        self._seconds: deque[tuple[int, int]] = deque()

    def add(self, now_s: float, events: int) -> None:
        """So many happened now."""
        second = int(now_s)
        if self._seconds and self._seconds[-1][0] == second:
            _, before = self._seconds.pop()
            events += before
        self._seconds.append((second, events))
        self._forget(now_s)

    def per_s(self, now_s: float) -> float:
        """The rate now."""
        self._forget(now_s)
        return sum(events for _, events in self._seconds) / WINDOW_S

    def _forget(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] <= now_s - WINDOW_S:
            self._seconds.popleft()
