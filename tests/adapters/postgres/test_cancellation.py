"""What a cancelled task leaves behind: nothing on the server, a usable or a closed connection."""

import random
from contextlib import aclosing

import psycopg
import pytest
import trio
import trio.testing

from rdev.adapters.postgres import transaction as transaction_module
from rdev.adapters.postgres.connection import ConnectionSettings, open_connection
from rdev.adapters.postgres.transaction import (
    OutcomeUnknownError,
    commit_and_announce,
)
from rdev.domain.errors import ErrorCode, RdevError

LONG = "select pg_sleep(60)"


async def scalar(connection, query, params=None):
    row = await (await connection.execute(query, params)).fetchone()
    return row[0]


@pytest.fixture
def settings(database_dsn):
    return ConnectionSettings(dsn=database_dsn, statement_timeout_ms=60_000)


@pytest.fixture
async def connection(settings):
    async with await open_connection(settings) as connection:
        yield connection


@pytest.fixture
async def observer(settings):
    """A second connection, to see what the server does."""
    async with await open_connection(settings.named("observer")) as connection:
        yield connection


async def wait_for(observer, query, params, wanted):
    with trio.fail_after(30):
        while (found := await scalar(observer, query, params)) != wanted:
            await trio.sleep(0.005)
    return found


async def runs_nothing(observer, pid):
    """Whether the backend has no statement running (or is gone), waiting for it to be so."""
    query = "select count(*) from pg_stat_activity where pid = %s and state = 'active'"
    return await wait_for(observer, query, (pid,), 0) == 0


async def cancelled_when_active(observer, pid, act):
    """Run `act` and cancel it once the server is at work on it."""
    query = "select count(*) from pg_stat_activity where pid = %s and state = 'active'"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(act)
        await wait_for(observer, query, (pid,), 1)
        nursery.cancel_scope.cancel()


async def cancelled_when_blocked(act):
    """Run `act` and cancel it once it waits for something."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(act)
        await trio.testing.wait_all_tasks_blocked(0.02)
        nursery.cancel_scope.cancel()


# --- statements


async def test_a_cancelled_statement_ends_on_the_server_and_the_connection_goes_on(
    connection, observer
):
    pid = connection.info.backend_pid
    await cancelled_when_active(observer, pid, lambda: connection.execute(LONG))
    assert connection.at_rest
    assert await runs_nothing(observer, pid)
    assert await scalar(connection, "select 7") == 7


async def test_a_cancelled_task_starts_no_statement(connection):
    await connection.execute("create table t (n int)")
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.execute("insert into t values (1)")
    assert scope.cancelled_caught
    assert await scalar(connection, "select count(*) from t") == 0


async def test_a_cancelled_wait_for_notifications_leaves_the_connection_listening(connection):
    await connection.execute("listen c")

    async def listen() -> None:
        async with aclosing(connection.notifies()) as incoming:
            async for _ in incoming:
                pass

    await cancelled_when_blocked(listen)
    await connection.execute("notify c, 'after'")
    async with aclosing(connection.notifies(timeout=30, stop_after=1)) as incoming:
        assert [notification.payload async for notification in incoming] == ["after"]


async def test_a_cancel_that_meets_the_preparation_does_not_run_the_statement_to_its_end(
    connection,
):
    # The cancel is lost between PREPARE and the statement; it has to be asked for again.
    asked = []
    really = connection._request_cancel

    async def lost_the_first_time():
        asked.append(trio.current_time())
        if len(asked) > 1:
            await really()

    connection._request_cancel = lost_the_first_time
    await cancelled_when_blocked(lambda: connection.execute(LONG))
    assert len(asked) >= 2
    assert connection.at_rest


async def test_a_statement_that_does_not_end_closes_the_connection(proxy, settings):
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    connection.cleanup_s = 0.1
    proxy.black_hole()
    await cancelled_when_blocked(lambda: connection.execute("select 1"))
    assert connection.closed


async def test_a_cancel_request_that_fails_is_made_again(connection, observer):
    pid = connection.info.backend_pid
    asked = 0
    really = connection._request_cancel

    async def refused_the_first_two_times():
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise psycopg.OperationalError("cancellation failed")
        await really()

    async def work() -> None:
        async with connection.cursor() as cursor:
            await cursor.executemany("select pg_sleep(%s)", [(60,)] * 10)

    connection._request_cancel = refused_the_first_two_times
    await cancelled_when_active(observer, pid, work)
    assert asked >= 3
    assert await runs_nothing(observer, pid)
    assert connection.at_rest
    assert await scalar(connection, "select 7") == 7


async def test_a_pipeline_that_does_not_end_closes_the_connection(proxy):
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    connection.cleanup_s = 0.1
    proxy.black_hole()

    async def work() -> None:
        async with connection.cursor() as cursor:
            await cursor.executemany("select pg_sleep(%s)", [(60,)] * 10)

    await cancelled_when_blocked(work)
    assert connection.closed


async def test_a_statement_cancelled_while_it_is_being_sent_closes_the_connection(proxy):
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    connection.cleanup_s = 0.1
    proxy.black_hole()
    large = "x" * 30_000_000
    await cancelled_when_blocked(lambda: connection.execute("select length(%s::text)", (large,)))
    assert connection.closed


async def test_leaving_the_connections_block_by_cancellation_closes_it(settings):
    connection = await open_connection(settings)

    async def work() -> None:
        async with connection:
            await connection.execute(LONG)

    await cancelled_when_blocked(work)
    assert connection.closed


# --- what psycopg builds of several statements


async def test_a_cancelled_transaction_is_rolled_back_while_a_statement_runs(connection, observer):
    await connection.execute("create table t (n int)")

    async def work() -> None:
        async with connection.transaction():
            await connection.execute("insert into t values (1)")
            await connection.execute(LONG)

    await cancelled_when_active(observer, connection.info.backend_pid, work)
    assert connection.at_rest
    assert await scalar(connection, "select count(*) from t") == 0
    async with connection.transaction():
        await connection.execute("insert into t values (2)")
    assert await scalar(connection, "select count(*) from t") == 1


async def test_a_cancelled_transaction_is_rolled_back_between_two_statements(connection):
    await connection.execute("create table t (n int)")

    async def work() -> None:
        async with connection.transaction(), connection.transaction():
            await connection.execute("insert into t values (1)")
            await trio.sleep_forever()

    await cancelled_when_blocked(work)
    assert connection.at_rest
    assert await scalar(connection, "select count(*) from t") == 0


async def test_a_transaction_cancelled_while_it_begins_is_not_begun(connection):
    for _ in range(50):
        with trio.move_on_after(random.uniform(0, 0.0004)):
            async with connection.transaction():
                await trio.sleep_forever()
        assert connection.at_rest
        assert connection._num_transactions == 0


async def test_a_cancelled_executemany_leaves_the_connection_usable(connection, observer):
    pid = connection.info.backend_pid

    async def work() -> None:
        async with connection.cursor() as cursor:
            await cursor.executemany("select pg_sleep(%s)", [(60,)] * 100)

    await cancelled_when_active(observer, pid, work)
    assert await runs_nothing(observer, pid)
    assert connection.at_rest
    assert await scalar(connection, "select 7") == 7


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_a_cancelled_pipeline_leaves_the_connection_usable(
    connection, observer, in_transaction
):
    pid = connection.info.backend_pid

    async def work() -> None:
        async with connection.pipeline():
            if in_transaction:
                async with connection.transaction():
                    await (await connection.execute(LONG)).fetchone()
            else:
                await (await connection.execute(LONG)).fetchone()

    await cancelled_when_active(observer, pid, work)
    assert await runs_nothing(observer, pid)
    assert connection.at_rest
    assert await scalar(connection, "select 7") == 7


async def test_a_pipeline_entered_or_left_by_a_cancelled_task_is_ended(connection):
    for _ in range(200):
        with trio.move_on_after(random.uniform(0, 0.001)):
            async with connection.pipeline():
                for n in range(10):
                    await connection.execute("select %s::int", (n,))
        assert connection.at_rest
        assert connection._pipeline is None
        assert await scalar(connection, "select 7") == 7


async def test_a_cancelled_server_cursor_leaves_the_connection_usable(connection, observer):
    async def work() -> None:
        async with connection.transaction(), connection.cursor("c") as cursor:
            await cursor.execute("select n, pg_sleep(60) from generate_series(1, 10) n")
            await cursor.fetchone()

    await cancelled_when_active(observer, connection.info.backend_pid, work)
    assert connection.at_rest
    assert await scalar(connection, "select 7") == 7


async def usable_or_closed(connection):
    return connection.closed or await scalar(connection, "select 7") == 7


async def test_a_cancelled_copy_in_is_gone_from_the_server(connection, observer):
    await connection.execute("create table t (n int)")
    pid = connection.info.backend_pid

    async def work() -> None:
        async with connection.cursor() as cursor, cursor.copy("copy t from stdin") as copy:
            await copy.write_row((1,))
            await trio.sleep_forever()

    await cancelled_when_active(observer, pid, work)
    assert await runs_nothing(observer, pid)
    assert await usable_or_closed(connection)
    assert await scalar(observer, "select count(*) from t") == 0


async def test_a_cancelled_copy_out_is_gone_from_the_server(connection, observer):
    pid = connection.info.backend_pid
    query = "copy (select repeat('x', 1000), n from generate_series(1, 10000000) n) to stdout"

    async def work() -> None:
        async with connection.cursor() as cursor, cursor.copy(query) as copy:
            await copy.read_row()
            await trio.sleep_forever()

    await cancelled_when_active(observer, pid, work)
    assert await runs_nothing(observer, pid)
    assert await usable_or_closed(connection)


async def test_a_cancelled_stream_is_gone_from_the_server(connection, observer):
    pid = connection.info.backend_pid
    query = "select repeat('x', 1000), n from generate_series(1, 10000000) n"

    async def work() -> None:
        async with aclosing(connection.cursor().stream(query)) as rows:
            async for _ in rows:
                await trio.sleep_forever()

    await cancelled_when_active(observer, pid, work)
    assert await runs_nothing(observer, pid)
    assert await usable_or_closed(connection)


@pytest.mark.slow
async def test_no_cancel_ever_hits_the_next_statement(settings, observer):
    """6 connections, 3,600 transactions cancelled after 0 to 4 ms."""
    await observer.execute("create table t (worker int, n int, primary key (worker, n))")
    cancelled = stray = wrong = lost = 0

    async def work(worker: int) -> None:
        nonlocal cancelled, stray, wrong, lost
        dice = random.Random(worker)
        connection = await open_connection(settings)
        for n in range(600):
            with trio.move_on_after(dice.uniform(0, 0.004)) as scope:
                async with connection.transaction():
                    await connection.execute("insert into t values (%s, %s)", (worker, n))
                    await connection.execute("select pg_sleep(0.001)")
                    await connection.execute("update t set n = n where worker = %s", (worker,))
            cancelled += scope.cancelled_caught
            if connection.closed:
                lost += 1
                connection = await open_connection(settings)
            try:
                wrong += await scalar(connection, "select %s::int", (n,)) != n
            except psycopg.errors.QueryCanceled:
                stray += 1
        await connection.close()

    async with trio.open_nursery() as nursery:
        for worker in range(6):
            nursery.start_soon(work, worker)
    assert cancelled > 500
    assert (stray, wrong, lost) == (0, 0, 0)


# --- committed and announced


@pytest.mark.slow
async def test_what_is_committed_is_announced_and_nothing_else(connection, observer):
    await connection.execute("create table t (n int primary key)")
    announced: list[int] = []

    async def commit(n: int) -> None:
        async with connection.transaction(after_commit=lambda: announced.append(n)):
            await connection.execute("insert into t values (%s)", (n,))
        await trio.lowlevel.checkpoint()

    within_s = 0.001
    cancelled: set[int] = set()
    for n in range(1, 10_000):
        with trio.move_on_after(random.uniform(0, within_s)) as scope:
            await commit(n)
        # Follows the machine: about half are cut, wherever in the commit that is.
        within_s *= 1.02 if scope.cancelled_caught else 1 / 1.02
        if scope.cancelled_caught:
            cancelled.add(n)
        if len(cancelled) == 1_000:
            break
    rows = await (await observer.execute("select n from t order by n")).fetchall()
    committed = [n for (n,) in rows]
    assert len(cancelled) == 1_000
    assert cancelled & set(committed)  # those that used to be lost
    assert sorted(announced) == committed


@pytest.mark.slow
async def test_killed_at_random_nothing_uncommitted_is_announced(settings, observer):
    """The connection dies around COMMIT: unknown outcomes are errors and are not announced."""
    await observer.execute("create table t (n int primary key)")
    announced: list[int] = []
    unknown: set[int] = set()
    for n in range(150):
        connection = await open_connection(settings)
        pid = connection.info.backend_pid

        async def commit(n=n, connection=connection) -> None:
            try:
                async with connection.transaction(after_commit=lambda: announced.append(n)):
                    await connection.execute("insert into t values (%s)", (n,))
            except OutcomeUnknownError:
                unknown.add(n)
            except psycopg.OperationalError:
                pass  # lost before COMMIT

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit)
            await trio.sleep(random.uniform(0, 0.001))
            await observer.execute("select pg_terminate_backend(%s)", (pid,))
        connection.abort()
    rows = await (await observer.execute("select n from t")).fetchall()
    committed = {n for (n,) in rows}
    assert set(announced) <= committed
    assert committed - set(announced) <= unknown


async def test_a_commit_that_the_server_refuses_is_not_announced(connection):
    await connection.execute("create table t (n int unique deferrable initially deferred)")
    announced = []
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with connection.transaction(after_commit=lambda: announced.append(1)):
            await connection.execute("insert into t values (1), (1)")
    assert announced == []
    assert connection.at_rest


async def test_a_commit_that_postgres_turns_into_a_rollback_is_an_error(connection):
    announced = []

    async def swallow_an_error() -> None:
        async with connection.transaction(after_commit=lambda: announced.append(1)):
            with pytest.raises(psycopg.errors.DivisionByZero):
                await connection.execute("select 1 / 0")

    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        await swallow_an_error()
    assert announced == []
    assert connection.at_rest


async def test_a_connection_lost_in_the_block_is_an_error_even_if_the_block_did_not_notice(
    connection,
):
    announced = []
    with pytest.raises(psycopg.OperationalError, match="lost in the transaction"):
        async with connection.transaction(after_commit=lambda: announced.append(1)):
            connection.abort()
    assert announced == []


async def test_a_connection_lost_in_commit_has_an_unknown_outcome(proxy, observer, monkeypatch):
    monkeypatch.setattr(transaction_module, "SHIELD_S", 0.2)
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    connection.cleanup_s = 0.1
    await connection.execute("create table t (n int)")
    announced = []

    async def lose_the_network_before_commit() -> None:
        async with connection.transaction(after_commit=lambda: announced.append(1)):
            await connection.execute("insert into t values (1)")
            proxy.black_hole()

    with pytest.raises(OutcomeUnknownError) as caught:
        await lose_the_network_before_commit()
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert caught.value.details == {"outcome": "unknown"}
    assert announced == []
    assert connection.closed


async def test_a_killed_backend_makes_the_outcome_unknown(connection, observer):
    announced = []
    with pytest.raises(OutcomeUnknownError) as caught:
        async with connection.transaction(after_commit=lambda: announced.append(1)):
            await observer.execute(
                "select pg_terminate_backend(%s, 30000)", (connection.info.backend_pid,)
            )
    assert isinstance(caught.value.__cause__, psycopg.Error)
    assert announced == []


async def test_an_announcement_that_waits_is_finished_under_the_same_shield(connection):
    await connection.execute("create table t (n int)")
    announced = []

    async def announce() -> None:
        await trio.sleep(0.01)
        await connection.execute("insert into t values (2)")
        announced.append(1)

    with trio.CancelScope() as scope:
        async with connection.transaction(after_commit=announce):
            await connection.execute("insert into t values (1)")
            scope.cancel()
    assert announced == [1]
    assert await scalar(connection, "select count(*) from t") == 2


async def test_an_announcement_that_overruns_says_that_the_change_was_made(connection, monkeypatch):
    monkeypatch.setattr(transaction_module, "SHIELD_S", 0.05)
    with pytest.raises(RdevError) as caught:
        async with connection.transaction(after_commit=trio.sleep_forever):
            pass
    assert caught.value.details == {"outcome": "committed"}
    assert not connection.closed


async def test_only_the_outermost_transaction_announces(connection):
    announced = []
    async with connection.transaction(after_commit=lambda: announced.append(1)):
        with pytest.raises(psycopg.ProgrammingError):
            async with connection.transaction(after_commit=lambda: announced.append(2)):
                pass
        assert announced == []
    assert announced == [1]


async def test_nothing_is_asked_of_a_closed_connection(connection):
    connection.abort()

    async def never() -> None:
        raise AssertionError

    with pytest.raises(psycopg.OperationalError, match="closed"):
        await commit_and_announce(connection, never, None)
