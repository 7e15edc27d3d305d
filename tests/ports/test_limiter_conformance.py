"""Every sentence of `ports/limiter.py`, on the fake and on PostgreSQL."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import psycopg
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from psycopg import errors

from rdev.adapters.postgres.limiter import PostgresRateLimits
from rdev.adapters.postgres.pool import Pool, open_pool
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.limiter import Decision, Hit, Policy, RateLimit, SlidingWindow, take_all
from rdev.ports.limiter import RateLimits
from tests.domain.test_limiter import START, traces
from tests.fakes.limiter import FakeRateLimits
from tests.ports.conftest import Pools

TAKE = "select * from take_hits(%s, %s, %s, %s, %s)"
WINDOW_S = 3_600


def hit(subject: str, *, policy: str = "key", requests: int = 3, window_s: int = WINDOW_S) -> Hit:
    limit = RateLimit(requests=requests, window_s=window_s)
    return Hit(policy=Policy(name=policy, limit=limit), subject=subject)


@pytest.fixture
async def in_postgres(pools: Pools) -> RateLimits:
    return PostgresRateLimits(pool=pools.requests)


@pytest.fixture(params=["fake", "postgres"])
def limits(request: pytest.FixtureRequest) -> RateLimits:
    """The port, once in memory and once on PostgreSQL."""
    if request.param == "fake":
        return FakeRateLimits()
    return request.getfixturevalue("in_postgres")


async def admitted(limits: RateLimits, *hits: Hit) -> bool:
    return all(decision.is_admitted for decision in await limits.take(hits))


async def test_as_many_hits_as_the_limit_are_admitted(limits: RateLimits) -> None:
    found = [(await limits.take([hit("a")]))[0] for _ in range(5)]

    assert [one.is_admitted for one in found] == [True, True, True, False, False]
    assert [one.remaining for one in found] == [2, 1, 0, 0, 0]
    assert all(one.policy == hit("a").policy for one in found)
    assert [one.retry_ticks > 0 for one in found] == [False, False, False, True, True]
    # The first hit leaves between a window and a window and a sixtieth after it came.
    assert all(0 < one.reset_ticks <= 3_660 * 1_000_000 for one in found)


async def test_subjects_policies_and_lengths_count_apart(limits: RateLimits) -> None:
    one = [hit("a", requests=1), hit("b", requests=1), hit("a", policy="starts", requests=1)]
    other = hit("a", requests=1, window_s=60)

    assert await admitted(limits, *one)
    assert await admitted(limits, other)
    for each in (*one, other):
        assert not await admitted(limits, each)


async def test_a_refusal_by_one_window_consumes_nothing_in_the_others(limits: RateLimits) -> None:
    narrow, wide = hit("p", policy="starts", requests=1), hit("a", requests=3)
    assert await admitted(limits, wide, narrow)

    refused = await limits.take([wide, narrow])

    assert [one.is_admitted for one in refused] == [True, False]
    assert [one.remaining for one in refused] == [2, 0]
    assert [one.policy.name for one in refused] == ["key", "starts"]
    assert await admitted(limits, wide)
    assert await admitted(limits, wide)
    assert not await admitted(limits, wide)


async def test_the_decisions_come_in_the_order_asked(limits: RateLimits) -> None:
    hits = [hit("z"), hit("a", policy="zz"), hit("a", policy="aa"), hit("b")]

    assert [one.policy for one in await limits.take(hits)] == [one.policy for one in hits]
    assert await limits.take([]) == []


async def test_a_limit_that_changes_counts_what_was_there(limits: RateLimits) -> None:
    for _ in range(3):
        assert await admitted(limits, hit("a", requests=3))

    assert not await admitted(limits, hit("a", requests=2))
    assert await admitted(limits, hit("a", requests=4))


async def hammer(
    replicas: Sequence[RateLimits], attempts: int, ask: Callable[[RateLimits], Awaitable[bool]]
) -> int:
    """So many attempts of each of 16 tasks of each replica, all at once; how many came in."""
    answers: list[bool] = []

    async def client(limits: RateLimits) -> None:
        for _ in range(attempts):
            answers.append(await ask(limits))

    async with trio.open_nursery() as nursery:
        for limits in replicas:
            for _ in range(16):
                nursery.start_soon(client, limits)
    return sum(answers)


@pytest.fixture
async def other_pool(pools: Pools) -> AsyncIterator[Pool]:
    """The connections of a second server on the same database."""
    async with open_pool(pools.settings, wait_s=60.0) as pool:
        yield pool


async def test_two_servers_admit_exactly_the_limit(pools: Pools, other_pool: Pool) -> None:
    replicas = [PostgresRateLimits(pool=pool) for pool in (pools.requests, other_pool)]
    hot = hit("hot", requests=100)

    assert await hammer(replicas, 10, lambda limits: admitted(limits, hot)) == 100


async def test_two_servers_that_ask_in_opposite_orders_do_not_block_each_other(
    pools: Pools, other_pool: Pool
) -> None:
    """Many subjects, several at once: a deadlock would be an error, a lost hit a wrong sum."""
    replicas = [PostgresRateLimits(pool=pool) for pool in (pools.requests, other_pool)]
    chance = random.Random(3)
    hits = [hit(f"s{number}", requests=40) for number in range(4)]

    async def ask(limits: RateLimits) -> bool:
        return await admitted(limits, *chance.sample(hits, 2))

    came_in = await hammer(replicas, 10, ask)

    async with pools.requests.connection() as connection:
        row = await (
            await connection.execute("select sum(used), max(used), count(*) from rate_windows")
        ).fetchone()
    assert row == (2 * came_in, 40, 4)


async def test_the_database_and_the_domain_decide_alike(migrated_dsn: str) -> None:
    """The same trace through both, hit by hit: bounds proven for one hold for the other."""
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:

        @settings(
            max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(traces())
        def compare(trace: tuple[Policy, list[int]]) -> None:
            connection.execute("truncate rate_windows")
            policy, arrivals = trace
            second = Policy(name="starts", limit=RateLimit(requests=3, window_s=5))
            windows = [(policy, SlidingWindow()), (second, SlidingWindow())]
            for now in arrivals:
                assert in_database(connection, [policy, second], now) == take_all(windows, now)

        compare()


async def test_a_clock_that_is_set_back_is_taken_alike(migrated_dsn: str) -> None:
    policy = Policy(name="key", limit=RateLimit(requests=2, window_s=60))
    window = [(policy, SlidingWindow())]
    minutes = [0, -0.5, -0.9, 0.1, 60, 59.5, 0, 0, 0, 61]
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        for minute in minutes:
            now = START + round(minute * 60_000_000)
            assert in_database(connection, [policy], now) == take_all(window, now)


def in_database(
    connection: psycopg.Connection[tuple[object, ...]], asked: Sequence[Policy], now: int
) -> list[Decision]:
    values = (
        [policy.name for policy in asked],
        ["s"] * len(asked),
        [policy.limit.window_ticks for policy in asked],
        [policy.limit.requests for policy in asked],
        now,
    )
    rows = connection.execute(TAKE, values).fetchall()
    return [
        Decision(
            policy=policy,
            is_admitted=row[0],
            remaining=row[1],
            reset_ticks=row[2],
            retry_ticks=row[3],
        )
        for policy, row in zip(asked, rows, strict=True)
    ]


async def test_a_hit_does_not_wait_for_the_disk_and_a_refusal_writes_nothing(pools: Pools) -> None:
    async with pools.requests.connection() as connection, connection.transaction():
        values = (["key"], ["a"], [60_000_000], [1], None)
        await connection.execute("set local synchronous_commit = on")
        await connection.execute(TAKE, values)
        row = await (await connection.execute("show synchronous_commit")).fetchone()
        assert row == ("off",)
        where = "select ctid, cells, hits, used from rate_windows"
        before = await (await connection.execute(where)).fetchall()
        await connection.execute(TAKE, values)
        assert await (await connection.execute(where)).fetchall() == before


async def test_the_windows_are_in_a_table_that_survives_a_failover(pools: Pools) -> None:
    kind = "select relpersistence = 'p' from pg_class where relname = 'rate_windows'"
    async with pools.requests.connection() as connection:
        assert await (await connection.execute(kind)).fetchone() == (True,)


async def test_a_store_that_is_gone_is_unavailable(pools: Pools) -> None:
    limits = PostgresRateLimits(pool=pools.requests)
    async with pools.requests.connection() as connection:
        await connection.execute("drop function take_hits")

    with pytest.raises(RdevError) as refused:
        await limits.take([hit("a")])

    assert refused.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert isinstance(refused.value.__cause__, errors.UndefinedFunction)
