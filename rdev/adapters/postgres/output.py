"""The log of events in PostgreSQL: one statement appends for all commands of the process.

The fence is the update of the command's own row: everything else is drawn from its RETURNING, the
record of an end as well. (A check by join or EXISTS is no fence: it was seen to accept a stale
append after the take-over had committed.) Comparing what an append starts at makes a repeat after a
lost reply harmless: the offsets, and the last number, because some events stand for no bytes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set

import msgspec
from psycopg import DataError, IntegrityError, InternalError, ProgrammingError
from psycopg.rows import DictRow, dict_row

from rdev.adapters.postgres.connection import TrioConnection
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import Lease, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Offsets
from rdev.domain.ids import CommandId, command_id, command_uuid
from rdev.domain.stream import Chunk, GapEvent, Source, gap_line
from rdev.ports.output import Append, AppendResult, AppendState, NewChunk

# Rows are locked in id order; one that another statement holds is skipped and comes in the next
# batch. A row that was changed in between is judged again in its newest version; its status, under
# the lock. The primary key serves it, one look-up for each row (`lateral` with a lock, `id = any`):
# a join may be planned as a walk over the whole key while the table is small, and that plan is kept
# while it grows. `status || ''` keeps the planner from the index of running commands, through which
# it would read all that ever ran while some transaction holds a snapshot.
_MOVE = """
with input as (
    select *
    from unnest(
        %(id)s::uuid[], %(lease_id)s::bigint[],
        %(start_out)s::bigint[], %(start_err)s::bigint[], %(start_seq)s::bigint[],
        %(end_out)s::bigint[], %(end_err)s::bigint[], %(events)s::bigint[],
        %(status)s::text[], %(exit_code)s::integer[], %(signal)s::integer[], %(reason)s::text[],
        %(duration_ms)s::bigint[], %(late_bytes)s::bigint[], %(kill)s::jsonb[],
        %(session_id)s::text[], %(usage)s::jsonb[]
    ) as i (id, lease_id, start_out, start_err, start_seq, end_out, end_err, events,
            status, exit_code, signal, reason, duration_ms, late_bytes, kill, session_id, usage)
), locked as (
    select i.*
    from (select * from input order by id) i
    cross join lateral (
        select
        from commands c
        where c.id = i.id and c.lease_id = i.lease_id and c.status || '' = 'running'
          and (i.status is distinct from 'queued' or c.cancel_requested_at is null)
        for update skip locked
    ) c
), moved as (
    update commands c
    set last_seq = c.last_seq + i.events,
        out_offset = i.end_out,
        err_offset = i.end_err,
        status = coalesce(i.status, c.status),
        finished_at = case when i.status <> 'queued' then clock_timestamp() end,
        spec = case when coalesce(i.status, 'queued') = 'queued' then c.spec end,
        attempt_seq = case when i.status = 'queued' then c.last_seq + i.events
                           else c.attempt_seq end,
        dropped_bytes = case when i.status = 'queued' then 0 else c.dropped_bytes end,
        exit_code = i.exit_code,
        signal = i.signal,
        reason = case when i.status <> 'queued' then i.reason end,
        duration_ms = i.duration_ms,
        late_bytes = coalesce(i.late_bytes, 0),
        kill = i.kill,
        session_id = coalesce(i.session_id, c.session_id),
        usage = coalesce(i.usage, c.usage){changed_xid}
    from locked i
    where c.id = any(%(id)s::uuid[]) and c.id = i.id
      and c.lease_id = i.lease_id
      and c.out_offset = i.start_out and c.err_offset = i.start_err
      and c.last_seq = i.start_seq
    returning c.day, c.id, i.start_seq as base{told}
), stored as (
    insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
    select m.day, m.id, m.base + k.skip + 1, m.base + k.skip + k.events, k.source, k.raw_bytes,
           k.payload
    from moved m
    join unnest(
        %(chunk_id)s::uuid[], %(chunk_skip)s::bigint[], %(chunk_events)s::bigint[],
        %(chunk_source)s::smallint[], %(chunk_raw_bytes)s::integer[], %(chunk_payload)b::bytea[]
    ) as k (id, skip, events, source, raw_bytes, payload) using (id)
){record}
select id from moved
"""

# Only output: it changes no status, and there is nothing to record.
_APPEND = _MOVE.format(changed_xid="", told="", record="")

# Ends among them, or attempts that others will follow.
_APPEND_ENDS = _MOVE.format(
    changed_xid=""",
        changed_xid = case when i.status is null then c.changed_xid
                           else greatest(pg_current_xact_id(), c.changed_xid) end""",
    told=""",
              i.status is not null as is_changed, c.project, c.kind, c.status, c.attempt,
              c.last_seq, c.changed_xid, c.holder, i.reason, c.exit_code, c.signal, c.duration_ms,
              c.dropped_bytes, c.out_offset, c.err_offset""",
    record="""
, change as (
    insert into events (xid, type, project, command_id, kind, status, attempt, seq, detail)
    select changed_xid, event_type(status), project, id, kind, status, attempt, last_seq,
           case when status = 'queued'
                then jsonb_strip_nulls(jsonb_build_object('reason', reason))
                else jsonb_build_object(
                    'reason', reason, 'exit_code', exit_code, 'signal', signal,
                    'duration_ms', duration_ms, 'truncated', dropped_bytes > 0,
                    'stdout_bytes', out_offset, 'stderr_bytes', err_offset) end
    from moved
    where is_changed
), entry as (
    insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
    select changed_xid, 'server', holder,
           case when status = 'queued' then 'command.queued' else 'command.finished' end,
           command_name(id), project,
           jsonb_strip_nulls(jsonb_build_object(
               'kind', kind, 'status', status, 'reason', reason, 'exit_code', exit_code,
               'attempt', attempt))
    from moved
    where is_changed
)""",
)

# Why rows did not come back: read after the statement, outside of it.
_LOOK_AGAIN = """
select id, lease_id, status, out_offset, err_offset, last_seq,
       cancel_requested_at is not null as cancel_requested
from commands
where id = any(%s)
"""

# The first chunk is found by the primary key (the last one that begins at or before the number).
# The limit of rows bounds what the sum looks at; lengths are known without fetching payloads.
_READ = """
select first_seq, last_seq, source, raw_bytes, payload
from (
    select o.*,
           sum(octet_length(payload)) over (order by first_seq) - octet_length(payload)
               as bytes_before
    from (
        select first_seq, last_seq, source, raw_bytes, payload
        from output
        where day = (select day from commands where id = %(id)s)
          and command_id = %(id)s
          and first_seq >= coalesce((
              select max(first_seq)
              from output
              where day = (select day from commands where id = %(id)s)
                and command_id = %(id)s and first_seq <= %(after)s + 1), 0)
          and last_seq > %(after)s
        order by first_seq
        limit %(limit)s
    ) o
) page
where bytes_before < %(limit_bytes)s
order by first_seq
"""

# Read backwards. A chunk stands for a byte at least (the very last may stand for none), which
# bounds how many are looked at: of a million small chunks all were, in 1.6 s.
_READ_TAIL = """
select first_seq, last_seq, source, raw_bytes, payload
from (
    select o.*, sum(raw_bytes) over (order by first_seq desc) - raw_bytes as bytes_behind
    from (
        select first_seq, last_seq, source, raw_bytes, payload
        from output
        where day = (select day from commands where id = %(id)s)
          and command_id = %(id)s and source = %(source)s
          and first_seq > (select attempt_seq from commands where id = %(id)s)
        order by first_seq desc
        limit %(tail_bytes)s::bigint + 1
    ) o
) tail
where bytes_behind < %(tail_bytes)s
order by first_seq
"""

# The primary key serves it.
_HEADS = """
select id, last_seq
from commands
where id = any(%s) and (holder is distinct from %s or status <> 'running')
"""

_OLDEST = """
select min(first_seq)
from output
where day = (select day from commands where id = %(id)s) and command_id = %(id)s
"""

_TRIM_FENCE = """
select day, attempt_seq from commands
where id = %s and lease_id = %s and status = 'running'
for update
"""

# The middle begins after the head and has a full tail behind it; gaps of earlier trims lie in it
# and are merged with what goes now. The range is found first: joined row by row, the planner
# computed the windows once for each row (40 s for 1,500 chunks).
_TRIM_DELETE = """
with placed as materialized (
    select first_seq,
           sum(raw_bytes) over (order by first_seq) - raw_bytes as before,
           sum(raw_bytes) over () - sum(raw_bytes) over (order by first_seq) as behind
    from output
    where day = %(day)s and command_id = %(id)s and source = %(source)s
      and first_seq > %(attempt_seq)s
), middle as materialized (
    select min(first_seq) as first, max(first_seq) as last
    from placed
    where before >= %(head_bytes)s and behind >= %(tail_bytes)s
)
delete from output o
using middle m
where o.day = %(day)s and o.command_id = %(id)s and o.source = %(source)s
  and o.first_seq between m.first and m.last
returning o.first_seq, o.last_seq, o.raw_bytes, substr(o.payload, 1, 2) = 'g{'::bytea as is_gap
"""

_TRIM_INSERT = """
insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
values (%s, %s, %s, %s, %s, %s, %s)
"""

_TRIM_COUNT = "update commands set dropped_bytes = dropped_bytes + %s where id = %s"

# One page of a log (the port).
PAGE_CHUNKS = 1_000

# NUL, which no text of PostgreSQL may hold; a backslash pair before it is another's.
_NUL_IN_JSON = re.compile(rb"(\\\\)|\\u0000")

_NAME = {Source.STDOUT: "stdout", Source.STDERR: "stderr"}


class PostgresOutput:
    """The `OutputLog` port."""

    def __init__(self, *, pool: Pool, appends: Pool) -> None:
        """`appends` is a pool of its own (size 1): one appender per process."""
        self._pool = pool
        self._appends = appends

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        """See `OutputLog.append`."""
        try:
            with translate_errors():
                async with self._appends.connection() as connection:
                    return await _append(connection, batch)
        except (DataError, IntegrityError, InternalError, ProgrammingError) as error:
            message = f"the database refused a batch of output: {type(error).__name__}"
            raise RdevError(ErrorCode.INTERNAL_ERROR, message) from error

    async def read(self, command: CommandId, *, after: int, limit_bytes: int) -> list[Chunk]:
        """See `OutputLog.read`."""
        parameters = {
            "id": command_uuid(command),
            "after": after,
            "limit": PAGE_CHUNKS,
            "limit_bytes": max(1, limit_bytes),
        }
        return await self._chunks(command, _READ, parameters)

    async def read_tail(
        self, command: CommandId, source: Source, *, tail_bytes: int
    ) -> list[Chunk]:
        """See `OutputLog.read_tail`."""
        parameters = {"id": command_uuid(command), "source": source, "tail_bytes": tail_bytes}
        return await self._chunks(command, _READ_TAIL, parameters)

    async def trim(self, lease: Lease, source: Source, *, head_bytes: int, tail_bytes: int) -> int:
        """See `OutputLog.trim`. One transaction; the command's row is its fence."""
        command = command_uuid(lease.command)
        with translate_errors():
            async with self._appends.connection() as connection, connection.transaction():
                fence = await (
                    await connection.execute(_TRIM_FENCE, (command, lease.id))
                ).fetchone()
                if fence is None:
                    return 0
                key = {"day": fence[0], "id": command, "source": source}
                bounds = {
                    "attempt_seq": fence[1],
                    "head_bytes": head_bytes,
                    "tail_bytes": tail_bytes,
                }
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(_TRIM_DELETE, key | bounds)
                gone = sorted(await cursor.fetchall(), key=lambda row: row["first_seq"])
                for gap in _islands(gone, _NAME[source]):
                    row = (fence[0], command, gap.first_seq, gap.last_seq, source)
                    await connection.execute(_TRIM_INSERT, (*row, gap.dropped_bytes, gap_line(gap)))
                dropped = sum(row["raw_bytes"] for row in gone if not row["is_gap"])
                await connection.execute(_TRIM_COUNT, (dropped, command))
                return sum(row["raw_bytes"] for row in gone)

    async def heads(
        self, commands: Sequence[CommandId], *, written_by_others_than: str
    ) -> dict[CommandId, int]:
        """See `OutputLog.heads`."""
        values = ([command_uuid(command) for command in commands], written_by_others_than)
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_HEADS, values)
                return {command_id(row[0]): row[1] for row in await cursor.fetchall()}

    async def oldest_seq(self, command: CommandId) -> int | None:
        """See `OutputLog.oldest_seq`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_OLDEST, {"id": command_uuid(command)})
                row = await cursor.fetchone()
                return None if row is None else row[0]

    async def _chunks(
        self, command: CommandId, statement: str, parameters: dict[str, object]
    ) -> list[Chunk]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(binary=True)
                await cursor.execute(statement, parameters)
                return [
                    Chunk(
                        command=command,
                        first_seq=first_seq,
                        last_seq=last_seq,
                        source=Source(source),
                        raw_bytes=raw_bytes,
                        payload=payload,
                    )
                    for first_seq, last_seq, source, raw_bytes, payload in await cursor.fetchall()
                ]


async def _append(connection: TrioConnection, batch: Sequence[Append]) -> list[AppendResult]:
    ends = any(append.outcome is not None for append in batch)
    statement = _APPEND_ENDS if ends else _APPEND
    cursor = await connection.execute(statement, _append_parameters(batch))
    moved = {command_id(row[0]) for row in await cursor.fetchall()}
    left = [append for append in batch if append.lease.command not in moved]
    again: dict[CommandId, DictRow] = {}
    if left:
        look = connection.cursor(row_factory=dict_row)
        await look.execute(_LOOK_AGAIN, ([command_uuid(append.lease.command) for append in left],))
        again = {command_id(row["id"]): row for row in await look.fetchall()}
    return [_result(append, moved, again) for append in batch]


def _result(
    append: Append, moved: Set[CommandId], again: Mapping[CommandId, DictRow]
) -> AppendResult:
    """1. It moved the row. 2. The lease is another's. 3. The log stands at its end: it was applied
    before, and its reply was lost. 4. The log still stands at its start: it is not queued again
    because of a cancel, or the row was locked. 5. Else the command went on without it."""
    command = append.lease.command
    if command in moved:
        return _applied(append)
    row = again.get(command)
    if row is None or row["lease_id"] != append.lease.id:
        return AppendResult(command=command, state=AppendState.STALE)
    stands_at = Offsets(stdout=row["out_offset"], stderr=row["err_offset"])
    end_seq = append.start_seq + sum(chunk.events for chunk in append.chunks)
    if (stands_at, row["last_seq"]) == (append.leaves_at, end_seq):
        return _applied(append)
    running = row["status"] == Status.RUNNING
    if running and (stands_at, row["last_seq"]) == (append.start, append.start_seq):
        refused = append.queues_again and row["cancel_requested"]
        state = AppendState.REFUSED if refused else AppendState.LOCKED
        return AppendResult(command=command, state=state)
    return AppendResult(command=command, state=AppendState.STALE)


def _applied(append: Append) -> AppendResult:
    chunks = []
    base = append.start_seq
    for chunk in append.chunks:
        chunks.append(
            Chunk(
                command=append.lease.command,
                first_seq=base + 1,
                last_seq=base + chunk.events,
                source=chunk.source,
                raw_bytes=chunk.raw_bytes,
                payload=chunk.payload,
            )
        )
        base += chunk.events
    return AppendResult(
        command=append.lease.command, state=AppendState.APPLIED, chunks=tuple(chunks)
    )


def _append_parameters(batch: Sequence[Append]) -> dict[str, list[object]]:
    """The batch as columns; a row with no outcome has nulls there."""
    rows = [_append_row(append) for append in batch]
    columns: dict[str, list[object]] = {name: [row[name] for row in rows] for name in rows[0]}
    placed = [
        (append.lease.command, skip, chunk)
        for append in batch
        for skip, chunk in _with_skips(append.chunks)
    ]
    columns["chunk_id"] = [command_uuid(command) for command, _, _ in placed]
    columns["chunk_skip"] = [skip for _, skip, _ in placed]
    columns["chunk_events"] = [chunk.events for _, _, chunk in placed]
    columns["chunk_source"] = [int(chunk.source) for _, _, chunk in placed]
    columns["chunk_raw_bytes"] = [chunk.raw_bytes for _, _, chunk in placed]
    columns["chunk_payload"] = [chunk.payload for _, _, chunk in placed]
    return columns


def _append_row(append: Append) -> dict[str, object]:
    outcome = append.outcome
    agent = outcome.agent if outcome else None
    return {
        "id": command_uuid(append.lease.command),
        "lease_id": append.lease.id,
        "start_out": append.start.stdout,
        "start_err": append.start.stderr,
        "start_seq": append.start_seq,
        "end_out": append.leaves_at.stdout,
        "end_err": append.leaves_at.stderr,
        "events": sum(chunk.events for chunk in append.chunks),
        "status": outcome.status if outcome else None,
        "exit_code": outcome.exit_code if outcome else None,
        "signal": outcome.signal if outcome else None,
        "reason": outcome.reason if outcome else None,
        "duration_ms": outcome.duration_ms if outcome else None,
        "late_bytes": outcome.late_bytes if outcome else None,
        "kill": _json(outcome.kill) if outcome else None,
        "session_id": _text(agent.session_id) if agent else None,
        "usage": _json(agent.usage) if agent else None,
    }


def _json(value: object) -> str | None:
    """What an agent said may hold NUL, which must not make its command's end unstorable."""
    if value is None:
        return None
    encoded = msgspec.json.encode(value)
    return _NUL_IN_JSON.sub(lambda found: found[1] or rb"\ufffd", encoded).decode()


def _text(value: str | None) -> str | None:
    return None if value is None else value.replace("\0", "\ufffd")


def _with_skips(chunks: Iterable[NewChunk]) -> Iterable[tuple[int, NewChunk]]:
    """Each chunk with the number of events of its append that come before it."""
    skip = 0
    for chunk in chunks:
        yield skip, chunk
        skip += chunk.events


def _islands(gone: Sequence[DictRow], stream: str) -> Iterable[GapEvent]:
    """Runs of neighbouring numbers, each as one gap. `gone` is in order."""
    first: int | None = None
    last, dropped = 0, 0
    for row in gone:
        if first is not None and row["first_seq"] != last + 1:
            yield GapEvent(stream=stream, dropped_bytes=dropped, first_seq=first, last_seq=last)
            first, dropped = None, 0
        first = row["first_seq"] if first is None else first
        last, dropped = row["last_seq"], dropped + row["raw_bytes"]
    if first is not None:
        yield GapEvent(stream=stream, dropped_bytes=dropped, first_seq=first, last_seq=last)
