"""One PostgreSQL server for all sides, and a fresh database for each measurement.

A database is filled once and copied for each repetition, so that all repetitions begin alike.
"""

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import trio
from psycopg import sql
from psycopg.conninfo import make_conninfo

from rdev.adapters.postgres.embedded import open_embedded

# As an operator would have it on a small machine: every commit reaches the disk, room for WAL, so
# that no repetition meets a checkpoint that another one caused.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_wal_size": "4GB",
    "shared_preload_libraries": "pg_stat_statements",
}

Fill = Callable[[str], Awaitable[None]]


class Databases:
    """Templates by name, and copies of them."""

    def __init__(self, dsn: str) -> None:
        """`dsn` is a superuser's."""
        self._dsn = dsn
        self._templates: set[str] = set()
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def filled(self, template: str, fill: Fill) -> AsyncIterator[str]:
        """The conninfo of a database that `fill` filled once, before any copy was made."""
        if template not in self._templates:
            # It is there when filling it failed before.
            await self._execute("drop database if exists {}", template)
            await self._execute("create database {}", template)
            await fill(make_conninfo(self._dsn, dbname=template))
            self._templates.add(template)
        name = f"{template}_{next(self._numbers)}"
        await self._execute("create database {} template {} strategy file_copy", name, template)
        await self._execute("checkpoint")
        try:
            yield make_conninfo(self._dsn, dbname=name)
        finally:
            # shielded: the next repetition must not share the disk with what is left of this one
            with trio.CancelScope(shield=True):
                await self._execute("drop database {} with (force)", name)

    async def _execute(self, statement: str, *names: str) -> None:
        query = sql.SQL(statement).format(*map(sql.Identifier, names))
        await trio.to_thread.run_sync(_execute, self._dsn, query)


def _execute(dsn: str, query: sql.Composed) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(query)


def cpu_s(dsn: str) -> float:
    """What the processes that serve this database have used, in seconds of CPU: those of its
    present connections, without the one that asks. 0 where there is no /proc."""
    query = "select pid from pg_stat_activity where datname = current_database()"
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute(f"{query} and pid <> pg_backend_pid()").fetchall()
    return sum(_process_cpu_s(pid) for (pid,) in found)


def _process_cpu_s(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def open_databases(state_dir: Path) -> AsyncIterator[Databases]:
    """A server in an empty folder while the block runs."""
    async with open_embedded(state_dir, settings=SETTINGS) as dsn:
        yield Databases(dsn)
