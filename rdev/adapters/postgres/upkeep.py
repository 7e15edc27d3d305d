"""The housekeeper's duties in PostgreSQL.

A turn is a session's advisory lock, asked for and never waited for, on a connection of the
housekeeper's own that does the duties too: whoever loses the connection loses the turn.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import date

import psycopg
import trio
from psycopg import errors
from psycopg.rows import DictRow, TupleRow, dict_row

from rdev.adapters.postgres.connection import TrioConnection
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.idempotency import IDEMPOTENCY_S
from rdev.domain.ids import CommandId, ProjectId, attempt_id, command_id, command_uuid
from rdev.domain.retention import Ended, OutputDay

_TAKE_TURN = "select pg_try_advisory_lock(hashtextextended(%s, 0))"
_END_TURN = "select pg_advisory_unlock(hashtextextended(%s, 0))"
# How long ending a turn may take; a connection that cannot is closed, which ends it too.
END_S = 1.0

# Keys are kept a little longer than they stand for something: whoever found one may read it.
_KEY_MARGIN_S = 3_600
# How long dropping a day waits for whoever reads it; the appends of today wait behind it.
_DROP_WAIT = "100ms"

_ENSURE_PARTITIONS = "select ensure_output_partitions(%(days)s), ensure_audit_partitions(%(days)s)"

# Functions of the owner's, who alone may drop a table.
_DROP_OUTPUT = "select drop_output_day(%s)"
_DROP_AUDIT = "select drop_audit_day(%s, %s)"

_OLD_AUDIT_DAYS = """
select stored.day
from (
    select to_date(right(c.relname, 8), 'YYYYMMDD') as day
    from pg_inherits i
    join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'audit_entries'::regclass
) stored, audit_policy p
where stored.day < (now() at time zone 'utc')::date - greatest(%s, p.retention_days)
order by stored.day
"""

# What waits or runs is found over `commands_queued` and `commands_running`.
_OUTPUT_DAYS = """
with stored as (
    select to_date(right(c.relname, 8), 'YYYYMMDD') as day, pg_total_relation_size(c.oid) as bytes
    from pg_inherits i
    join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'output'::regclass
), live as (
    select day from commands where status = 'queued'
    union
    select day from commands where status = 'running'
)
select day, (now() at time zone 'utc')::date - day as age_days, bytes as size_bytes,
       day not in (select l.day from live l) as is_settled
from stored
order by day
"""

_FORGET_KEYS = """
delete from idempotency_keys
where (key_id, key) in (
    select key_id, key
    from idempotency_keys
    where made_at < now() - make_interval(secs => %(older_s)s)
    order by made_at
    limit %(limit)s
)
"""

# There are as many windows as keys and projects were used lately, and no index on what every
# request changes: the table is read through. A cell leaves with the end of the sixtieth after it
# (see take_hits); a second more is for a clock that is set back.
_FORGET_WINDOWS = """
delete from rate_windows
where ctid = any(array(
    select ctid from rate_windows
    where coalesce((cells[cardinality(cells)] + 61) * window_us / 60 / 1e6 + 1, 0)
          < extract(epoch from clock_timestamp())
    limit %(limit)s
    for update skip locked
))
"""

# From the beginning of the order on, up to the first that is young: nothing young goes with what is
# filed behind it. The last of the old ones stays: it says that whoever stands before it has missed
# something (`FeedLog`), and of what stands before it nothing is kept.
_FORGET_EVENTS = """
delete from events
where (xid, position) in (
    select xid, position
    from (
        select xid, position,
               bool_and(is_old) over (order by xid, position
                                      rows between unbounded preceding and 1 following) as is_gone,
               lead(xid) over (order by xid, position) is not null as has_next
        from (
            select xid, position, at < now() - make_interval(secs => %(older_s)s) as is_old
            from events
            order by xid, position
            limit %(limit)s + 1
        ) first
    ) run
    where is_gone and has_next
)
"""

# `commands_finished` serves these. Reaches are few: they are found by jumping from one to the next.
_FORGET_COMMANDS = """
with recursive reaches as (
    (select reach from commands where finished_at is not null order by reach limit 1)
    union all
    select (select c.reach from commands c
            where c.finished_at is not null and c.reach > r.reach order by c.reach limit 1)
    from reaches r
    where r.reach is not null
), old as (
    select o.id
    from reaches r
    cross join lateral (
        select c.id from commands c
        where c.reach = r.reach and c.finished_at < now() - make_interval(secs => %(older_s)s)
          and c.kill ->> 'confirmed' is distinct from 'false'
        order by c.reach, c.finished_at
        limit %(limit)s
    ) o
    limit %(limit)s
)
delete from commands where id in (select id from old)
"""

# Ids begin with the milliseconds of their making, so their primary keys are in order of age. What
# is still to be sent stays, with its message, however old it is, unless its endpoint is no more.
# (The outer condition is asked again of a row that somebody else has just changed: it may have been
# asked for anew.) A message goes a day after its deliveries, made in the same statement.
_FORGET_DELIVERIES = """
with bounds as materialized (
    select first_uuid7(at) as delivery, first_uuid7(at - interval '1 day') as message
    from (select clock_timestamp() - make_interval(secs => %(older_s)s) as at) old
), owed as materialized (
    select d.id, d.event_id
    from deliveries d
    join webhooks w on w.id = d.webhook_id and w.deleted_at is null
    where d.id < (select delivery from bounds) and d.status = 'pending'
    union all
    select d.id, d.event_id
    from deliveries d
    where d.id < (select delivery from bounds) and d.status = 'sending'
), deliveries_gone as (
    delete from deliveries g
    where g.id in (select d.id from deliveries d
                   where d.id < (select delivery from bounds)
                     and not exists (select from owed where owed.id = d.id)
                   order by d.id limit %(limit)s)
      and (g.status in ('delivered', 'dead')
           or g.status = 'pending'
              and not exists (select from webhooks w
                              where w.id = g.webhook_id and w.deleted_at is null))
    returning id
), attempts_gone as (
    delete from delivery_attempts where delivery_id in (select id from deliveries_gone)
), messages_gone as (
    delete from webhook_messages
    where id in (select m.id from webhook_messages m
                 where m.id < (select message from bounds)
                   and not exists (select from owed where owed.event_id = m.id)
                 order by m.id limit %(limit)s)
    returning id
), webhooks_gone as (
    delete from webhooks
    where deleted_at < clock_timestamp() - make_interval(secs => %(older_s)s)
)
select greatest((select count(*) from deliveries_gone), (select count(*) from messages_gone))
"""

_UNTIDIED = """
select c.id, c.project, c.attempt, c.finished_at
from commands c
where c.reach = %(reach)s
  and c.finished_at < now() - make_interval(secs => %(older_s)s)
  and c.finished_at >= coalesce((select until from tidied where reach = %(reach)s), '-infinity')
  and (c.finished_at, c.id) > coalesce(
      (select (until, command) from tidied where reach = %(reach)s),
      ('-infinity'::timestamptz, '00000000-0000-0000-0000-000000000000'::uuid))
  and c.started_at is not null
  and c.kill ->> 'confirmed' is distinct from 'false'
order by c.reach, c.finished_at, c.id
limit %(limit)s
"""

_MARK_TIDIED = """
insert into tidied (reach, until, command)
values (%(reach)s, %(until)s, %(command)s)
on conflict (reach) do update set until = excluded.until, command = excluded.command
"""

_PRUNABLE = """
select id, project, attempt, finished_at
from commands
where reach = %(reach)s and finished_at < now() - make_interval(secs => %(older_s)s)
  and kill ->> 'confirmed' is distinct from 'false'
order by reach, finished_at
limit %(limit)s
"""

# `commands_unkilled` serves it.
_UNKILLED = """
select id, project, attempt, finished_at
from commands
where reach = %(reach)s and kill ->> 'confirmed' = 'false' and finished_at is not null
order by reach, id
limit %(limit)s
"""

# What follows for the project is `heed_kill`'s (`sql/0012_record.sql`), in this server's name.
_CONFIRM_KILL = """
with named as materialized (select set_config('rdev.holder', %(holder)s, true))
update commands
set kill = '{"confirmed": true, "survivors": []}'
from named
where id = %(id)s and kill ->> 'confirmed' = 'false'
"""

_FORGET = "delete from commands where id = any(%s) and finished_at is not null"


class PostgresUpkeep:
    """The `Upkeep` port."""

    def __init__(self, *, pool: Pool, holder: str) -> None:
        """`pool` is the housekeeper's own (size 1); `holder` names this server."""
        self._pool = pool
        self._holder = holder

    @asynccontextmanager
    async def store_turn(self) -> AsyncIterator["PostgresStoreDuties | None"]:
        """See `Upkeep.store_turn`."""
        async with self._turn("rdev.store") as connection:
            yield None if connection is None else PostgresStoreDuties(connection)

    @asynccontextmanager
    async def place_turn(self, reach: str) -> AsyncIterator["PostgresPlaceDuties | None"]:
        """See `Upkeep.place_turn`."""
        async with self._turn(f"rdev.place {reach}") as connection:
            yield (
                None if connection is None else PostgresPlaceDuties(connection, reach, self._holder)
            )

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[TrioConnection[TupleRow] | None]:
        with translate_errors():
            async with self._pool.connection() as connection:
                row = await (await connection.execute(_TAKE_TURN, (name,))).fetchone()
                if row is None or not row[0]:
                    yield None
                    return
                try:
                    yield connection
                finally:
                    await _end_turn(connection, name)  # noqa: ASYNC102  # shields itself


async def _end_turn(connection: TrioConnection[TupleRow], name: str) -> None:
    """Let the next one have it; a connection that cannot say so is closed."""
    # shielded: a connection that goes back to its pool with the lock would keep all others out
    with trio.move_on_after(END_S, shield=True):
        try:
            await connection.execute(_END_TURN, (name,))
            return
        except psycopg.Error:
            pass  # it was lost, or is not in order: closed, it has no lock either
    connection.abort()


class PostgresStoreDuties:
    """The `StoreDuties` port, on the connection that has the turn."""

    def __init__(self, connection: TrioConnection[TupleRow]) -> None:
        self._connection = connection

    async def ensure_partitions(self, *, days_ahead: int) -> None:
        """See `StoreDuties.ensure_partitions`."""
        with translate_errors():
            await self._connection.execute(_ENSURE_PARTITIONS, {"days": days_ahead})

    async def output_days(self) -> list[OutputDay]:
        """See `StoreDuties.output_days`."""
        with translate_errors():
            cursor = self._connection.cursor(row_factory=dict_row)
            await cursor.execute(_OUTPUT_DAYS)
            return [OutputDay(**row) for row in await cursor.fetchall()]

    async def drop_output(self, day: date) -> bool:
        """See `StoreDuties.drop_output`. The partition and its parent are locked, briefly."""
        with translate_errors():
            try:
                async with self._connection.transaction():
                    await self._connection.execute(f"set local lock_timeout = '{_DROP_WAIT}'")
                    await self._connection.execute(_DROP_OUTPUT, (day,))
            except errors.LockNotAvailable:
                return False
        return True

    async def old_audit_days(self, *, keep_days: int) -> list[date]:
        """See `StoreDuties.old_audit_days`."""
        with translate_errors():
            cursor = await self._connection.execute(_OLD_AUDIT_DAYS, (keep_days,))
            return [row[0] for row in await cursor.fetchall()]

    async def drop_audit(self, day: date, *, keep_days: int) -> bool:
        """See `StoreDuties.drop_audit`. The partition and its parent are locked, briefly."""
        with translate_errors():
            try:
                async with self._connection.transaction():
                    await self._connection.execute(f"set local lock_timeout = '{_DROP_WAIT}'")
                    await self._connection.execute(_DROP_AUDIT, (day, keep_days))
            except (errors.LockNotAvailable, errors.ObjectNotInPrerequisiteState):
                return False
        return True

    async def forget_keys(self, *, limit: int) -> int:
        """See `StoreDuties.forget_keys`."""
        values = {"older_s": IDEMPOTENCY_S + _KEY_MARGIN_S, "limit": limit}
        return await self._delete(_FORGET_KEYS, values)

    async def forget_windows(self, *, limit: int) -> int:
        """See `StoreDuties.forget_windows`."""
        return await self._delete(_FORGET_WINDOWS, {"limit": limit})

    async def forget_events(self, *, older_s: float, limit: int) -> int:
        """See `StoreDuties.forget_events`."""
        return await self._delete(_FORGET_EVENTS, {"older_s": older_s, "limit": limit})

    async def forget_commands(self, *, older_s: float, limit: int) -> int:
        """See `StoreDuties.forget_commands`."""
        return await self._delete(_FORGET_COMMANDS, {"older_s": older_s, "limit": limit})

    async def forget_deliveries(self, *, older_s: float, limit: int) -> int:
        """See `StoreDuties.forget_deliveries`."""
        values = {"older_s": older_s, "limit": limit}
        with translate_errors():
            row = await (await self._connection.execute(_FORGET_DELIVERIES, values)).fetchone()
            return 0 if row is None else int(row[0])

    async def _delete(self, statement: str, values: Mapping[str, float]) -> int:
        with translate_errors():
            return (await self._connection.execute(statement, values)).rowcount


class PostgresPlaceDuties:
    """The `PlaceDuties` port, on the connection that has the turn."""

    def __init__(self, connection: TrioConnection[TupleRow], reach: str, holder: str) -> None:
        self._connection = connection
        self._reach = reach
        self._holder = holder

    async def untidied(self, *, older_s: float, limit: int) -> list[Ended]:
        """See `PlaceDuties.untidied`."""
        return await self._ended(_UNTIDIED, older_s, limit)

    async def mark_tidied(self, last: Ended) -> None:
        """See `PlaceDuties.mark_tidied`."""
        values = {
            "reach": self._reach,
            "until": last.ended_at,
            "command": command_uuid(last.command),
        }
        with translate_errors():
            await self._connection.execute(_MARK_TIDIED, values)

    async def unkilled(self, *, limit: int) -> list[Ended]:
        """See `PlaceDuties.unkilled`."""
        return await self._ended(_UNKILLED, 0, limit)

    async def confirm_kill(self, command: CommandId) -> None:
        """See `PlaceDuties.confirm_kill`."""
        with translate_errors():
            values = {"id": command_uuid(command), "holder": self._holder}
            await self._connection.execute(_CONFIRM_KILL, values)

    async def prunable(self, *, older_s: float, limit: int) -> list[Ended]:
        """See `PlaceDuties.prunable`."""
        return await self._ended(_PRUNABLE, older_s, limit)

    async def forget(self, commands: Sequence[CommandId]) -> None:
        """See `PlaceDuties.forget`."""
        with translate_errors():
            await self._connection.execute(_FORGET, ([command_uuid(each) for each in commands],))

    async def _ended(self, statement: str, older_s: float, limit: int) -> list[Ended]:
        values = {"reach": self._reach, "older_s": older_s, "limit": limit}
        with translate_errors():
            cursor = self._connection.cursor(row_factory=dict_row)
            await cursor.execute(statement, values)
            return [_to_ended(row) for row in await cursor.fetchall()]


def _to_ended(row: DictRow) -> Ended:
    command = command_id(row["id"])
    return Ended(
        command=command,
        attempt=attempt_id(command, max(1, row["attempt"])),
        project=ProjectId(row["project"]),
        ended_at=row["finished_at"],
    )
