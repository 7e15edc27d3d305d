"""How many requests are in work at once, how many wait for their body, and how many are held.

A request in work uses CPU and the database; one whose body comes slowly uses memory, and a held one
(a stream, `?wait`) only a socket. Each kind has a limit of its own, so that slow bodies and ten
thousand streams leave room for a request. Nothing queues.

Nobody gets all places, whoever holds them: a key, or an address until the key is known.

* In work: another one only while no more are held than are free, else 429. One alone gets half of
  all, the next half of what is left (dynamic thresholds: Choudhury and Hahne, 1998).
* Bodies: where all places are taken, the oldest body of whoever waits for most of them is given up
  for the newcomer (the longest queue is pushed out: Suter and others, 1998). A body that comes in
  time never notices, however many others are slow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import Telemetry

_RETRY_AFTER_S = 1.0

# Gives a place back; idempotent.
Leave = Callable[[], None]


@dataclass(slots=True, kw_only=True)
class Places:
    """One count with its limit. `name` is the limit's in metrics; `what` completes "N requests …".

    One that `is_shared` refuses who holds more than is free, under the limit's name `…_share`.
    """

    name: str
    what: str
    most: int
    telemetry: Telemetry
    is_shared: bool
    taken: int = field(default=0, init=False)
    _holders: dict[str, int] = field(default_factory=dict, init=False)

    def take(self, holder: str) -> Leave:
        """Take a place. Errors: SERVICE_UNAVAILABLE at the limit; TOO_MANY_REQUESTS."""
        free, own = self.most - self.taken, self._holders.get(holder, 0)
        if free <= 0:
            raise self._refusal(self.name, f"{self.most} requests {self.what}")
        if self.is_shared and own > free:
            raise self._refusal(f"{self.name}_share", f"{own} of your requests {self.what}")
        self.taken += 1
        self._holders[holder] = own + 1
        is_there = True

        def leave() -> None:
            nonlocal is_there
            if is_there:
                is_there = False
                self._leave(holder)

        return leave

    def _leave(self, holder: str) -> None:
        self.taken -= 1
        self._holders[holder] -= 1
        if not self._holders[holder]:
            del self._holders[holder]

    def _refusal(self, limit: str, why: str) -> RdevError:
        self.telemetry.limit_checked(limit, refused=True)
        if limit == self.name:
            code, message = ErrorCode.SERVICE_UNAVAILABLE, f"the server is at its limit: {why}"
        else:
            code, message = ErrorCode.TOO_MANY_REQUESTS, f"{why}; the rest is for others"
        return RdevError(code, message, retry_after_s=_RETRY_AFTER_S)


@dataclass(slots=True, kw_only=True)
class Bodies:
    """Requests that wait for their body. A newcomer always gets a place."""

    most: int
    telemetry: Telemetry
    # By holder, each one's oldest first: what gives the wait up.
    _waiting: dict[str, dict[int, Callable[[], None]]] = field(default_factory=dict, init=False)
    _numbers: Iterator[int] = field(default_factory=count, init=False)
    taken: int = field(default=0, init=False)

    def take(self, holder: str, give_up: Callable[[], None]) -> Leave:
        """Take a place; `give_up` is called once where it is taken away again. Synchronous."""
        if self.taken >= self.most:
            self._push_out()
        number = next(self._numbers)
        self._waiting.setdefault(holder, {})[number] = give_up
        self.taken += 1
        return partial(self._leave, holder, number)

    def _push_out(self) -> None:
        """Of those who wait for most bodies the one that waits longest, its oldest."""
        holder = max(self._waiting, key=lambda each: (len(self._waiting[each]), -self._age(each)))
        number = self._age(holder)
        give_up = self._waiting[holder][number]
        self._leave(holder, number)
        self.telemetry.limit_checked("bodies", refused=True)
        give_up()

    def _age(self, holder: str) -> int:
        """The number of its oldest."""
        return next(iter(self._waiting[holder]))

    def _leave(self, holder: str, number: int) -> None:
        own = self._waiting.get(holder, {})
        if own.pop(number, None) is None:
            return
        self.taken -= 1
        if not own:
            del self._waiting[holder]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionStatistics:
    """Now: requests `in_work`, waiting for their body (`reading`), `held` open on purpose."""

    in_work: int
    reading: int
    held: int


class Admission:
    """The three counts of a server. Synchronous: a decision is never interrupted."""

    def __init__(self, *, max_in_flight: int, max_held: int, telemetry: Telemetry) -> None:
        """As many bodies may be on their way as requests in work. The held ones are not shared out:
        streams of a key have a limit of their own (`StreamLimiter`)."""
        self.work = Places(
            name="in_flight",
            what="are in work",
            most=max_in_flight,
            telemetry=telemetry,
            is_shared=True,
        )
        self.held = Places(
            name="held", what="are held open", most=max_held, telemetry=telemetry, is_shared=False
        )
        self.bodies = Bodies(most=max_in_flight, telemetry=telemetry)

    def slot(self, holder: str) -> "Slot":
        """A place for one request that counts nowhere yet."""
        return Slot(self, holder)

    def statistics(self) -> AdmissionStatistics:
        """What is there now."""
        return AdmissionStatistics(
            in_work=self.work.taken, reading=self.bodies.taken, held=self.held.taken
        )


class Slot:
    """The place of one request. Give it back with `release`, in whatever count it is.

    Where a move is refused, the request stays where it was.
    """

    __slots__ = ("_admission", "_at", "_holder", "_leave")

    def __init__(self, admission: Admission, holder: str) -> None:
        """Outside of every count."""
        self._admission = admission
        self._holder = holder
        self._at: Places | Bodies | None = None
        self._leave: Leave = _nothing

    def enter(self) -> None:
        """Count the request as in work; idempotent. Errors: those of `Places.take`."""
        self._move(self._admission.work)

    def belong_to(self, holder: str) -> None:
        """The key is known: what is in work is the key's from here on. Errors: TOO_MANY_REQUESTS,
        and it counts nowhere then."""
        at = self._at
        self._holder = holder
        if at is self._admission.work:
            # Its own place is free for it, also where there is no other.
            self.release()
            self._move(self._admission.work)

    def read(self, give_up: Callable[[], None]) -> None:
        """The body is not there yet: count it as such. `give_up` is called where others need the
        place more."""
        self.release()
        self._leave = self._admission.bodies.take(self._holder, give_up)
        self._at = self._admission.bodies

    def hold(self) -> None:
        """It is held on purpose from now on; idempotent. Errors: SERVICE_UNAVAILABLE."""
        self._move(self._admission.held)

    def release(self) -> None:
        """Leave the count; idempotent."""
        leave, self._leave, self._at = self._leave, _nothing, None
        leave()

    def _move(self, to: Places) -> None:
        if self._at is not to:
            leave = to.take(self._holder)
            self.release()
            self._leave, self._at = leave, to


def _nothing() -> None:
    """Leaves no count."""


def given_up() -> RdevError:
    """What a request is told whose body others could not wait for."""
    message = "the server is at its limit: too many bodies are on their way, and this came slowly"
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=_RETRY_AFTER_S)
