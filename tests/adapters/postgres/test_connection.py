"""What works on the trio connection, row by row: the contract an update of psycopg must pass."""

import math
import os
import socket
import threading
from collections.abc import Callable
from contextlib import aclosing

import psycopg
import pytest
import trio
import trio.testing
from psycopg.conninfo import make_conninfo
from psycopg.rows import class_row, dict_row
from psycopg.waiting import Wait

from rdev.adapters.postgres.connection import (
    FIRST_RETRY_S,
    LAST_RETRY_S,
    SILENCE_MARGIN_S,
    ConnectionSettings,
    TrioConnection,
    open_connection,
    retry_delay_s,
)
from rdev.adapters.postgres.waiting import FreeLock


async def scalar(connection, query, params=None):
    row = await (await connection.execute(query, params)).fetchone()
    return row[0]


@pytest.fixture
async def connection(database_dsn):
    async with await open_connection(ConnectionSettings(dsn=database_dsn)) as connection:
        yield connection


# --- connecting


async def test_connects_over_tcp_by_address(proxy):
    async with await open_connection(ConnectionSettings(dsn=proxy.dsn)) as connection:
        assert await scalar(connection, "select 1") == 1
    assert proxy.accepted == 1


async def test_a_host_name_is_resolved_outside_the_loop_and_each_address_is_tried(
    proxy, monkeypatch
):
    loop_thread, resolvers = threading.get_ident(), []
    resolve = socket.getaddrinfo

    def watched(host, *args, **kwargs):
        resolvers.append(threading.get_ident())
        answer = resolve("127.0.0.1", *args, **kwargs)
        refused = [(*item[:4], ("127.0.0.2", item[4][1])) for item in answer]
        return refused + answer

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    dsn = make_conninfo(proxy.dsn, host="localhost")
    async with await open_connection(ConnectionSettings(dsn=dsn)) as connection:
        assert await scalar(connection, "select 1") == 1
    assert resolvers
    assert loop_thread not in resolvers


async def test_connects_over_a_unix_socket_without_a_thread(database_dsn, monkeypatch):
    async def no_thread(*args, **kwargs):
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    async with await open_connection(ConnectionSettings(dsn=database_dsn)) as connection:
        assert await scalar(connection, "select 1") == 1


async def test_a_refused_connection_is_an_operational_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(psycopg.OperationalError, match="refused"):
        await TrioConnection.connect(f"host=127.0.0.1 port={port} dbname=x")


async def test_all_failed_addresses_are_named_in_one_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(psycopg.OperationalError, match=r"(?s)127\.0\.0\.1.*127\.0\.0\.2"):
        await TrioConnection.connect(f"host=127.0.0.1,127.0.0.2 port={port} dbname=x")


@pytest.mark.slow
async def test_a_silent_server_ends_in_a_connection_timeout(proxy):
    proxy.black_hole()
    dsn = make_conninfo(proxy.dsn, connect_timeout=2)  # 2 s is the least libpq's rules allow
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        await open_connection(ConnectionSettings(dsn=dsn))


async def test_cancelling_while_connecting_leaves_no_descriptor_open(proxy):
    proxy.black_hole()
    before = len(os.listdir("/proc/self/fd"))
    with trio.move_on_after(0.2) as scope:
        await open_connection(ConnectionSettings(dsn=proxy.dsn))
    assert scope.cancelled_caught
    open_now = len(os.listdir("/proc/self/fd")) - proxy.accepted  # the proxy's own end
    assert open_now <= before


async def test_the_session_is_set_up_at_connect(database_dsn):
    settings = ConnectionSettings(
        dsn=make_conninfo(database_dsn, options="-c work_mem=5MB"),
        application_name="rdev-test",
        statement_timeout_ms=1234,
        idle_in_transaction_timeout_ms=2345,
    ).named("append")
    expected = {
        "application_name": "rdev-test/append",
        "statement_timeout": "1234ms",
        "idle_in_transaction_session_timeout": "2345ms",
        "default_transaction_isolation": "read committed",
        "TimeZone": "UTC",
        "client_encoding": "UTF8",
        "work_mem": "5MB",
    }
    async with await open_connection(settings) as connection:
        found = {name: await scalar(connection, f"show {name}") for name in expected}
        assert found == expected
        assert connection.autocommit


async def test_the_server_ends_a_statement_after_its_timeout(database_dsn):
    settings = ConnectionSettings(dsn=database_dsn, statement_timeout_ms=50)
    async with await open_connection(settings) as connection:
        with pytest.raises(psycopg.errors.QueryCanceled):
            await connection.execute("select pg_sleep(60)")
        assert connection.at_rest


# --- statements


async def test_rows_come_through_any_row_factory(connection):
    cursor = connection.cursor(row_factory=dict_row)
    await cursor.execute("select 1 as a, 'x' as b")
    assert await cursor.fetchall() == [{"a": 1, "b": "x"}]


async def test_a_statement_goes_on_working_when_it_becomes_a_prepared_one(connection):
    assert [await scalar(connection, "select %s::int", (n,)) for n in range(20)] == list(range(20))


async def test_executemany_of_more_than_the_socket_holds(connection):
    await connection.execute("create table t (n int, s text)")
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "insert into t values (%s, %s)", [(n, "x" * 8_000) for n in range(2_000)]
        )
    assert await scalar(connection, "select sum(length(s)) from t") == 16_000_000


async def test_executemany_returns_every_result(connection):
    async with connection.cursor() as cursor:
        await cursor.executemany("select %s::int", [(n,) for n in range(50)], returning=True)
        found = [(await result.fetchone())[0] async for result in cursor.results()]
    assert found == list(range(50))


async def test_one_statement_larger_than_the_socket_buffer(connection):
    assert await scalar(connection, "select length(%s::text)", ("x" * 20_000_000,)) == 20_000_000


async def test_an_explicit_pipeline_returns_every_result(connection):
    async with connection.pipeline():
        cursors = [await connection.execute("select %s::int", (n,)) for n in range(50)]
        assert [(await cursor.fetchone())[0] for cursor in cursors] == list(range(50))
    assert connection.at_rest


async def test_a_transaction_in_a_pipeline_is_committed(connection):
    await connection.execute("create table t (n int)")
    async with connection.pipeline(), connection.transaction():
        await connection.execute("insert into t values (1)")
    assert await scalar(connection, "select count(*) from t") == 1
    assert connection.at_rest


async def test_a_failed_savepoint_leaves_the_outer_transaction(connection):
    await connection.execute("create table t (n int)")

    async def fail_in_a_savepoint() -> None:
        async with connection.transaction():
            await connection.execute("insert into t values (2)")
            raise ZeroDivisionError

    async with connection.transaction():
        await connection.execute("insert into t values (1)")
        with pytest.raises(ZeroDivisionError):
            await fail_in_a_savepoint()
        async with connection.transaction():
            await connection.execute("insert into t values (3)")
    rows = await (await connection.execute("select n from t order by n")).fetchall()
    assert rows == [(1,), (3,)]


async def test_force_rollback_and_rollback_leave_nothing(connection):
    await connection.execute("create table t (n int)")
    async with connection.transaction(force_rollback=True):
        await connection.execute("insert into t values (1)")
    async with connection.transaction():
        await connection.execute("insert into t values (2)")
        raise psycopg.Rollback
    assert await scalar(connection, "select count(*) from t") == 0
    assert connection.at_rest


async def test_copy_in_and_out(connection):
    await connection.execute("create table t (n int, s text)")
    async with connection.cursor() as cursor:
        async with cursor.copy("copy t from stdin") as copy:
            for n in range(20_000):
                await copy.write_row((n, "x" * 100))
        async with cursor.copy("copy t to stdout") as copy:
            rows = [row async for row in copy.rows()]
    assert len(rows) == 20_000
    assert connection.at_rest


async def test_a_server_cursor_reads_in_portions(connection):
    async with connection.transaction(), connection.cursor("c") as cursor:
        await cursor.execute("select * from generate_series(1, 1000)")
        assert len(await cursor.fetchmany(300)) == 300
        assert len(await cursor.fetchall()) == 700
    assert connection.at_rest


async def test_stream_yields_row_by_row(connection):
    async with aclosing(connection.cursor().stream("select generate_series(1, 1000)")) as rows:
        assert sum([row[0] async for row in rows]) == 500_500
    assert connection.at_rest


async def test_commit_and_rollback_without_autocommit(database_dsn, connection):
    await connection.execute("create table t (n int)")
    async with await TrioConnection.connect(database_dsn) as manual:
        await manual.execute("insert into t values (1)")
        await manual.rollback()
        await manual.execute("insert into t values (2)")
        await manual.commit()
        await manual.execute("insert into t values (3)")  # committed by the block's end
    rows = await (await connection.execute("select n from t order by n")).fetchall()
    assert rows == [(2,), (3,)]


# --- notifications


async def test_notifications_arrive_also_those_sent_between_two_waits(connection):
    await connection.execute("listen c")
    await connection.execute("notify c, 'one'")
    await connection.execute("notify c, 'two'")
    async with aclosing(connection.notifies(timeout=30, stop_after=2)) as incoming:
        assert [notification.payload async for notification in incoming] == ["one", "two"]


async def test_waiting_for_notifications_ends_at_its_timeout(connection):
    await connection.execute("listen c")
    async with aclosing(connection.notifies(timeout=0.05)) as incoming:
        assert [notification async for notification in incoming] == []
    assert await scalar(connection, "select 1") == 1


async def test_a_timeout_of_zero_takes_what_is_there(database_dsn, connection):
    await connection.execute("listen c")
    async with await open_connection(ConnectionSettings(dsn=database_dsn)) as other:
        await other.execute("notify c, 'there'")
    with trio.fail_after(30):
        while not connection.has_input:
            await trio.sleep(0.001)
    connection._yielded_at = -1e9  # also when it is its turn to let others run
    async with aclosing(connection.notifies(timeout=0)) as incoming:
        assert [notification.payload async for notification in incoming] == ["there"]


async def test_a_killed_backend_ends_a_wait_for_notifications(database_dsn, connection, nursery):
    await connection.execute("listen c")
    pid = connection.info.backend_pid

    async def kill() -> None:
        async with await open_connection(ConnectionSettings(dsn=database_dsn)) as other:
            await other.execute("select pg_terminate_backend(%s)", (pid,))

    nursery.start_soon(kill)
    incoming = connection.notifies()
    with trio.fail_after(30), pytest.raises(psycopg.OperationalError):
        await anext(incoming)
    assert connection.closed


# --- sharing the loop


async def one_long_operation(connection, is_over: Callable[[], bool]) -> None:
    def always_writable():  # what executemany looks like to the driver
        while not is_over():
            yield Wait.W

    await connection.wait(always_writable())


async def many_short_operations(connection, is_over: Callable[[], bool]) -> None:
    def done_at_once():  # what each row of a COPY looks like
        return
        yield

    while not is_over():
        await connection.wait(done_at_once())


@pytest.mark.parametrize("work_until", [one_long_operation, many_short_operations])
async def test_work_that_never_waits_lets_other_tasks_run(connection, work_until):
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        patience_ends = trio.current_time() + 20
        await work_until(connection, lambda: turns >= 10 or trio.current_time() > patience_ends)
        nursery.cancel_scope.cancel()
    assert turns >= 10


async def test_what_is_done_is_reported_though_a_cancel_comes_with_it(connection):
    def done_at_once():
        return 7
        yield

    result = None
    async with trio.open_nursery() as nursery:
        connection._yielded_at = -1e9  # so that it lets others run first
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel, scope)
            result = await connection.wait(done_at_once())
    assert scope.cancel_called
    assert result == 7


async def cancel(scope: trio.CancelScope) -> None:
    scope.cancel()


async def test_queries_use_no_thread(connection, monkeypatch):
    async def no_thread(*args, **kwargs):
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    async with connection.transaction():
        await connection.execute("select 1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.execute, "select pg_sleep(3)")
        await trio.testing.wait_all_tasks_blocked(0.02)
        nursery.cancel_scope.cancel()
    assert connection.at_rest


async def test_two_tasks_on_one_connection_take_turns(connection):
    found = []

    async def ask(n: int) -> None:
        found.append(await scalar(connection, "select %s::int from pg_sleep(0.001)", (n,)))

    async with trio.open_nursery() as nursery:
        for n in range(30):
            nursery.start_soon(ask, n)
    assert sorted(found) == list(range(30))


async def test_closing_wakes_the_task_that_waits_on_the_connection(database_dsn, nursery):
    connection = await open_connection(ConnectionSettings(dsn=database_dsn))
    waiting = trio.Event()

    async def sleep_on_the_server() -> None:
        waiting.set()
        with pytest.raises(psycopg.OperationalError):
            await connection.execute("select pg_sleep(3)")

    async with trio.open_nursery() as inner:
        inner.start_soon(sleep_on_the_server)
        await waiting.wait()
        await trio.testing.wait_all_tasks_blocked()
        await connection.close()
    assert connection.closed


async def test_closing_wakes_a_task_whose_send_is_stuck(proxy):
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    proxy.black_hole()
    async with trio.open_nursery() as inner:

        async def send() -> None:
            with pytest.raises(psycopg.OperationalError):
                await connection.execute("select length(%s::text)", ("x" * 30_000_000,))

        inner.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await connection.close()


async def test_a_free_lock_does_not_yield():
    lock, turns = FreeLock(), 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        for _ in range(100):
            async with lock:
                assert lock.locked()
        assert turns == 0
        nursery.cancel_scope.cancel()


async def test_the_lock_goes_to_the_longest_waiting_and_survives_a_cancelled_one():
    lock, order = FreeLock(), []

    async def take(n: int, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                order.append(n)

    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as nursery, lock:
        for n, scope in enumerate(scopes):
            nursery.start_soon(take, n, scope)
            await trio.testing.wait_all_tasks_blocked()
        scopes[1].cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert order == [0, 2, 3]
    assert not lock.locked()


async def test_the_same_task_cannot_take_the_lock_twice():
    lock = FreeLock()
    async with lock:
        with pytest.raises(RuntimeError):
            await lock.__aenter__()


def test_the_pause_before_connecting_again_doubles_up_to_its_limit():
    longest = [retry_delay_s(n, lambda: 1.0) for n in range(1, 30)]
    shortest = [retry_delay_s(n, lambda: 0.0) for n in range(1, 30)]
    assert longest[:3] == [FIRST_RETRY_S, FIRST_RETRY_S * 2, FIRST_RETRY_S * 4]
    assert longest[-1] == LAST_RETRY_S
    assert shortest == [pause / 2 for pause in longest]


async def test_class_rows_are_typed_by_the_cursor(connection):
    class Pair:
        def __init__(self, a: int, b: str) -> None:
            self.a, self.b = a, b

    cursor = connection.cursor(row_factory=class_row(Pair))
    await cursor.execute("select 1 as a, 'x' as b")
    pair = await cursor.fetchone()
    assert (pair.a, pair.b) == (1, "x")


async def test_a_connection_that_stays_open_and_says_nothing_is_given_up(proxy):
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    connection.silence_max_s = 0.2
    proxy.black_hole()
    with trio.fail_after(30), pytest.raises(psycopg.OperationalError, match="silent"):
        await connection.execute("select 1")
    assert connection.closed


async def test_what_is_larger_than_every_buffer_is_given_up_too(proxy):
    connection = await open_connection(ConnectionSettings(dsn=proxy.dsn))
    connection.silence_max_s = 0.2
    proxy.black_hole()
    with trio.fail_after(30), pytest.raises(psycopg.OperationalError, match="silent"):
        await connection.execute("select length(%s::text)", ("x" * 30_000_000,))
    assert connection.closed


async def test_a_server_may_be_silent_for_longer_than_a_statement_may_take(proxy):
    settings = ConnectionSettings(dsn=proxy.dsn, statement_timeout_ms=300)
    connection = await open_connection(settings)
    assert connection.silence_max_s == 0.3 + SILENCE_MARGIN_S
    with pytest.raises(psycopg.errors.QueryCanceled):
        await connection.execute("select pg_sleep(60)")
    assert connection.at_rest
    connection.abort()


async def test_without_a_statement_timeout_a_server_may_be_silent_for_ever():
    assert ConnectionSettings(dsn="", statement_timeout_ms=0).silence_max_s == math.inf
