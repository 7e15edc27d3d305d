"""A breaker as adapters use it: around each call of what may be gone."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rdev.domain.breaker import CallOutcome


class Call(Protocol):
    """One call that was let through. It is over with its block."""

    # How it ended, where the block knows better than its exception says; a block that ends by
    # cancellation was cancelled all the same.
    outcome: CallOutcome | None


class CallBreaker(Protocol):
    """Lets calls through, or refuses them at once."""

    def call(self) -> AbstractContextManager[Call]:
        """Around one call. Errors: SERVICE_UNAVAILABLE at once where it is open."""
        ...

    def try_now(self) -> None:
        """There is a sign that calls succeed again; an open breaker tries the next one."""
        ...


class Unbroken:
    """The breaker of what has none: lets everything through."""

    outcome: CallOutcome | None = None

    def call(self) -> AbstractContextManager["Unbroken"]:
        """Nothing is counted."""
        return nullcontext(Unbroken())

    def try_now(self) -> None:
        """Nothing."""
