"""Migrations: plain SQL files, forward and back, applied once each, in order, by one runner.

Owns the table `schema_migrations` (that of dbmate, whose file format this is, and `checksum`,
`applied_at` beside). Bounded by `lock_wait_s` for the turn, `TABLE_LOCK_TIMEOUT_S` for a table and
`STATEMENT_TIMEOUT_S` for a statement. Off the query path, so it is synchronous: the command line
calls it directly (Ctrl-C cancels the running statement), trio calls it in a thread.

Needs a direct connection: the lock belongs to a session, which a transaction pooler does not keep.
"""

import importlib.resources
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources.abc import Traversable
from typing import Final, LiteralString

import psycopg

from rdev.adapters.postgres.migration_files import (
    Migration,
    Section,
    is_migration,
    load,
    statements,
)
from rdev.domain.errors import ErrorCode, RdevError

# Polled, never awaited in the database: a runner that blocks in pg_advisory_lock holds a snapshot,
# CREATE INDEX CONCURRENTLY of the runner that has the lock waits for that snapshot: a deadlock
# (seen with four racing runners: three died).
LOCK_KEY = 0x72646576  # "rdev"
LOCK_POLL_S = 0.1
LOCK_WAIT_S = 300.0
LOCK_RETRY_AFTER_S = 5.0

# While DDL waits for a table, everybody behind it waits too: give up early and come again.
TABLE_LOCK_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 600
CONNECT_TIMEOUT_S = 10

SET_TIMEOUT = "select set_config(%s, %s, %s)"

TRY_LOCK = "select pg_try_advisory_lock(%s)"

# The first statement is dbmate's; a table that dbmate made gets our columns beside.
MAKE_BOOK = """
create table if not exists schema_migrations (version varchar(128) primary key);
alter table schema_migrations
  add column if not exists checksum text,
  add column if not exists applied_at timestamptz not null default now()
"""

HAS_BOOK = "select to_regclass('schema_migrations') is not null"

# to_jsonb: the column is missing where only dbmate has been.
READ_BOOK = """
select version, to_jsonb(m) ->> 'checksum'
from schema_migrations m
order by version
"""

WRITE_APPLIED = "insert into schema_migrations (version, checksum) values (%s, %s)"
DELETE_APPLIED = "delete from schema_migrations where version = %s"


class MigrationState(StrEnum):
    """What is the matter with one version, seen from this build and one database."""

    APPLIED = "applied"
    PENDING = "pending"
    EDITED = "edited"  # the file is not the one that was applied
    OUT_OF_ORDER = "out_of_order"  # pending, but a newer one is applied
    UNKNOWN = "unknown"  # applied, but this build has no file for it


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStatus:
    """One line of `status`; the name of an unknown version is empty."""

    version: str
    name: str
    state: MigrationState


NO_BAR_TO_DOWN: Final = (
    MigrationState.APPLIED,
    MigrationState.PENDING,
    MigrationState.OUT_OF_ORDER,
)


def packaged() -> Traversable:
    """The folder of this build's migrations."""
    return importlib.resources.files("rdev") / "sql"


def up(
    dsn: str,
    to: str | None = None,
    *,
    folder: Traversable | None = None,
    lock_wait_s: float = LOCK_WAIT_S,
) -> list[str]:
    """Apply what is pending, up to and with version `to`; gives the names applied, oldest first.

    A migration and its entry are one transaction, except under `transaction:false`.
    Errors: CONFLICT for faulty, edited, unknown or out-of-order files (before anything is applied)
    and for SQL that fails (what was applied before it stays); SERVICE_UNAVAILABLE when the
    database cannot be reached, or another runner or a table's users are in the way.
    Blocks: for `lock_wait_s` and the statements themselves.
    """
    migrations = load(folder or packaged())
    if to is not None and all(migration.version != to for migration in migrations):
        raise _conflict(f"there is no migration {to}")
    applied = []
    with _turn(dsn, lock_wait_s) as connection:
        lines = _compare(migrations, _book(connection))
        _refuse(lines, allowed=(MigrationState.APPLIED, MigrationState.PENDING))
        pending = {line.version for line in lines if line.state is MigrationState.PENDING}
        for migration in migrations:
            if to is not None and migration.version > to:
                break
            if migration.version in pending:
                entry = (WRITE_APPLIED, [migration.version, migration.checksum])
                _run(connection, migration, migration.up, entry)
                applied.append(migration.name)
    return applied


def down(
    dsn: str,
    steps: int = 1,
    *,
    folder: Traversable | None = None,
    lock_wait_s: float = LOCK_WAIT_S,
) -> list[str]:
    """Take back the newest `steps` applied migrations; gives their names, newest first.

    Errors and Blocks: as `up`; CONFLICT also for a migration without a way back.
    """
    known = {migration.version: migration for migration in load(folder or packaged())}
    reverted = []
    with _turn(dsn, lock_wait_s) as connection:
        book = _book(connection)
        _refuse(_compare(list(known.values()), book), allowed=NO_BAR_TO_DOWN)
        for version in sorted(book, reverse=True)[: max(steps, 0)]:
            migration = known[version]
            if migration.down is None:
                raise _conflict(f"{migration.name} has no way back (`-- migrate:down`)")
            _run(connection, migration, migration.down, (DELETE_APPLIED, [version]))
            reverted.append(migration.name)
    return reverted


def status(dsn: str, *, folder: Traversable | None = None) -> list[MigrationStatus]:
    """Every version that this build or the database knows, oldest first. Changes nothing.

    Errors: SERVICE_UNAVAILABLE when the database cannot be reached; CONFLICT for faulty files.
    """
    migrations = load(folder or packaged())
    with _connection(dsn) as connection:
        return _compare(migrations, _book(connection))


def verify(dsn: str, *, folder: Traversable | None = None) -> None:
    """Return when the database is exactly at this build's version.

    Errors: CONFLICT or SERVICE_UNAVAILABLE with a sentence for each thing that is wrong.
    """
    _refuse(status(dsn, folder=folder), allowed=(MigrationState.APPLIED,))


def pending(database: str | psycopg.Connection, *, folder: Traversable | None = None) -> list[str]:
    """The names of the migrations that are not applied: empty means this build can serve.

    A database newer than this build can serve it too: during a rolling update the old replicas go
    on. One query on the connection given, or on one made for it; files are not read.
    Errors: SERVICE_UNAVAILABLE when the database cannot be reached.
    """
    entries = filter(is_migration, (folder or packaged()).iterdir())
    if isinstance(database, str):
        with _connection(database) as connection:
            book = _book(connection)
    else:
        with _translated():
            book = _book(database)
    return sorted(entry.name for entry in entries if entry.name.partition("_")[0] not in book)


@contextmanager
def _connection(dsn: str) -> Iterator[psycopg.Connection]:
    with (
        _translated(),
        psycopg.connect(
            dsn,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name="rdev-migrate",
            # Else a database of SQL_ASCII answers in bytes.
            client_encoding="UTF8",
        ) as connection,
    ):
        connection.execute(SET_TIMEOUT, ["statement_timeout", f"{STATEMENT_TIMEOUT_S}s", False])
        yield connection


@contextmanager
def _turn(dsn: str, lock_wait_s: float) -> Iterator[psycopg.Connection]:
    """A connection that is the only runner's; closing it gives the turn to the next."""
    with _connection(dsn) as connection:
        deadline = time.monotonic() + lock_wait_s  # noqa: TID251 - synchronous: no trio clock here
        while connection.execute(TRY_LOCK, [LOCK_KEY]).fetchone() != (True,):
            if time.monotonic() > deadline:  # noqa: TID251
                message = f"another rdev has been migrating for {lock_wait_s:g} s; try again later"
                raise RdevError(
                    ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=LOCK_RETRY_AFTER_S
                )
            time.sleep(LOCK_POLL_S)  # noqa: TID251
        connection.execute(MAKE_BOOK)
        yield connection


def _book(connection: psycopg.Connection) -> dict[str, str | None]:
    """The applied versions and their checksums (None where dbmate applied them)."""
    if connection.execute(HAS_BOOK).fetchone() != (True,):
        return {}
    return dict(connection.execute(READ_BOOK).fetchall())


def _compare(
    migrations: Sequence[Migration], book: Mapping[str, str | None]
) -> list[MigrationStatus]:
    newest = max(book, default="")
    lines = [
        MigrationStatus(version=known.version, name=known.name, state=_state(known, book, newest))
        for known in migrations
    ]
    lines.extend(
        MigrationStatus(version=version, name="", state=MigrationState.UNKNOWN)
        for version in book.keys() - {known.version for known in migrations}
    )
    return sorted(lines, key=lambda line: line.version)


def _state(migration: Migration, book: Mapping[str, str | None], newest: str) -> MigrationState:
    if migration.version in book:
        edited = book[migration.version] not in (None, migration.checksum)
        return MigrationState.EDITED if edited else MigrationState.APPLIED
    late = migration.version < newest
    return MigrationState.OUT_OF_ORDER if late else MigrationState.PENDING


def _refuse(lines: Sequence[MigrationStatus], *, allowed: Sequence[MigrationState]) -> None:
    """Raise one error with a sentence for every line whose state is not allowed."""
    wrong = [line for line in lines if line.state not in allowed]
    if not wrong:
        return
    only_pending = all(line.state is MigrationState.PENDING for line in wrong)
    code = ErrorCode.SERVICE_UNAVAILABLE if only_pending else ErrorCode.CONFLICT
    raise RdevError(code, "; ".join(_sentence(line) for line in wrong))


def _sentence(line: MigrationStatus) -> str:
    match line.state:
        case MigrationState.APPLIED:
            return f"{line.name} is applied"
        case MigrationState.PENDING:
            return f"{line.name} is not applied: run `rdev migrate up`"
        case MigrationState.EDITED:
            return (
                f"{line.name} was edited after it was applied: restore the file and put the "
                "change into a new migration"
            )
        case MigrationState.OUT_OF_ORDER:
            return f"{line.name} comes before a version that is applied: give it the next number"
        case MigrationState.UNKNOWN:
            return (
                f"version {line.version} is applied but this build has no file for it: the "
                "database is newer, run the rdev that brought it"
            )


def _run(
    connection: psycopg.Connection,
    migration: Migration,
    section: Section,
    entry: tuple[LiteralString, list[str]],
) -> None:
    """Run one section and make or delete its entry in the book."""
    if section.transaction:
        with connection.transaction():
            connection.execute(SET_TIMEOUT, ["lock_timeout", f"{TABLE_LOCK_TIMEOUT_S}s", True])
            _execute(connection, migration, section)
            connection.execute(*entry)
    else:
        # No lock_timeout: CREATE INDEX CONCURRENTLY waits for old transactions by it, harmlessly,
        # and would leave an invalid index behind.
        for statement in statements(section):
            _execute(connection, migration, statement)
        connection.execute(*entry)


def _execute(connection: psycopg.Connection, migration: Migration, section: Section) -> None:
    try:
        connection.execute(section.sql.encode())
    except psycopg.errors.LockNotAvailable as error:
        message = (
            f"{migration.name} waited {TABLE_LOCK_TIMEOUT_S} s for a table that is in use and was "
            "rolled back: try again"
        )
        raise RdevError(
            ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=LOCK_RETRY_AFTER_S
        ) from error
    except psycopg.Error as error:
        if connection.broken:
            raise
        # Many errors carry no position: then a whole section is as close as it gets.
        position = error.diag.statement_position or ("" if section.transaction else "1")
        line = f", line {section.line_of(int(position))}" if position else ""
        left = (
            "it was rolled back"
            if section.transaction
            else "it ran without a transaction, so its earlier statements stay: put them right by "
            "hand before it runs again"
        )
        reason = error.diag.message_primary or str(error)
        raise _conflict(f"{migration.name}{line}: {reason}; {left}") from error


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[0]
        message = f"the database cannot be used for migrations: {reason}"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message) from error


def _conflict(message: str) -> RdevError:
    return RdevError(ErrorCode.CONFLICT, message)
