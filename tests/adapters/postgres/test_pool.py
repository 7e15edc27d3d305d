"""The pool: order, bounds, health, and a database that goes and returns."""

import psycopg
import pytest
import trio
import trio.testing
from psycopg import errors

from rdev.adapters.postgres.connection import ConnectionSettings, open_connection
from rdev.adapters.postgres.pool import open_dedicated, open_pool, translate_errors
from rdev.domain.breaker import BreakerSettings
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import Silence
from rdev.services.breaker import BreakerOpenError, CircuitBreaker


async def scalar(connection, query, params=None):
    row = await (await connection.execute(query, params)).fetchone()
    return row[0]


@pytest.fixture
def settings(database_dsn):
    return ConnectionSettings(dsn=database_dsn, application_name="pooltest")


@pytest.fixture
async def observer(settings):
    async with await open_connection(
        ConnectionSettings(dsn=settings.dsn, application_name="observer")
    ) as connection:
        yield connection


async def until(condition):
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.005)


async def kill_all(observer):
    """End every connection of the pool on the server, and wait until they are gone."""
    await observer.execute(
        "select pg_terminate_backend(pid, 30000) from pg_stat_activity"
        " where application_name like 'pooltest%' and datname = current_database()"
    )


async def test_forty_tasks_share_five_connections(settings):
    pids, at_once, most = set(), 0, 0

    async def work(pool) -> None:
        nonlocal at_once, most
        for _ in range(5):
            async with pool.connection() as connection:
                at_once += 1
                most = max(most, at_once)
                pids.add(await scalar(connection, "select pg_backend_pid() from pg_sleep(0.001)"))
                at_once -= 1

    async with open_pool(settings, min_size=1, max_size=5, wait_s=60) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(work, pool)
        statistics = pool.statistics()
    assert len(pids) == most == 5
    assert statistics.requests == 200
    assert (statistics.size, statistics.idle, statistics.opened) == (5, 5, 5)
    assert (statistics.timeouts, statistics.discarded, statistics.waiting) == (0, 0, 0)


async def test_a_returned_connection_goes_to_the_longest_waiting_task(settings):
    order: list[int] = []

    async def take(pool, n: int) -> None:
        async with pool.connection():
            order.append(n)

    async with (
        open_pool(settings, min_size=1, max_size=1, wait_s=60) as pool,
        trio.open_nursery() as nursery,
        pool.connection(),
    ):
        for n in range(6):
            nursery.start_soon(take, pool, n)
            await until(lambda n=n: pool.statistics().waiting == n + 1)
    assert order == list(range(6))


async def test_a_task_cancelled_while_waiting_takes_no_connection_with_it(settings):
    async with open_pool(settings, min_size=1, max_size=1, wait_s=60) as pool:
        async with pool.connection():
            with trio.move_on_after(0.02) as scope:
                async with pool.connection():
                    raise AssertionError
            assert scope.cancelled_caught
            assert pool.statistics().waiting == 0
        assert pool.statistics().idle == 1


async def test_waiting_and_cancelling_at_random_loses_no_connection(settings):
    async with open_pool(settings, min_size=2, max_size=2, wait_s=60) as pool:

        async def work(n: int) -> None:
            for k in range(20):
                with trio.move_on_after(0.0005 * ((n + k) % 5)):
                    async with pool.connection() as connection:
                        await connection.execute("select 1")

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(work, n)
        await until(lambda: pool.statistics().idle == 2)
        assert pool.statistics().size == 2


async def test_an_exhausted_pool_answers_unavailable_after_its_wait(settings):
    async with open_pool(settings, min_size=1, max_size=1, wait_s=0.05) as pool:
        await until(lambda: pool.statistics().idle == 1)
        async with pool.connection():
            with pytest.raises(RdevError, match=r"no database connection within 0\.05 s") as caught:
                async with pool.connection():
                    raise AssertionError
        assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
        assert caught.value.retry_after_s is not None
        assert (pool.statistics().timeouts, pool.statistics().waiting) == (1, 0)
        async with pool.connection() as connection:
            assert await scalar(connection, "select 1") == 1


async def test_an_idle_connection_that_the_server_ended_is_not_lent(settings, observer):
    async with open_pool(settings, min_size=1, max_size=1, wait_s=30) as pool:
        await until(lambda: pool.statistics().idle == 1)
        await kill_all(observer)
        async with pool.connection() as connection:
            assert await scalar(connection, "select 1") == 1
        assert (pool.statistics().discarded, pool.statistics().opened) == (1, 2)


async def test_connections_killed_in_use_are_replaced_for_those_who_wait(settings, observer):
    failed = served = 0

    async def work(pool) -> None:
        nonlocal failed, served
        try:
            async with pool.connection() as connection:
                await connection.execute("select pg_sleep(0.05)")
                served += 1
        except psycopg.OperationalError:
            failed += 1

    async with open_pool(settings, min_size=5, max_size=5, wait_s=60) as pool:
        await until(lambda: pool.statistics().idle == 5)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(work, pool)
            await kill_all(observer)
        await until(lambda: pool.statistics().size == 5)
        assert failed + served == 40
        assert served >= 30
        assert pool.statistics().discarded >= 1


async def test_a_connection_that_comes_back_in_a_transaction_is_closed(settings):
    async with open_pool(settings, min_size=1, max_size=1, wait_s=30) as pool:
        async with pool.connection() as connection:
            await connection.execute("begin")
        assert connection.closed
        assert pool.statistics().discarded == 1
        async with pool.connection() as connection:
            assert connection.at_rest


async def test_a_cancelled_statement_does_not_cost_the_connection(settings):
    async with open_pool(settings, min_size=1, max_size=1, wait_s=30) as pool:
        async with pool.connection() as first:
            pass
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                async with pool.connection() as connection:
                    await connection.execute("select pg_sleep(60)")

            nursery.start_soon(work)
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        async with pool.connection() as again:
            assert again is first


async def test_a_connection_too_old_is_replaced(settings):
    async with open_pool(settings, min_size=1, max_size=1, wait_s=30, max_lifetime_s=0.05) as pool:
        await until(lambda: pool.statistics().idle == 1)
        async with pool.connection() as first:
            await trio.sleep(0.06)
        assert first.closed
        assert pool.statistics().discarded == 1


async def test_a_database_that_returns_is_found_again(proxy):
    settings = ConnectionSettings(dsn=proxy.dsn, connect_timeout_s=60)
    proxy.refusing = True
    async with open_pool(settings, min_size=1, max_size=3, wait_s=0.2) as pool:
        with pytest.raises(RdevError) as caught:
            async with pool.connection():
                raise AssertionError
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        await until(lambda: pool.statistics().failures >= 2)
        assert pool.statistics().size == 0
        proxy.refusing = False
        await until(lambda: pool.statistics().idle == 1)
        assert pool.statistics().failures == 0
        async with pool.connection() as connection:
            assert await scalar(connection, "select 1") == 1


async def test_only_one_task_connects_while_the_database_is_gone(proxy):
    settings = ConnectionSettings(dsn=proxy.dsn)
    proxy.refusing = True
    async with open_pool(settings, min_size=1, max_size=10, wait_s=60) as pool:

        async def wait_for_one() -> None:
            async with pool.connection():
                raise AssertionError

        async with trio.open_nursery() as nursery:
            await until(lambda: pool.statistics().failures >= 1)
            proxy.refusing = False
            proxy.black_hole()  # whoever connects now is still at it when we count
            before = proxy.accepted
            for _ in range(30):
                nursery.start_soon(wait_for_one)
            await until(lambda: proxy.accepted > before)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert proxy.accepted == before + 1
            nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_the_pool_grows_to_those_who_wait_when_the_database_returns(proxy):
    settings = ConnectionSettings(dsn=proxy.dsn)
    proxy.refusing = True
    holding = 0
    async with open_pool(settings, min_size=1, max_size=5, wait_s=60) as pool:

        async def hold_until_all_do() -> None:
            nonlocal holding
            async with pool.connection():
                holding += 1
                await until(lambda: holding == 5)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(hold_until_all_do)
            await until(lambda: pool.statistics().failures >= 6)  # all but one have given up
            proxy.refusing = False


async def test_at_the_end_every_connection_is_closed(settings, observer):
    async with open_pool(settings, min_size=3, max_size=3) as pool:
        await until(lambda: pool.statistics().idle == 3)
    query = (
        "select count(*) from pg_stat_activity"
        " where application_name = 'pooltest' and datname = current_database()"
    )
    with trio.fail_after(30):
        while await scalar(observer, query):
            await trio.sleep(0.005)


async def test_a_dedicated_connection_has_a_name_and_is_replaced_when_lost(settings, observer):
    async with open_dedicated(settings, "append", wait_s=30) as dedicated:
        async with dedicated.connection() as connection:
            assert await scalar(connection, "show application_name") == "pooltest/append"
        await kill_all(observer)
        async with dedicated.connection() as connection:
            assert await scalar(connection, "select 1") == 1
        assert dedicated.statistics().opened == 2


@pytest.mark.parametrize(
    ("vendor", "message"),
    [
        (psycopg.OperationalError("x"), "cannot serve"),
        (psycopg.InterfaceError("x"), "cannot serve"),
        (errors.AdminShutdown("x"), "cannot serve"),
        (errors.ReadOnlySqlTransaction("x"), "cannot serve"),
        (errors.QueryCanceled("x"), "in time"),
        (errors.UndefinedTable("x"), "lacks a migration"),
        (errors.UndefinedFunction("x"), "lacks a migration"),
        (errors.UndefinedColumn("x"), "lacks a migration"),
    ],
)
def test_what_the_database_cannot_do_now_is_unavailable(vendor, message):
    with pytest.raises(RdevError, match=message) as caught, translate_errors():
        raise vendor
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert caught.value.retry_after_s is not None
    assert caught.value.__cause__ is vendor


@pytest.mark.parametrize(
    "other", [errors.UniqueViolation("x"), errors.SyntaxError("x"), KeyError()]
)
def test_every_other_error_goes_through(other):
    with pytest.raises(type(other)) as caught, translate_errors():
        raise other
    assert caught.value is other


def breaker() -> CircuitBreaker:
    return CircuitBreaker(
        name="database", telemetry=Silence(), settings=BreakerSettings(calls_min=3)
    )


async def test_while_the_database_is_gone_callers_are_refused_at_once(proxy):
    settings = ConnectionSettings(dsn=proxy.dsn, connect_timeout_s=60)
    guard = breaker()
    proxy.refusing = True
    async with open_pool(settings, min_size=1, max_size=3, wait_s=0.05, breaker=guard) as pool:
        for _ in range(3):
            with pytest.raises(RdevError, match="no database connection"):
                async with pool.connection():
                    raise AssertionError
        waits = pool.statistics().waits

        with pytest.raises(BreakerOpenError) as caught:
            async with pool.connection():
                raise AssertionError

        assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
        assert pool.statistics().waits == waits
        # The pool goes on connecting; with the first connection the breaker tries again at once.
        proxy.refusing = False
        await until(lambda: not guard.refuses)
        for _ in range(3):
            async with pool.connection() as connection:
                assert await scalar(connection, "select 1") == 1
        assert guard.statistics().state == 0


async def test_a_busy_pool_and_errors_of_statements_say_nothing_bad_of_the_database(settings):
    guard = breaker()
    async with open_pool(settings, min_size=1, max_size=1, wait_s=0.05, breaker=guard) as pool:
        await until(lambda: pool.statistics().idle == 1)
        async with pool.connection():
            for _ in range(5):
                with pytest.raises(RdevError, match="no database connection"):
                    async with pool.connection():
                        raise AssertionError
        for _ in range(5):
            with pytest.raises(psycopg.errors.DivisionByZero):
                async with pool.connection() as connection:
                    await connection.execute("select 1/0")
        found = guard.statistics()
        assert (found.state, found.calls, found.failures) == (0, 6, 0)


async def sleep_beyond_timeout(pool):
    async with pool.connection() as connection, connection.transaction():
        await connection.execute("set local statement_timeout = 1")
        await connection.execute("select pg_sleep(60)")


async def test_connections_that_are_lost_and_statements_out_of_time_are_failures(
    settings, observer
):
    guard = CircuitBreaker(name="database", telemetry=Silence())
    async with open_pool(settings, min_size=1, max_size=2, wait_s=30, breaker=guard) as pool:
        with pytest.raises(psycopg.OperationalError):
            async with pool.connection() as connection:
                await connection.execute("select pg_terminate_backend(pg_backend_pid())")
        with pytest.raises(psycopg.errors.QueryCanceled):
            await sleep_beyond_timeout(pool)
        with trio.move_on_after(0.01):
            async with pool.connection() as connection:
                await connection.execute("select pg_sleep(60)")
        found = guard.statistics()
        assert (found.calls, found.failures) == (2, 2)
