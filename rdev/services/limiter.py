"""Who may go on: limits of requests by key and project, by address, and of open streams.

* `RateLimiter`: requests of a key, command starts of a project. Counted in the store, so exact over
  all servers; all windows of a request in one statement, all of them or none. When the store does
  not answer, reads go on and writes are refused with 503.
* `AddressLimiter`: requests and failed authentications of an address. Counted in this process, so
  that hostile requests write nothing.
* `StreamLimiter`: open streams of a key, in this process.

Bounds: `ADDRESSES_MAX` addresses and `DENIALS_MAX` denials are remembered, the least recently used
and the oldest are forgotten first; the store is waited for at most `STORE_WAIT_S`. A denial that is
remembered ends with the moment the store named, counted from before it was asked: so it never
refuses what the store would admit, and a flood costs the store nothing until then.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.limiter import (
    TICKS_PER_S,
    Decision,
    Hit,
    Policy,
    RateLimit,
    SlidingWindow,
)
from rdev.ports.limiter import RateLimits
from rdev.ports.telemetry import Telemetry

# Measured: 0.4 KB each while they come now and then.
ADDRESSES_MAX = 100_000
DENIALS_MAX = 100_000
# An answer takes a millisecond; on a machine that is overloaded without measure, a second. More
# than the store's own patience, so that the store tells its failure itself.
STORE_WAIT_S = 3.0
# When a stream of the same key ends cannot be known.
STREAMS_RETRY_S = 5.0

# What an address is counted as: itself, or the network that one customer has (RFC 6177).
_IPV6_PREFIX = 64

_REQUESTS = "rate_limit"
_COUNTS = ("asked", "refused", "refused_locally", "opened", "closed")


class RateLimitedError(RdevError):
    """TOO_MANY_REQUESTS, with what every window said: `decisions`."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        """The delay is the longest of those that refused."""
        refusing = [one for one in decisions if not one.is_admitted]
        worst = max(refusing, key=lambda one: one.retry_ticks)
        limit = worst.policy.limit
        super().__init__(
            ErrorCode.TOO_MANY_REQUESTS,
            f"the limit {worst.policy.name!r} of {limit.requests} in {limit.window_s} s is reached",
            retry_after_s=worst.retry_s,
            details={"violated-policies": [one.policy.name for one in refusing]},
        )
        self.decisions = tuple(decisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterStatistics:
    """Since the start: questions `asked` of the store, `refused` by it, `refused_locally` without
    asking; reads let in (`opened`) and writes refused (`closed`) because it did not answer. Now:
    `denials` remembered."""

    asked: int
    refused: int
    refused_locally: int
    opened: int
    closed: int
    denials: int


class RateLimiter:
    """The shared windows, behind what this process remembers of them."""

    def __init__(self, *, store: RateLimits, telemetry: Telemetry) -> None:
        """Opens nothing."""
        self._store = store
        self._telemetry = telemetry
        # Until when it is refused, on trio's clock.
        self._denials: OrderedDict[Hit, float] = OrderedDict()
        self._counts: Counter[str] = Counter()

    async def take(self, hits: Sequence[Hit], *, is_write: bool) -> Sequence[Decision]:
        """Count the hits of one request, all or none; what each window said, in order.

        Empty where there are no hits, and for a read that is let in although the store did not
        answer. Errors: RateLimitedError; SERVICE_UNAVAILABLE for a write when the store did not
        answer. Blocks: `STORE_WAIT_S`, and while a statement under way is cancelled.
        """
        if not hits:
            return ()
        denied = [one for hit in hits if (one := self._denied(hit)) is not None]
        if denied:
            self._counts["refused_locally"] += 1
            self._telemetry.limit_checked(_REQUESTS, refused=True)
            self._tell(denied)
            raise RateLimitedError(denied)
        asked_at_s = trio.current_time()
        decisions = await self._ask(hits)
        if decisions is None:
            return self._without_answer(is_write=is_write)
        refused = not all(decision.is_admitted for decision in decisions)
        self._telemetry.limit_checked(_REQUESTS, refused=refused)
        self._tell(decisions)
        if refused:
            self._counts["refused"] += 1
            self._remember(hits, decisions, asked_at_s)
            raise RateLimitedError(decisions)
        return decisions

    def statistics(self) -> LimiterStatistics:
        """What is and what was."""
        counts = {name: self._counts[name] for name in _COUNTS}
        return LimiterStatistics(denials=len(self._denials), **counts)

    def _tell(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            self._telemetry.rate_decided(decision.policy.name, refused=not decision.is_admitted)

    async def _ask(self, hits: Sequence[Hit]) -> Sequence[Decision] | None:
        """What the store says; None when it does not."""
        self._counts["asked"] += 1
        with trio.move_on_after(STORE_WAIT_S):
            try:
                return await self._store.take(hits)
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
        return None

    def _without_answer(self, *, is_write: bool) -> Sequence[Decision]:
        """Reads are open: who cannot be counted may look. Writes are closed."""
        if not is_write:
            self._counts["opened"] += 1
            return ()
        self._counts["closed"] += 1
        message = "the rate limit cannot be checked at the moment"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=1.0)

    def _denied(self, hit: Hit) -> Decision | None:
        """The refusal that still stands."""
        until_s = self._denials.get(hit)
        if until_s is None:
            return None
        left_s = until_s - trio.current_time()
        if left_s <= 0:
            del self._denials[hit]
            return None
        ticks = math.ceil(left_s * TICKS_PER_S)
        return _refusal(hit.policy, ticks)

    def _remember(
        self, hits: Sequence[Hit], decisions: Sequence[Decision], asked_at_s: float
    ) -> None:
        for hit, decision in zip(hits, decisions, strict=True):
            if not decision.is_admitted:
                self._denials[hit] = asked_at_s + decision.retry_s
        while len(self._denials) > DENIALS_MAX:
            self._denials.popitem(last=False)


class AddressLimiter:
    """What one address may do before anybody knows who it is. Synchronous, nothing is stored."""

    def __init__(
        self, *, requests: RateLimit | None, failures: RateLimit | None, telemetry: Telemetry
    ) -> None:
        """None: no such limit."""
        self._requests = _local("address", requests)
        self._failures = _local("failures", failures)
        self._telemetry = telemetry

    def enter(self, address: str) -> None:
        """A request came; one that is refused is not counted. Errors: RateLimitedError."""
        subject = network_of(address)
        if self._failures is not None:
            self._check(self._failures.ask(subject))
        if self._requests is not None:
            self._check(self._requests.take(subject))

    def failed(self, address: str) -> None:
        """A credential was refused. After as many as the limit no more are looked at."""
        if self._failures is not None:
            self._failures.take(network_of(address))

    def _check(self, decision: Decision | None) -> None:
        if decision is None:
            return
        self._telemetry.rate_decided(decision.policy.name, refused=not decision.is_admitted)
        if not decision.is_admitted:
            self._telemetry.limit_checked(decision.policy.name, refused=True)
            raise RateLimitedError([decision])


class StreamLimiter:
    """How many streams a key holds open on this server."""

    def __init__(self, *, most: int, telemetry: Telemetry) -> None:
        self.most = most
        self._telemetry = telemetry
        self._open: Counter[str] = Counter()

    def enter(self, subject: str) -> Callable[[], None]:
        """Count a stream until the function that is returned is called (once).

        Errors: TOO_MANY_REQUESTS.
        """
        if self._open[subject] >= self.most:
            self._telemetry.limit_checked("streams", refused=True)
            raise RdevError(
                ErrorCode.TOO_MANY_REQUESTS,
                f"{self.most} streams of this key are open, as many as there may be",
                retry_after_s=STREAMS_RETRY_S,
                details={"violated-policies": ["streams"]},
            )
        self._open[subject] += 1
        return lambda: self._leave(subject)

    def left(self, subject: str) -> int:
        """How many more it may open."""
        return self.most - self._open.get(subject, 0)

    def _leave(self, subject: str) -> None:
        self._open[subject] -= 1
        if not self._open[subject]:
            del self._open[subject]


class _LocalWindows:
    """The windows of one policy by subject, in this process: the least recently used go first."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._windows: OrderedDict[str, SlidingWindow] = OrderedDict()

    def ask(self, subject: str) -> Decision | None:
        """What a hit would come to; None for a subject that has none."""
        window = self._windows.get(subject)
        return None if window is None else window.ask(self.policy, _now())

    def take(self, subject: str) -> Decision:
        """Count a hit where it is admitted."""
        window = self._windows.get(subject)
        if window is None:
            window = self._windows[subject] = SlidingWindow()
            if len(self._windows) > ADDRESSES_MAX:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(subject)
        return window.take(self.policy, _now())


def _local(name: str, limit: RateLimit | None) -> _LocalWindows | None:
    return None if limit is None else _LocalWindows(Policy(name=name, limit=limit))


def network_of(address: str) -> str:
    """What an address is counted as: IPv4 alone, IPv6 by its /64; IPv4 in IPv6 is IPv4.

    An address that is none counts as itself.
    """
    if ":" not in address:
        return address
    try:
        found = IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return f"{IPv6Address(int(found) >> _IPV6_PREFIX << _IPV6_PREFIX)}/{_IPV6_PREFIX}"


def _refusal(policy: Policy, ticks: int) -> Decision:
    return Decision(
        policy=policy, is_admitted=False, remaining=0, reset_ticks=ticks, retry_ticks=ticks
    )


def _now() -> int:
    return int(trio.current_time() * TICKS_PER_S)
