"""Rate limits in memory, on the rule of the domain."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.limiter import TICKS_PER_S, Decision, Hit, SlidingWindow, take_all


class FakeRateLimits:
    """`RateLimits` on trio's clock, or another one, in seconds."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._windows: defaultdict[tuple[str, str, int], SlidingWindow] = defaultdict(SlidingWindow)
        # Times it was asked, and whether it can answer.
        self.asked = 0
        self.is_gone = False
        self.takes_s = 0.0

    async def take(self, hits: Sequence[Hit]) -> list[Decision]:
        self.asked += 1
        await trio.sleep(self.takes_s)
        if self.is_gone:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the store is gone", retry_after_s=1)
        now = round(self._clock() * TICKS_PER_S)
        return take_all([(hit.policy, self._windows[_key(hit)]) for hit in hits], now)


def _key(hit: Hit) -> tuple[str, str, int]:
    return hit.policy.name, hit.subject, hit.policy.limit.window_ticks
