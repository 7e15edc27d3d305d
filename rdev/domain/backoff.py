"""How long to wait before trying again: doubling pauses with full jitter."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Backoff:
    """A run of failures. `random` gives numbers in [0, 1).

    Source: "full jitter", AWS Architecture Blog, 2015.
    """

    random: Callable[[], float]
    first_s: float = 0.05
    most_s: float = 5.0
    failures: int = 0

    def next_s(self) -> float:
        """The next pause, in (0, `most_s`]; never less than a tenth of its ceiling."""
        ceiling_s = min(self.most_s, self.first_s * 2**self.failures)
        self.failures = min(self.failures + 1, 32)
        return float(ceiling_s * (0.1 + 0.9 * self.random()))
