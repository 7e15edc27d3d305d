"""Counting hits where all servers see them."""

from collections.abc import Sequence
from typing import Protocol

from rdev.domain.limiter import Decision, Hit


class RateLimits(Protocol):
    """One sliding window for each policy (by name and length) and subject; see `SlidingWindow`."""

    async def take(self, hits: Sequence[Hit]) -> list[Decision]:
        """Count every hit, or none: a refusal by one window consumes nothing in the others.

        The decisions in the order of `hits`, which name no window twice; `[]` for none. Two servers
        that ask at once are answered one after the other, on one clock. A crash of the store may
        forget what was counted in the last moment (under a second) before it.
        Errors: SERVICE_UNAVAILABLE; the hits may have been counted then. Cancellation: likewise.
        """
        ...
