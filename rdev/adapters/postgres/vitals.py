"""Looking at the PostgreSQL that holds everything."""

from psycopg.rows import class_row

from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.ports.vitals import Vitals

# What holds the horizon of VACUUM: sessions with a snapshot or a number, what was prepared, slots.
# Sessions of other roles are shown to members of pg_read_all_stats only; without it this is about
# rdev's own role, and slots. A walsender's horizon is a standby's.
_LOOK = """
with holders as (
    select extract(epoch from clock_timestamp() - xact_start) as held_s,
           greatest(age(backend_xmin), age(backend_xid)) as xids
    from pg_stat_activity
    where (backend_xmin is not null or backend_xid is not null) and pid <> pg_backend_pid()
    union all
    select extract(epoch from clock_timestamp() - prepared), age(transaction)
    from pg_prepared_xacts
    union all
    select null, greatest(age(xmin), age(catalog_xmin))
    from pg_replication_slots
)
select greatest(coalesce(max(held_s), 0), 0)::float8 as oldest_transaction_s,
       coalesce(max(xids), 0)::float8 as xmin_age,
       pg_database_size(current_database())::float8 as size_bytes,
       (select sum(numbackends) from pg_stat_database)::float8 as connections,
       current_setting('max_connections')::float8 as connections_max
from holders
"""


class PostgresVitals:
    """The `DatabaseVitals` port."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def look(self) -> Vitals:
        """See `DatabaseVitals.look`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=class_row(Vitals))
                await cursor.execute(_LOOK)
                found = await cursor.fetchone()
        assert found is not None, "an aggregate is one row"
        return found
