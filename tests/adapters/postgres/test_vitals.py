"""What is seen of the database is what is there."""

import math

import psycopg

from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.pool import open_pool
from rdev.adapters.postgres.vitals import PostgresVitals


async def test_a_transaction_that_stays_open_ages_in_seconds_and_in_transactions(database_dsn):
    settings = ConnectionSettings(dsn=database_dsn)
    async with open_pool(settings, min_size=1, max_size=1) as pool:
        vitals = PostgresVitals(pool=pool)
        with psycopg.connect(database_dsn) as other, psycopg.connect(database_dsn) as writer:
            other.execute("set transaction isolation level repeatable read")
            other.execute("select 1")
            before = await vitals.look()
            for _ in range(5):
                writer.execute("select pg_current_xact_id()")
                writer.commit()
            after = await vitals.look()
    assert after.xmin_age >= before.xmin_age + 5
    assert after.oldest_transaction_s > before.oldest_transaction_s >= 0
    assert after.size_bytes > 1_000_000
    assert 3 <= after.connections <= after.connections_max
    assert not any(map(math.isnan, (after.xmin_age, after.oldest_transaction_s)))
