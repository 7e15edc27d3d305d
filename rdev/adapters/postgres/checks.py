"""What `/ready` asks of the database."""

import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from rdev.adapters.postgres.connection import TrioConnection
from rdev.adapters.postgres.migration_files import is_migration
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.errors import ErrorCode, RdevError

_APPLIED = "select version from schema_migrations"
_HAS_TABLE = "select to_regclass('schema_migrations') is not null"


def check_dsn(dsn: str) -> None:
    """Errors: BAD_REQUEST for what libpq cannot read; the text, which may hold a password, is not
    repeated."""
    try:
        conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        message = "RDEV_DATABASE_DSN: is no PostgreSQL URL and no list of key=value"
        raise RdevError(ErrorCode.BAD_REQUEST, message) from error


class DatabaseChecks:
    """Cheap questions over the pool that requests use; a pool that is exhausted is unhealthy.

    Cancellation of all: at once, whatever the database does; the connection is closed."""

    def __init__(self, *, pool: Pool) -> None:
        """The migrations of this build are listed once."""
        self._pool = pool
        folder = importlib.resources.files("rdev") / "sql"
        self._names = sorted(entry.name for entry in folder.iterdir() if is_migration(entry))

    async def database(self) -> None:
        """A round trip. Errors: SERVICE_UNAVAILABLE."""
        with translate_errors():
            async with self._pool.connection() as connection:
                with _closed_when_cancelled(connection):
                    await connection.execute("select 1")

    async def migrations(self) -> None:
        """Every migration of this build is applied; a newer database is fine.

        Errors: SERVICE_UNAVAILABLE, naming what is missing.
        """
        with translate_errors():
            async with self._pool.connection() as connection:
                with _closed_when_cancelled(connection):
                    has_table = await (await connection.execute(_HAS_TABLE)).fetchone()
                    rows = []
                    if has_table is not None and has_table[0]:
                        rows = await (await connection.execute(_APPLIED)).fetchall()
        applied = {row[0] for row in rows}
        missing = [name for name in self._names if name.partition("_")[0] not in applied]
        if missing:
            message = f"not applied: {', '.join(missing)}; run `rdev migrate up`"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)


@contextmanager
def _closed_when_cancelled(connection: TrioConnection[TupleRow]) -> Iterator[None]:
    """A probe's patience is the whole time there is: no waiting on top of it for a database that
    does not answer to end the statement too."""
    before_s, connection.cleanup_s = connection.cleanup_s, 0.0
    try:
        yield
    finally:
        connection.cleanup_s = before_s
