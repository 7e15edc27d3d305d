"""The audit log in PostgreSQL: denials, sealing, reading, and what a verification reads.

Sealing is a function (`sql/0014_seal_in_one_snapshot.sql`): the database hashes, so that neither
entries nor hashes cross the wire and the server's loop is free. Verification is the other way
round: it takes from the database the columns alone and trusts none of its functions that an owner
could replace.
"""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta

import msgspec
from psycopg.rows import DictRow, TupleRow, dict_row
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import (
    PAGE_LOOK_MAX,
    Action,
    AuditFilter,
    AuditPage,
    Denial,
    Entry,
    Outcome,
    Sealed,
    SealedEntry,
)
from rdev.domain.audit_chain import GENESIS, Link, Place
from rdev.domain.pages import PAGE_BYTES

_DAY = timedelta(days=1)

# What an entry takes in an answer besides its detail, about.
_ENTRY_BYTES = 700

_ADD = """
insert into audit_entries (actor, actor_name, ip, request_id, action, target, project, outcome,
                           detail)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""

_SEAL = "select sealed, lag_s, last_seq, last_hash from seal_audit(%s)"

# `audit_seals_pkey` gives the seals, newest or oldest first; each entry is found by its own key.
# The text of `xid` because psycopg knows no xid8.
_SHOWN = """
select s.seq, s.hash, e.day, e.id, e.xid::text as xid, e.at, e.actor, e.actor_name, e.ip,
       e.request_id, e.action, e.target, e.project, e.outcome, e.detail,
       (select p.hash from audit_seals p where p.seq = s.seq - 1) as prev_hash
from (
    select seq, day, entry, hash from audit_seals
    where seq > %(low)s and seq <= %(high)s and day >= %(first_day)s
) s
join audit_entries e on e.day = s.day and e.id = s.entry
where (%(actor)s::text is null or e.actor = %(actor)s)
  and (%(action)s::text is null or e.action = %(action)s)
  and (%(project)s::text is null or e.project = %(project)s)
  and (%(since)s::timestamptz is null or e.at >= %(since)s)
  and (%(until)s::timestamptz is null or e.at < %(until)s)
  and (%(within)s::text[] is null or e.project = any(%(within)s))
"""
_PAGE = _SHOWN + "order by s.seq desc limit %(limit)s"
_READ = _SHOWN + "order by s.seq"

# `audit_seals_day` serves both. A day's entries may stand among the next day's.
_LAST_OF = """
with newest as (
    select day from audit_seals where day <= %(day)s order by day desc limit 1
)
select max(s.seq) from newest n join audit_seals s on s.day between n.day - 1 and n.day
"""
_FIRST_OF = """
with oldest as (
    select day from audit_seals where day >= %(day)s order by day limit 1
)
select min(s.seq) from oldest o join audit_seals s on s.day between o.day and o.day + 1
"""

_BOUNDS = """
select (select seq from audit_seals order by seq limit 1),
       (select seq from audit_seals order by seq desc limit 1)
"""
_PLACE = "select seq, hash from audit_seals where seq = %s"

_RANGE = """
select max(seq), min(day), max(day), min(entry), max(entry)
from (select seq, day, entry from audit_seals where seq > %s order by seq limit %s) s
"""
# What `audit_bytes` makes, by built-in functions only. The ranges keep the planner to the
# partitions and the stretch of the primary key that it needs.
_LINKS = """
select s.seq, s.hash, s.day, e.bytes
from audit_seals s
left join (
    select day, id, '\\x01'::bytea || record_send(row(
        day, id, xid, at, actor, actor_name, ip, request_id, action, target, project, outcome,
        detail)) as bytes
    from audit_entries
    where day between %(first_day)s and %(last_day)s and id between %(first_id)s and %(last_id)s
) e on e.day = s.day and e.id = s.entry
where s.seq > %(after)s and s.seq <= %(last)s
"""

# Between which places the entries of some seals stand: from the first of all (or where the order
# began anew in between, in another cluster) everything below the last one, whatever its number. A
# last one that another cluster has numbered bounds nothing: the sealer looks below it by itself.
_STRETCH = """
select case when %(first)s <= (select min(seq) + 1 from audit_seals)
                 or (f.xid, f.id) > (l.xid, l.id) then '0' else f.xid::text end,
       f.id, l.xid::text, l.id, l.xid < pg_snapshot_xmax(pg_current_snapshot())
from audit_seals fs
join audit_entries f on f.day = fs.day and f.id = fs.entry
join audit_seals ls on ls.seq <= %(last)s
join audit_entries l on l.day = ls.day and l.id = ls.entry
where fs.seq >= %(first)s
order by fs.seq, ls.seq desc
limit 1
"""
# `audit_entries_order` gives the stretch.
_STRANGER = """
select e.xid::text, e.id
from audit_entries e
where (e.xid, e.id) >= (%(first_xid)s::xid8, %(first_id)s)
  and (e.xid, e.id) <= (%(last_xid)s::xid8, %(last_id)s)
  and not exists (select from audit_seals s where s.entry = e.id and s.day = e.day)
order by e.xid, e.id
limit 1
"""
_BEHIND = """
select min(s.seq)
from audit_entries e
join audit_seals s on s.entry = e.id and s.day = e.day
where (e.xid, e.id) > (%(xid)s::xid8, %(id)s) and s.seq between %(first)s and %(last)s
"""
# What is not sealed and stands in a day before the last seal's has been put there.
_LATE = """
select exists (
    select from audit_seals s
    join audit_entries l on l.day = s.day and l.id = s.entry
    join audit_entries e on (e.xid, e.id) > (l.xid, l.id)
    where s.seq = %(last)s and e.day < l.day - 1
      and not exists (select from audit_seals o where o.entry = e.id and o.day = e.day)
      and s.seq = (select max(seq) from audit_seals)
)
"""

_IS_STORED = "select to_regclass('audit_entries_' || to_char(%s::date, 'YYYYMMDD')) is not null"

_DROP = """
select s.seq, s.hash, e.day, e.id, e.xid::text as xid, e.at, e.actor, e.actor_name, e.ip,
       e.request_id, e.action, e.target, e.project, e.outcome, e.detail,
       (select p.hash from audit_seals p where p.seq = s.seq - 1) as prev_hash
from audit_drops d
join audit_entries e on e.day = d.entry_day and e.id = d.entry
join audit_seals s on s.day = e.day and s.entry = e.id
"""
_DROP_OF = _DROP + "where d.day = %s"
_NEWEST_DROP = _DROP + "order by d.entry desc limit 1"


class PostgresAudit:
    """The `AuditLog` and `AuditChain` ports."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def add_denials(self, denials: Sequence[Denial]) -> None:
        """See `AuditLog.add_denials`."""
        rows = [_denial_row(denial) for denial in denials]
        with translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                await connection.cursor().executemany(_ADD, rows)

    async def seal(self, *, limit: int) -> Sealed | None:
        """See `AuditLog.seal`."""
        row = await self._one(_SEAL, (limit,))
        assert row is not None
        if row["sealed"] is None:
            return None
        return Sealed(
            count=row["sealed"],
            lag_s=row["lag_s"],
            last_seq=row["last_seq"],
            last_hash=row["last_hash"],
        )

    async def page(self, wanted: AuditFilter, *, before: int | None, limit: int) -> AuditPage:
        """See `AuditLog.page`."""
        high = await self._newest(wanted) if before is None else before - 1
        low = max(0, high - PAGE_LOOK_MAX)
        if high <= 0:
            return AuditPage(entries=(), before=None)
        values = _values(wanted) | {"low": low, "high": high, "limit": limit}
        rows = await self._all(_PAGE, values)
        found = tuple(_to_sealed(row) for row in _fitting(rows))
        if len(rows) == limit or len(found) < len(rows):
            low = found[-1].seq - 1
        first = (
            1 if wanted.since is None else await self._seq(_FIRST_OF, wanted.since.date() - _DAY)
        )
        bounds = await self.bounds()
        has_more = bounds is not None and low >= max(bounds[0], first or low + 1)
        return AuditPage(entries=found, before=low + 1 if has_more else None)

    async def read(self, wanted: AuditFilter, *, after: int, limit: int) -> list[SealedEntry]:
        """See `AuditLog.read`."""
        values = _values(wanted) | {"low": after, "high": after + limit}
        return [_to_sealed(row) for row in await self._all(_READ, values)]

    async def bounds(self) -> tuple[int, int] | None:
        """See `AuditChain.bounds`."""
        first, last = await self._row(_BOUNDS, ())
        return None if first is None or last is None else (first, last)

    async def place(self, seq: int) -> Place | None:
        """See `AuditChain.place`."""
        row = await self._one(_PLACE, (seq,))
        return None if row is None else Place(seq=row["seq"], hash=row["hash"])

    async def links(self, *, after: int, limit: int) -> list[Link]:
        """See `AuditChain.links`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_RANGE, (after, limit))
                found = await cursor.fetchone()
                if found is None or found[0] is None:
                    return []
                names = ("last", "first_day", "last_day", "first_id", "last_id")
                values = dict(zip(names, found, strict=True)) | {"after": after}
                rows = connection.cursor(binary=True)
                # A plan of its own each time: only so are the other partitions left out of it.
                await rows.execute(_LINKS, values, prepare=False)
                links = [Link(*row) for row in await rows.fetchall()]
        links.sort(key=lambda link: link.seq)
        return links

    async def strangers(self, first: Place, last: Place) -> int | None:
        """See `AuditChain.strangers`."""
        values = {"first": first.seq, "last": last.seq}
        stretch = await self._maybe_row(_STRETCH, values)
        if stretch is None or not stretch[4]:
            return None
        names = ("first_xid", "first_id", "last_xid", "last_id")
        found = await self._maybe_row(_STRANGER, dict(zip(names, stretch[:4], strict=True)))
        if found is not None:
            (seq,) = await self._row(_BEHIND, values | {"xid": found[0], "id": found[1]})
            return last.seq if seq is None else int(seq)
        (is_late,) = await self._row(_LATE, values)
        return last.seq + 1 if is_late else None

    async def is_stored(self, day: date) -> bool:
        """See `AuditChain.is_stored`."""
        (found,) = await self._row(_IS_STORED, (day,))
        return bool(found)

    async def drop_of(self, day: date) -> SealedEntry | None:
        """See `AuditChain.drop_of`."""
        row = await self._one(_DROP_OF, (day,))
        return None if row is None else _to_sealed(row)

    async def newest_drop(self) -> SealedEntry | None:
        """See `AuditChain.newest_drop`."""
        row = await self._one(_NEWEST_DROP, ())
        return None if row is None else _to_sealed(row)

    async def _newest(self, wanted: AuditFilter) -> int:
        """The newest seal that may be asked for, 0 where there is none."""
        day = date.max if wanted.until is None else wanted.until.date()
        return await self._seq(_LAST_OF, day) or 0

    async def _seq(self, statement: str, day: date) -> int | None:
        (seq,) = await self._row(statement, {"day": day})
        return None if seq is None else int(seq)

    async def _row(self, statement: str, parameters: Parameters) -> TupleRow:
        row = await self._maybe_row(statement, parameters)
        assert row is not None
        return row

    async def _maybe_row(self, statement: str, parameters: Parameters) -> TupleRow | None:
        with translate_errors():
            async with self._pool.connection() as connection:
                return await (await connection.execute(statement, parameters)).fetchone()

    async def _one(self, statement: str, parameters: Parameters) -> DictRow | None:
        rows = await self._all(statement, parameters)
        return rows[0] if rows else None

    async def _all(self, statement: str, parameters: Parameters) -> list[DictRow]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return await cursor.fetchall()


def _fitting(rows: Sequence[DictRow]) -> Sequence[DictRow]:
    """Up to the one with which they reach `PAGE_BYTES`. A detail has some kilobytes at most, so
    that all of them could be fetched."""
    size_bytes = 0
    for number, row in enumerate(rows):
        if size_bytes >= PAGE_BYTES:
            return rows[:number]
        size_bytes += _ENTRY_BYTES + len(msgspec.json.encode(row["detail"]))
    return rows


def _values(wanted: AuditFilter) -> dict[str, object]:
    return {
        "actor": wanted.actor,
        "action": wanted.action,
        "project": wanted.project,
        "since": wanted.since,
        "until": wanted.until,
        "within": None if wanted.within is None else sorted(wanted.within),
        "first_day": date.min if wanted.since is None else wanted.since.date() - _DAY,
    }


def _denial_row(denial: Denial) -> tuple[object, ...]:
    detail: Mapping[str, object] = {"reason": denial.reason}
    if denial.repeated is not None:
        detail = {**detail, "repeated": denial.repeated}
    return (
        denial.actor,
        denial.actor_name,
        denial.ip,
        denial.request_id,
        Action.ACCESS_DENIED,
        denial.route,
        denial.project,
        Outcome.DENIED,
        Jsonb(detail),
    )


def _to_sealed(row: DictRow) -> SealedEntry:
    entry = Entry(
        day=row["day"],
        id=row["id"],
        xid=int(row["xid"]),
        at=row["at"],
        actor=row["actor"],
        actor_name=row["actor_name"],
        ip=row["ip"],
        request_id=row["request_id"],
        action=row["action"],
        target=row["target"],
        project=row["project"],
        outcome=row["outcome"],
        detail=row["detail"],
    )
    prev_hash = GENESIS if row["seq"] == 1 else row["prev_hash"]
    return SealedEntry(seq=row["seq"], entry=entry, hash=row["hash"], prev_hash=prev_hash)
