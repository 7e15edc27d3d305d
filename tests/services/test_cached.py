"""The repository with a memory, beside a plain one: never older than the TTL, never against an
invalidation that was heard."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from rdev.domain.errors import ErrorCode, RdevError
from rdev.services.cached import LOAD_S, TTL_S, Cached

AWAY = "the database cannot serve this at the moment"


@dataclass(slots=True)
class Table:
    """What is stored, and a way to read it that takes as long as a test wants."""

    values: dict[str, int] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    is_away: bool = False
    before_reading: Callable[[str], object] = lambda _: None
    after_reading: Callable[[str], object] = lambda _: None
    seconds: float = 0.0

    async def read(self, key: str) -> int | None:
        self.reads.append(key)
        await trio.sleep(self.seconds)
        if self.is_away:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, AWAY, retry_after_s=1.0)
        self.before_reading(key)
        value = self.values.get(key)
        self.after_reading(key)
        await trio.sleep(self.seconds)
        return value


def cached(table: Table, size_max: int = 10_000) -> Cached[str, int]:
    return Cached(table.read, tag=lambda key, _: key, size_max=size_max)


async def test_what_was_read_is_remembered_for_the_ttl() -> None:
    table = Table({"a": 1})
    cache = cached(table)
    assert await cache.get("a") == 1
    table.values["a"] = 2
    await trio.sleep(TTL_S - 0.01)
    assert await cache.get("a") == 1
    await trio.sleep(0.02)
    assert await cache.get("a") == 2
    assert table.reads == ["a", "a"]


async def test_what_is_not_there_is_remembered_too() -> None:
    table = Table()
    cache = cached(table)
    assert await cache.get("a") is None
    table.values["a"] = 1
    assert await cache.get("a") is None
    cache.invalidate(["a"])
    assert await cache.get("a") == 1


async def test_the_ttl_runs_from_the_beginning_of_the_load() -> None:
    table = Table({"a": 1}, seconds=2.0)
    cache = cached(table)
    assert await cache.get("a") == 1
    await trio.sleep(TTL_S - 4.0 + 0.01)
    await cache.get("a")
    assert len(table.reads) == 2


async def test_many_who_ask_at_once_cost_one_load() -> None:
    table = Table({"a": 1, "b": 2}, seconds=1.0)
    cache = cached(table)
    found: list[int | None] = []

    async def ask(key: str) -> None:
        found.append(await cache.get(key))

    async with trio.open_nursery() as nursery:
        for key in "aaaaabbbbb":
            nursery.start_soon(ask, key)
    assert sorted(table.reads) == ["a", "b"]
    assert sorted(x for x in found if x) == [1] * 5 + [2] * 5


async def test_a_failure_is_told_to_all_who_wait_and_not_remembered() -> None:
    table = Table({"a": 1}, is_away=True, seconds=1.0)
    cache = cached(table)
    failures: list[RdevError] = []

    async def ask() -> None:
        with pytest.raises(RdevError) as caught:
            await cache.get("a")
        failures.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert {(f.code, f.message, f.retry_after_s) for f in failures} == {
        (ErrorCode.SERVICE_UNAVAILABLE, AWAY, 1.0)
    }
    assert table.reads == ["a"]
    table.is_away = False
    assert await cache.get("a") == 1


async def test_a_database_that_is_silent_is_given_up() -> None:
    table = Table({"a": 1}, seconds=3_600.0)
    cache = cached(table)
    with pytest.raises(RdevError) as caught, trio.fail_after(LOAD_S + 0.1):
        await cache.get("a")
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    table.seconds = 0.0
    assert await cache.get("a") == 1


async def test_while_the_database_is_away_what_is_remembered_lives_its_ttl() -> None:
    table = Table({"a": 1})
    cache = cached(table)
    await cache.get("a")
    table.is_away = True
    await trio.sleep(TTL_S - 0.01)
    assert await cache.get("a") == 1
    await trio.sleep(0.02)
    with pytest.raises(RdevError):
        await cache.get("a")


async def test_an_invalidation_during_a_load_wins() -> None:
    table = Table({"a": 1}, seconds=1.0)
    cache = cached(table)

    def change(_: str) -> None:
        table.after_reading = lambda _: None
        table.values["a"] = 2
        cache.invalidate(["a"])

    table.after_reading = change
    found: list[int | None] = []

    async def ask(after_s: float) -> None:
        await trio.sleep(after_s)
        found.append(await cache.get("a"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0.0)
        nursery.start_soon(ask, 1.5)
    # The first one asked before the change; whoever came after it must see it.
    assert found == [1, 2]
    assert await cache.get("a") == 2
    assert len(table.reads) == 2


async def test_a_flush_during_a_load_wins() -> None:
    table = Table({"a": 1})
    cache = cached(table)
    table.after_reading = lambda _: cache.flush()
    await cache.get("a")
    table.after_reading = lambda _: None
    table.values["a"] = 2
    assert await cache.get("a") == 2


async def test_a_loader_that_is_cancelled_leaves_the_load_to_another() -> None:
    table = Table({"a": 1}, seconds=1.0)
    cache = cached(table)
    found: list[int | None] = []

    async def ask() -> None:
        found.append(await cache.get("a"))

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5):
            nursery.start_soon(ask)  # waits for the one below, or is the loader itself
            await cache.get("a")
    assert found == [1]
    assert cache.statistics().entries == 1


async def test_the_oldest_go_first_and_made_up_keys_push_out_no_real_ones() -> None:
    table = Table({str(number): number for number in range(5)})
    cache = cached(table, size_max=3)
    for number in range(5):
        await cache.get(str(number))
    for number in range(100):
        await cache.get(f"made up {number}")
    assert cache.statistics().entries == 6
    table.reads.clear()
    for number in range(5):
        await cache.get(str(number))
    assert table.reads[:2] == ["0", "1"]


KEYS = st.sampled_from("ab")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), KEYS),
        st.tuples(st.just("write"), KEYS),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("hear"), st.just("")),
        st.tuples(st.just("lose"), st.just("")),
        st.tuples(st.just("flush"), st.just("")),
        st.tuples(st.just("cancel"), st.just("")),
        st.tuples(st.just("toggle"), st.just("")),
        st.tuples(st.just("wait"), st.sampled_from(["0.1", "0.7", "2.6", "5.1"])),
    ),
    max_size=60,
)


@dataclass(slots=True)
class World:
    """A cache whose table changes under it: every change is told later, or never."""

    clock: MockClock
    nursery: trio.Nursery
    size_max: int
    table: Table = field(default_factory=Table)
    # For each key all values with the time from which each was the one.
    history: dict[str, list[tuple[float, int | None]]] = field(
        default_factory=lambda: {"a": [(0.0, None)], "b": [(0.0, None)]}
    )
    unheard: list[str] = field(default_factory=list)
    # Since when each key must be seen: the last change that was heard.
    heard_at: dict[str, float] = field(default_factory=lambda: {"a": 0.0, "b": 0.0})
    asking: list[trio.CancelScope] = field(default_factory=list)
    serial: int = 0
    loading: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    cache: Cached[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.table.seconds = 0.5
        self.cache = Cached(self.load, tag=lambda key, _: key, size_max=self.size_max)

    async def load(self, key: str) -> int | None:
        self.loading[key] += 1
        assert self.loading[key] == 1, "one load for each key at a time"
        try:
            return await self.table.read(key)
        finally:
            self.loading[key] -= 1

    async def step(self, name: str, what: str) -> None:
        match name:
            case "ask":
                self.nursery.start_soon(self.ask, what)
            case "write" | "delete":
                self.change(what, None if name == "delete" else self.next())
            case "hear":
                heard, self.unheard = self.unheard, []
                self.cache.invalidate(heard)
                self.heard_at |= dict.fromkeys(heard, trio.current_time())
            case "lose":
                self.unheard.clear()
            case "flush":
                self.cache.flush()
                self.heard_at = dict.fromkeys("ab", trio.current_time())
            case "cancel":
                if self.asking:
                    self.asking[0].cancel()
            case "toggle":
                self.table.is_away = not self.table.is_away
            case "wait":
                await trio.sleep(float(what))
        await trio.testing.wait_all_tasks_blocked()

    def next(self) -> int:
        self.serial += 1
        return self.serial

    def change(self, key: str, value: int | None) -> None:
        if value is None:
            self.table.values.pop(key, None)
        else:
            self.table.values[key] = value
        self.history[key].append((trio.current_time(), value))
        self.unheard.append(key)

    async def ask(self, key: str) -> None:
        began_s, heard_s = trio.current_time(), self.heard_at[key]
        with trio.CancelScope() as scope:
            self.asking.append(scope)
            try:
                value = await self.cache.get(key)
            except RdevError:
                return  # the table was away
            finally:
                self.asking.remove(scope)
            oldest_s = max(heard_s, began_s - TTL_S)
            assert value in self.had(key, since_s=oldest_s), (key, value, oldest_s, self.history)

    def had(self, key: str, *, since_s: float) -> set[int | None]:
        """Every value of the plain repository between then and now."""
        changes = self.history[key]
        ends = [at for at, _ in changes[1:]] + [float("inf")]
        return {value for (_, value), end in zip(changes, ends, strict=True) if end >= since_s}


async def _play(steps: list[tuple[str, str]], size_max: int, clock: MockClock) -> None:
    with trio.fail_after(3_600):
        async with trio.open_nursery() as nursery:
            world = World(clock, nursery, size_max)
            for name, what in steps:
                await world.step(name, what)
            world.table.is_away = False
    assert world.cache.statistics().entries <= 2 * size_max


@given(STEPS, st.sampled_from([1, 10]))
@settings(max_examples=500, deadline=None)
def test_it_never_tells_what_the_plain_repository_could_not(
    steps: list[tuple[str, str]], size_max: int
) -> None:
    clock = MockClock(autojump_threshold=0)
    trio.run(_play, steps, size_max, clock, clock=clock)
