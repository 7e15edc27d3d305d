"""What `rdev doctor` asks of the database: each question one statement on a connection of its own.

Bounds: the statement timeout of the connection settings it is given.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

import psycopg
from psycopg.rows import TupleRow

from rdev.adapters.postgres.checks import DatabaseChecks
from rdev.adapters.postgres.connection import ConnectionSettings, TrioConnection, open_connection
from rdev.adapters.postgres.pool import open_pool, translate_errors
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.findings import Finding, fail, ok, warn, within

_OLDEST_VERSION: Final = 130_000
_SKEW_WARN_S: Final = 0.5
_SKEW_FAIL_S: Final = 5.0
_TRANSACTION_WARN_S: Final = 60.0
_UNSEALED_WARN_S: Final = 60.0
_BACKLOG_WARN_S: Final = 900.0
_LEASE_WARN_S: Final = 60.0

_VERSION = """
select current_setting('server_version_num')::int, current_setting('server_version'),
       pg_is_in_recovery()
"""
_RIGHTS = """
select session_user, current_user, (select rolsuper from pg_roles where rolname = current_user),
       has_table_privilege('audit_entries', 'UPDATE')
         or has_table_privilege('audit_entries', 'DELETE'),
       has_table_privilege('commands', 'SELECT, INSERT, UPDATE')
"""
_CONNECTIONS = """
select current_setting('max_connections')::int
         - current_setting('superuser_reserved_connections')::int,
       (select count(*) from pg_stat_activity where backend_type = 'client backend')
"""
# Writers hold back the feeds and the audit seals; readers hold back vacuum.
_OLDEST = """
select coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8,
       (select count(*) from pg_prepared_xacts),
       (array_agg(pid order by xact_start))[1]
from pg_stat_activity
where datname = current_database() and xact_start is not null and pid <> pg_backend_pid()
"""
_UNSEALED = """
select count(*), coalesce(max(extract(epoch from clock_timestamp() - e.at)), 0)::float8
from audit_entries e
where e.day >= (now() at time zone 'utc')::date - 1
  and not exists (select from audit_seals s where s.day = e.day and s.entry = e.id)
"""
_BACKLOG = """
select count(*) filter (where d.status = 'pending'),
       coalesce(max(extract(epoch from clock_timestamp() - d.created_at))
                filter (where d.status = 'pending'), 0)::float8,
       (select count(*) from webhooks
        where not is_enabled and disabled_reason <> 'requested' and deleted_at is null)
from deliveries d
where d.status = 'pending'
"""
_QUEUE = """
select count(*) filter (where status = 'queued'),
       count(*) filter (where status = 'running'),
       coalesce(max(extract(epoch from clock_timestamp() - lease_until))
                filter (where status = 'running'), 0)::float8
from commands where status in ('queued', 'running')
"""


class DatabaseDoctor:
    """Findings about one database. Errors of all: SERVICE_UNAVAILABLE."""

    def __init__(
        self, settings: ConnectionSettings, *, pool_max: int, now: Callable[[], datetime]
    ) -> None:
        """Opens nothing. `pool_max`: the connections of one server for requests."""
        self._settings = settings
        self._pool_max = pool_max
        self._now = now

    async def reachable(self) -> Finding:
        """A connection, and a version that rdev is tested with."""
        number, version, is_standby = await self._row(_VERSION)
        if is_standby:
            return fail(f"PostgreSQL {version}, a standby", "name the primary in RDEV_DATABASE_DSN")
        if number < _OLDEST_VERSION:
            return fail(f"PostgreSQL {version}", "use PostgreSQL 13 or newer")
        return ok(f"PostgreSQL {version}")

    async def migrations(self) -> Finding:
        """All of this build are applied."""
        async with open_pool(self._settings, min_size=1, max_size=1) as pool:
            try:
                await DatabaseChecks(pool=pool).migrations()
            except RdevError as error:
                return fail(error.message, "run `rdev migrate up` as the owner of the schema")
        return ok("all applied")

    async def rights(self) -> Finding:
        """Enough to serve, and too little to alter the record."""
        login, role, is_super, may_alter, may_serve = await self._row(_RIGHTS)
        who = role if role == login else f"{login} as {role}"
        if not may_serve:
            return fail(f"{who} may not read and write commands", f"grant rdev_app to {login}")
        if may_alter or is_super:
            advice = "serve with a login that is a member of rdev_app alone; migrate as the owner"
            return warn(f"{who} could alter the audit log", advice)
        return ok(f"{who} serves and cannot alter the audit log")

    async def clock(self) -> Finding:
        """This machine's clock beside the database's, which decides. Half of the round trip is
        what it may be wrong by."""
        async with self._connection() as connection:
            before = self._now()
            row = await (await connection.execute("select clock_timestamp()")).fetchone()
            after = self._now()
        assert row is not None
        middle = before + (after - before) / 2
        error_s = (after - before).total_seconds() / 2
        skew_s = max(0.0, abs((row[0] - middle).total_seconds()) - error_s)
        return within(
            skew_s,
            warn_over=_SKEW_WARN_S,
            fail_over=_SKEW_FAIL_S,
            seen=f"{skew_s:.1f} s between this machine and the database",
            advice="synchronise both clocks (NTP): keys, signatures and sessions expire by them",
        )

    async def connections(self) -> Finding:
        """Room for one more server."""
        most, used = await self._row(_CONNECTIONS)
        # Its dedicated ones: heartbeats, appends, claims, housekeeping, listen, three for webhooks.
        needed = self._pool_max + 8
        seen = f"{used} of {most} used; a server takes up to {needed}"
        advice = "raise max_connections, or lower RDEV_DATABASE_POOL_MAX"
        if needed > most:
            return fail(seen, advice)
        return warn(seen, advice) if most - used < needed else ok(seen)

    async def transactions(self) -> Finding:
        """Nothing that has been open for long."""
        oldest_s, prepared, pid = await self._row(_OLDEST)
        if prepared:
            seen = f"{prepared} prepared transactions"
            return warn(seen, "commit or roll them back: they hold back feeds, seals and vacuum")
        return within(
            oldest_s,
            warn_over=_TRANSACTION_WARN_S,
            fail_over=None,
            seen=f"the oldest is {oldest_s:.0f} s old" + (f" (pid {pid})" if pid else ""),
            advice="end it (pg_terminate_backend): it may hold back feeds, audit seals and vacuum",
        )

    async def audit(self) -> Finding:
        """Entries are sealed soon after they were written."""
        count, oldest_s = await self._row(_UNSEALED)
        return within(
            oldest_s if count else 0.0,
            warn_over=_UNSEALED_WARN_S,
            fail_over=None,
            seen=f"{count} entries not sealed yet, the oldest {oldest_s:.0f} s old",
            advice="is a server running? see its log for `audit`, and for a long transaction",
        )

    async def webhooks(self) -> Finding:
        """Deliveries do not wait for long, and no endpoint was given up."""
        pending, oldest_s, given_up = await self._row(_BACKLOG)
        seen = f"{pending} deliveries pending, the oldest {oldest_s:.0f} s old"
        if given_up:
            advice = "see `rdev webhooks list`; mend the receiver, then enable and redeliver"
            return warn(f"{seen}; {given_up} endpoints were disabled", advice)
        return within(
            oldest_s,
            warn_over=_BACKLOG_WARN_S,
            fail_over=None,
            seen=seen,
            advice="look at the attempts (`rdev webhooks deliveries`): what does it answer?",
        )

    async def queue(self) -> Finding:
        """What runs is held by a server that lives."""
        queued, running, overdue_s = await self._row(_QUEUE)
        return within(
            overdue_s,
            warn_over=_LEASE_WARN_S,
            fail_over=None,
            seen=f"{queued} queued, {running} running",
            advice=f"a lease ran out {overdue_s:.0f} s ago and nobody took over: start a server "
            "that reaches the same projects",
        )

    async def _row(self, statement: str) -> TupleRow:
        async with self._connection() as connection:
            row = await (await connection.execute(statement)).fetchone()
        assert row is not None
        return row

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[TrioConnection[TupleRow]]:
        try:
            connection = await open_connection(self._settings.named("doctor"))
        except psycopg.OperationalError as error:
            # libpq's own words name host, port and user, never the password.
            words = str(error).strip().splitlines()[0]
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, words) from error
        with translate_errors():
            async with connection:
                yield connection
