"""What is remembered here, what is asked, and what happens when nobody answers."""

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.limiter import TICKS_PER_S, Hit, Policy, RateLimit
from rdev.ports.telemetry import Silence
from rdev.services import limiter
from rdev.services.limiter import (
    AddressLimiter,
    RateLimitedError,
    RateLimiter,
    StreamLimiter,
    network_of,
)
from tests.fakes.limiter import FakeRateLimits

MINUTE = RateLimit(requests=2, window_s=60)


class Noted(Silence):
    """What was told, in order."""

    def __init__(self) -> None:
        self.checks: list[tuple[str, bool]] = []
        self.decisions: list[tuple[str, bool]] = []

    def limit_checked(self, limit: str, *, refused: bool) -> None:
        self.checks.append((limit, refused))

    def rate_decided(self, policy: str, *, refused: bool) -> None:
        self.decisions.append((policy, refused))


def hit(subject: str = "key_1", *, name: str = "key", limit: RateLimit = MINUTE) -> Hit:
    return Hit(policy=Policy(name=name, limit=limit), subject=subject)


@pytest.fixture
def store() -> FakeRateLimits:
    return FakeRateLimits()


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def limits(store: FakeRateLimits, noted: Noted) -> RateLimiter:
    return RateLimiter(store=store, telemetry=noted)


async def refused(limits: RateLimiter, *hits: Hit) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        await limits.take(hits, is_write=False)
    return caught.value


async def test_the_refusal_names_the_limit_and_the_exact_delay(
    limits: RateLimiter, noted: Noted
) -> None:
    for _ in range(2):
        assert len(await limits.take([hit()], is_write=True)) == 1

    error = await refused(limits, hit())

    assert error.code is ErrorCode.TOO_MANY_REQUESTS
    assert error.message == "the limit 'key' of 2 in 60 s is reached"
    assert error.details == {"violated-policies": ["key"]}
    assert error.retry_after_s == error.decisions[0].retry_ticks / TICKS_PER_S
    assert noted.checks == [("rate_limit", False), ("rate_limit", False), ("rate_limit", True)]
    assert noted.decisions == [("key", False), ("key", False), ("key", True)]


async def test_a_flood_on_a_denied_key_costs_the_store_nothing(
    limits: RateLimiter, store: FakeRateLimits, noted: Noted
) -> None:
    for _ in range(2):
        await limits.take([hit()], is_write=False)
    first = await refused(limits, hit())
    asked = store.asked

    for _ in range(100):
        again = await refused(limits, hit(), hit("demo", name="starts"))

    assert store.asked == asked == 3
    assert again.retry_after_s == pytest.approx(first.retry_after_s)
    assert limits.statistics().refused_locally == 100
    assert noted.checks[-1] == ("rate_limit", True)
    assert noted.decisions.count(("key", True)) == 101


async def test_waiting_as_long_as_told_is_admitted_and_less_is_not(
    limits: RateLimiter, store: FakeRateLimits
) -> None:
    for _ in range(2):
        await limits.take([hit()], is_write=False)
    error = await refused(limits, hit())
    assert error.retry_after_s is not None

    # A clock in floats is not exact to the microsecond.
    await trio.sleep(error.retry_after_s - 10e-6)
    left = await refused(limits, hit())
    assert store.asked == 3
    assert left.retry_after_s == pytest.approx(10e-6, abs=2e-6)

    await trio.sleep(12e-6)
    assert (await limits.take([hit()], is_write=False))[0].is_admitted


async def test_a_denial_never_outlasts_that_of_the_store(
    limits: RateLimiter, store: FakeRateLimits
) -> None:
    """The store's answer was under way for a while: it counts from before it was asked."""
    for _ in range(2):
        await limits.take([hit()], is_write=False)
    store.takes_s = 0.5
    error = await refused(limits, hit())
    assert error.retry_after_s is not None

    await trio.sleep(error.retry_after_s - 0.4)
    store.takes_s = 0.0

    assert store.asked == 3
    await refused(limits, hit())
    assert store.asked == 4


async def test_a_denial_is_of_one_subject_and_one_limit(
    limits: RateLimiter, store: FakeRateLimits
) -> None:
    for _ in range(2):
        await limits.take([hit()], is_write=False)
    await refused(limits, hit())

    await limits.take([hit("key_2")], is_write=False)
    raised = await limits.take([hit(limit=RateLimit(requests=9, window_s=60))], is_write=False)

    assert raised[0].remaining == 6


async def test_what_is_refused_by_the_project_consumes_nothing_of_the_key(
    limits: RateLimiter,
) -> None:
    start = hit("demo", name="starts", limit=RateLimit(requests=1, window_s=60))
    await limits.take([hit(), start], is_write=True)

    error = await refused(limits, hit(), start)
    again = await refused(limits, hit(), start)

    assert [one.remaining for one in error.decisions] == [1, 0]
    assert error.details == again.details == {"violated-policies": ["starts"]}
    assert (await limits.take([hit()], is_write=True))[0].remaining == 0


async def test_without_the_store_reads_go_on_and_writes_are_refused(
    limits: RateLimiter, store: FakeRateLimits, noted: Noted
) -> None:
    store.is_gone = True

    assert await limits.take([hit()], is_write=False) == ()
    with pytest.raises(RdevError) as closed:
        await limits.take([hit()], is_write=True)

    assert closed.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert closed.value.retry_after_s == 1.0
    statistics = limits.statistics()
    assert (statistics.asked, statistics.opened, statistics.closed) == (2, 1, 1)
    assert noted.checks == []


async def test_a_store_that_hangs_is_waited_for_so_long_and_no_longer(
    limits: RateLimiter, store: FakeRateLimits
) -> None:
    store.takes_s = 1_000.0
    began_s = trio.current_time()

    assert await limits.take([hit()], is_write=False) == ()

    assert trio.current_time() - began_s == limiter.STORE_WAIT_S


async def test_other_faults_of_the_store_are_not_swallowed(
    limits: RateLimiter, store: FakeRateLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(hits: object) -> None:
        raise RdevError(ErrorCode.INTERNAL_ERROR, "broken")

    monkeypatch.setattr(store, "take", fail)

    with pytest.raises(RdevError, match="broken"):
        await limits.take([hit()], is_write=False)


async def test_a_request_without_a_limit_asks_nobody(
    limits: RateLimiter, store: FakeRateLimits
) -> None:
    assert await limits.take([], is_write=True) == ()
    assert store.asked == 0


async def test_so_many_denials_are_remembered_and_no_more(
    limits: RateLimiter, store: FakeRateLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiter, "DENIALS_MAX", 3)
    once = RateLimit(requests=1, window_s=60)
    for number in range(5):
        await limits.take([hit(str(number), limit=once)], is_write=False)
        await refused(limits, hit(str(number), limit=once))

    assert limits.statistics().denials == 3
    asked = store.asked
    await refused(limits, hit("4", limit=once))
    assert store.asked == asked
    await refused(limits, hit("0", limit=once))
    assert store.asked == asked + 1


async def test_an_address_is_limited_before_anybody_knows_it(noted: Noted) -> None:
    door = AddressLimiter(requests=MINUTE, failures=None, telemetry=noted)
    for _ in range(2):
        door.enter("192.0.2.1")
    door.enter("192.0.2.2")
    door.failed("192.0.2.1")

    with pytest.raises(RateLimitedError, match="'address'"):
        door.enter("192.0.2.1")

    assert noted.checks == [("address", True)]
    await trio.sleep(61)
    door.enter("192.0.2.1")


async def test_after_too_many_failures_no_credential_is_looked_at(noted: Noted) -> None:
    door = AddressLimiter(requests=None, failures=MINUTE, telemetry=noted)
    for _ in range(2):
        door.enter("2001:db8::1")
        door.failed("2001:db8::1")

    with pytest.raises(RateLimitedError, match="'failures'") as caught:
        door.enter("2001:db8::2")

    door.enter("2001:db8:0:1::1")
    assert noted.checks == [("failures", True)]
    assert caught.value.retry_after_s is not None
    await trio.sleep(caught.value.retry_after_s)
    door.enter("2001:db8::1")


async def test_a_door_without_limits_is_open() -> None:
    door = AddressLimiter(requests=None, failures=None, telemetry=Silence())
    for _ in range(10):
        door.enter("192.0.2.1")
        door.failed("192.0.2.1")


async def test_the_address_that_was_not_seen_for_longest_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limiter, "ADDRESSES_MAX", 2)
    once = RateLimit(requests=2, window_s=60)
    door = AddressLimiter(requests=once, failures=None, telemetry=Silence())
    for address in ("1", "2", "1", "3", "2"):
        door.enter(address)

    # "2" was forgotten when "3" came, and "1" when "2" came again.
    door.enter("2")
    with pytest.raises(RateLimitedError):
        door.enter("2")
    door.enter("1")


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_an_address_counts_as_itself_or_its_64(address: str, counted: str) -> None:
    assert network_of(address) == counted


async def test_a_key_holds_so_many_streams_and_no_more(noted: Noted) -> None:
    streams = StreamLimiter(most=2, telemetry=noted)
    leave = streams.enter("key_1")
    streams.enter("key_1")
    streams.enter("key_2")
    assert streams.left("key_1") == 0

    with pytest.raises(RdevError) as caught:
        streams.enter("key_1")

    assert caught.value.code is ErrorCode.TOO_MANY_REQUESTS
    assert caught.value.retry_after_s == limiter.STREAMS_RETRY_S
    assert noted.checks == [("streams", True)]
    leave()
    assert streams.left("key_1") == 1
    streams.enter("key_1")()
    assert streams.left("nobody") == 2
