"""The keeper of the audit log, and who is counted among the refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import trio

from rdev.domain.audit import AuditFilter, AuditPage, Denial, Sealed, SealedEntry
from rdev.domain.audit_chain import Place
from rdev.domain.errors import ErrorCode, RdevError
from rdev.services.audit import CHECKPOINT_S, EVERY_S, AuditKeeper
from rdev.services.denials import MINUTE_S, PAIRS_MAX, WAITING_MAX, Denials

AT = datetime(2026, 11, 22, tzinfo=UTC)
DENIAL = Denial(
    actor="anonymous",
    actor_name="",
    ip="192.0.2.1",
    request_id="r",
    reason="UNAUTHORIZED",
    route="GET /queue",
)


@dataclass
class Log:
    """`AuditLog`, as far as the keeper needs it."""

    unsealed: int = 0
    sealed: int = 0
    is_away: bool = False
    denials: list[Denial] = field(default_factory=list)

    async def add_denials(self, denials: Sequence[Denial]) -> None:
        await self._reach()
        self.denials += denials

    async def seal(self, *, limit: int) -> Sealed | None:
        await self._reach()
        done = min(limit, self.unsealed)
        self.unsealed -= done
        self.sealed += done
        lag_s = 1.5 if self.unsealed else None
        hash_ = bytes(32) if self.sealed else None
        return Sealed(count=done, lag_s=lag_s, last_seq=self.sealed or None, last_hash=hash_)

    async def page(self, wanted: AuditFilter, *, before: int | None, limit: int) -> AuditPage:
        raise NotImplementedError

    async def read(self, wanted: AuditFilter, *, after: int, limit: int) -> list[SealedEntry]:
        raise NotImplementedError

    async def bounds(self) -> tuple[int, int] | None:
        raise NotImplementedError

    async def _reach(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "away")


@dataclass
class Sink:
    """`CheckpointSink`."""

    kept: list[int] = field(default_factory=list)
    is_away: bool = False

    async def keep(self, place: Place, *, at: datetime) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "away")
        self.kept.append(place.seq)


def keeper_of(log: Log, sink: Sink | None = None, denials: Denials | None = None) -> AuditKeeper:
    return AuditKeeper(log=log, denials=denials or Denials(), sink=sink, now=lambda: AT)


async def test_it_seals_every_second_until_nothing_is_left(autojump_clock, nursery):
    log = Log(unsealed=12_000)
    keeper = keeper_of(log)
    await nursery.start(keeper.run)
    await trio.sleep(EVERY_S / 2)
    assert log.sealed == 12_000
    log.unsealed = 3
    await trio.sleep(EVERY_S)
    assert (log.sealed, keeper.statistics().last_seq, keeper.statistics().lag_s) == (
        12_003,
        12_003,
        0.0,
    )
    keeper.stop()


async def test_a_database_that_is_away_is_waited_for(autojump_clock, nursery):
    log, denials = Log(unsealed=1, is_away=True), Denials()
    keeper = keeper_of(log, denials=denials)
    denials.note(DENIAL)
    await nursery.start(keeper.run)
    await trio.sleep(5.5 * EVERY_S)
    assert (log.denials, denials.statistics().waiting) == ([], 1)
    log.is_away = False
    await trio.sleep(EVERY_S)
    assert (log.denials, log.sealed) == ([DENIAL], 1)
    keeper.stop()


async def test_the_lag_grows_for_as_long_as_nobody_can_look(autojump_clock, nursery):
    log = Log()
    keeper = keeper_of(log)
    await nursery.start(keeper.run)
    await trio.sleep(10 * EVERY_S)
    assert keeper.statistics().lag_s == 0
    log.is_away = True
    await trio.sleep(100 * EVERY_S)
    assert 95 * EVERY_S < keeper.statistics().lag_s <= 100 * EVERY_S
    log.is_away = False
    await trio.sleep(2 * EVERY_S)
    assert keeper.statistics().lag_s == 0
    keeper.stop()


async def test_a_checkpoint_is_kept_each_minute_in_which_something_was_sealed(
    autojump_clock, nursery
):
    log, sink = Log(unsealed=1), Sink()
    keeper = keeper_of(log, sink)
    await nursery.start(keeper.run)
    await trio.sleep(EVERY_S / 2)
    assert sink.kept == [1]
    log.unsealed = 1
    await trio.sleep(CHECKPOINT_S - 3 * EVERY_S)
    assert sink.kept == [1]
    await trio.sleep(5 * CHECKPOINT_S)
    assert sink.kept == [1, 2]
    log.unsealed = 1
    keeper.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert sink.kept == [1, 2, 3]


async def test_a_sink_that_fails_is_asked_again_and_holds_up_no_seal(autojump_clock, nursery):
    log, sink = Log(unsealed=1), Sink(is_away=True)
    keeper = keeper_of(log, sink)
    await nursery.start(keeper.run)
    await trio.sleep(3.5 * EVERY_S)
    log.unsealed = 1
    await trio.sleep(2 * EVERY_S)
    assert (log.sealed, sink.kept) == (2, [])
    sink.is_away = False
    await trio.sleep(CHECKPOINT_S)
    assert sink.kept == [2]
    assert keeper.statistics().checkpoint_failures > 0
    keeper.stop()


async def test_the_first_of_a_minute_is_an_entry_and_the_rest_a_count(autojump_clock):
    denials = Denials()
    for _ in range(10):
        denials.note(DENIAL)
    other = replace(DENIAL, ip="192.0.2.2")
    denials.note(other)
    assert denials.take() == [DENIAL, other]
    denials.note(DENIAL)
    assert denials.take() == []
    await trio.sleep(MINUTE_S)
    assert denials.take() == [replace(DENIAL, repeated=10)]
    denials.note(DENIAL)
    assert denials.take() == [DENIAL]


async def test_many_addresses_at_once_are_counted_together(autojump_clock):
    denials = Denials()
    for number in range(PAIRS_MAX + 500):
        denials.note(replace(DENIAL, ip=f"2001:db8:{number:x}::1"))
    taken = denials.take()
    assert len(taken) == PAIRS_MAX + 1
    assert taken[-1].ip is None
    await trio.sleep(MINUTE_S)
    assert [(one.ip, one.repeated) for one in denials.take()] == [(None, 499)]


async def test_who_has_a_network_of_ipv6_is_one_address(autojump_clock):
    denials = Denials()
    for number in range(100):
        denials.note(replace(DENIAL, ip=f"2001:db8::{number:x}"))
    assert [one.ip for one in denials.take()] == ["2001:db8::0"]
    await trio.sleep(MINUTE_S)
    assert [(one.ip, one.repeated) for one in denials.take()] == [("2001:db8::0", 99)]


async def test_what_waits_is_bounded(autojump_clock):
    denials = Denials()
    for _ in range(20):
        for number in range(PAIRS_MAX):
            denials.note(replace(DENIAL, ip=str(number)))
        await trio.sleep(MINUTE_S)
    assert denials.statistics().waiting == WAITING_MAX
    assert denials.statistics().lost == 20 * PAIRS_MAX - WAITING_MAX


async def test_what_was_counted_when_it_stops_is_written(autojump_clock, nursery):
    log, denials = Log(), Denials()
    keeper = keeper_of(log, denials=denials)
    await nursery.start(keeper.run)
    for _ in range(3):
        denials.note(DENIAL)
    keeper.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert log.denials == [DENIAL, replace(DENIAL, repeated=2)]
