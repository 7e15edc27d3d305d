"""What `/ready` asks: bounded by whoever asks, also where nobody answers."""

import pytest
import trio

from rdev.adapters.postgres.checks import DatabaseChecks
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.pool import open_pool

DEADLINE_S = 30


@pytest.mark.parametrize("name", ["database", "migrations"])
async def test_a_check_of_a_database_that_hangs_ends_with_the_patience_of_who_asks(proxy, name):
    """By construction: the statement's clean-up alone would take an hour."""
    settings = ConnectionSettings(dsn=proxy.dsn)
    with trio.fail_after(DEADLINE_S):
        async with open_pool(settings, min_size=1, max_size=1, wait_s=DEADLINE_S) as pool:
            async with pool.connection() as connection:
                connection.cleanup_s = 3_600
            proxy.black_hole()
            with trio.move_on_after(0.2) as patience:
                await getattr(DatabaseChecks(pool=pool), name)()
            assert patience.cancelled_caught
            assert connection.closed


async def test_a_check_leaves_the_connection_as_it_was(database_dsn):
    settings = ConnectionSettings(dsn=database_dsn)
    async with open_pool(settings, min_size=1, max_size=1) as pool:
        async with pool.connection() as connection:
            before_s = connection.cleanup_s
        await DatabaseChecks(pool=pool).database()
        async with pool.connection() as again:
            assert again is connection
            assert again.cleanup_s == before_s > 0
