"""How many requests are in work at once, and how many are held.

A request in work uses CPU and the database; a held one (a stream, `?wait`) only a socket. They have
limits of their own, so that ten thousand streams leave room for a request and the other way round.
At the limit the request is refused with 503 and `Retry-After`; nothing queues.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import Telemetry

_RETRY_AFTER_S = 1.0


class _State(Enum):
    """Which of the two counts the request is in."""

    OUTSIDE = auto()
    IN_WORK = auto()
    HELD = auto()


@dataclass(slots=True, kw_only=True)
class Admission:
    """The two counts of a server. Synchronous: a decision is never interrupted."""

    max_in_flight: int
    max_held: int
    telemetry: Telemetry
    in_flight: int = field(default=0, init=False)
    held: int = field(default=0, init=False)

    def slot(self) -> "Slot":
        """A place for one request that counts nowhere yet."""
        return Slot(self)


class Slot:
    """The place of one request. Give it back with `release`, in whatever state it is."""

    __slots__ = ("_admission", "_state")

    def __init__(self, admission: Admission) -> None:
        """Outside of every count."""
        self._admission = admission
        self._state = _State.OUTSIDE

    def enter(self) -> None:
        """Count the request as in work. Errors: SERVICE_UNAVAILABLE at the limit."""
        admission = self._admission
        if admission.in_flight >= admission.max_in_flight:
            raise self._refusal("in_flight", f"{admission.max_in_flight} requests are in work")
        admission.in_flight += 1
        self._state = _State.IN_WORK

    def hold(self) -> None:
        """Move the request from the work to the held ones; idempotent.

        Errors: SERVICE_UNAVAILABLE at the limit; the request stays in work then.
        """
        if self._state is _State.HELD:
            return
        admission = self._admission
        if admission.held >= admission.max_held:
            raise self._refusal("held", f"{admission.max_held} requests are held open")
        self.release()
        admission.held += 1
        self._state = _State.HELD

    def release(self) -> None:
        """Leave the count; idempotent."""
        if self._state is _State.IN_WORK:
            self._admission.in_flight -= 1
        elif self._state is _State.HELD:
            self._admission.held -= 1
        self._state = _State.OUTSIDE

    def _refusal(self, limit: str, why: str) -> RdevError:
        """Count the refusal and say which limit it was."""
        self._admission.telemetry.limit_checked(limit, refused=True)
        message = f"the server is at its limit: {why}"
        return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=_RETRY_AFTER_S)
