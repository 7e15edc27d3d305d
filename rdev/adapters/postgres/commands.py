"""Commands in PostgreSQL: accepting, reading, cancelling.

Each operation is one statement, so it commits or does not as a whole, and with it what
`sql/0012_record.sql` calls its record: the event and the audit entry of the change.
"""

import msgspec
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.idempotency import (
    find_made,
    key_parameters,
    translate_key_in_use,
)
from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import DETAIL_BYTES, Actor, shortened
from rdev.domain.commands import (
    LANE_CLASS,
    Command,
    Kind,
    NewCommand,
    Outcome,
    Priority,
    Status,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import KillReport, Spec
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId, command_id, command_uuid
from rdev.domain.lanes import AGE_STEP_S
from rdev.domain.pages import PAGE_BYTES, Page
from rdev.domain.stream import final_lines
from rdev.ports.commands import POSITION_MAX, Accepted, CancelResult

# What `to_command` takes, by name. Never `*`: a column that comes while this server serves would
# fail what it has prepared ("cached plan must not change result type"), until it connects again.
_COLUMNS = """
    id, project, kind, status, level, attempt, exit_code, signal, reason, created_at, started_at,
    finished_at, duration_ms, out_offset, err_offset, dropped_bytes, argv, key_id, session_id,
    usage, kill, last_seq, attempt_seq
"""

# What a command's other members take in an answer, about.
_ROW_BYTES = 1_000

# The row comes from the project's, so a command of an unknown project, or of one that is being
# deleted, is never stored.
#
# `kept` has a row where the idempotency key is the request's own: it is new, or what it stood for
# is too old. Of two that race, the second waits at the primary key for the end of the first, at
# most as long as `bounded` says for this transaction; then it finds the key and makes nothing.
#
# The position counts over `commands_queued`, and only so far: with 10,000 queued the whole count
# took 8 ms, this takes less than 1. Two racing inserts may tell the same one: it is a hint.
_INSERT = f"""
with bounded as materialized (
    select set_config('lock_timeout', %(idempotency_wait)s, true)
    where %(idempotency_key)s::text is not null
), kept as (
    insert into idempotency_keys as k (key_id, key, digest, made)
    select %(idempotency_key_id)s, %(idempotency_key)s, %(idempotency_digest)s,
           %(idempotency_made)s
    from bounded, projects p
    where p.id = %(project)s and p.wanted <> 'deleted'
    on conflict (key_id, key) do update
    set digest = excluded.digest, made = excluded.made, made_at = now()
    where k.made_at <= now() - make_interval(secs => %(idempotency_s)s)
    returning made
), made as (
    insert into commands (id, project, kind, lane_class, status, level, reach, retry, key_id,
                          request_id, argv, spec, expires_at, rank, last_seq, trace)
    select %(id)s, p.id, %(kind)s, %(lane_class)s, 'queued', %(level)s, p.reach, %(retry)s,
           %(key_id)s, %(request_id)s, %(argv)s, %(spec)s,
           now() + make_interval(secs => %(expires_in_s)s),
           extract(epoch from clock_timestamp()) - %(level)s * %(age_step_s)s, 1, %(trace)s
    from projects p
    where p.id = %(project)s and p.wanted <> 'deleted'
      and (%(idempotency_key)s::text is null or exists (select from kept))
    returning *
), placed as (
    select m.*, least(%(position_max)s, a.ahead + 1) as queue_position
    from made m
    cross join lateral (
        select count(*) as ahead
        from (
            select from commands c
            where c.status = 'queued' and c.project = m.project and c.lane_class = m.lane_class
              and (c.rank, c.id) < (m.rank, m.id)
            order by c.project, c.lane_class, c.rank, c.id
            limit %(position_max)s
        ) counted
    ) a
), event as (
    insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
    select day, id, 1, 1, 0, 0, convert_to(format(
        's{{"status":"queued","attempt":0,"queue_position":%%s}}', queue_position), 'UTF8')
    from placed
), change as (
    insert into events (xid, type, project, command_id, kind, status, attempt, seq)
    select changed_xid, event_type(status), project, id, kind, status, attempt, last_seq
    from made
), entry as (
    insert into audit_entries (xid, actor, actor_name, ip, request_id, action, target, project,
                               detail)
    select changed_xid, %(key_id)s, %(key_name)s, %(ip)s, %(request_id)s, 'command.submitted',
           command_name(id), project, %(detail)s
    from made
)
select {_COLUMNS}, queue_position from placed
"""  # noqa: S608  # a constant of ours

_GET = f"select {_COLUMNS} from commands where id = %s"  # noqa: S608

# `commands_of_project` serves each step; ids sort by creation. One row at a time, so that what is
# not given is not even unpacked: an argv may have a megabyte. The row behind the last is found too:
# that there is one is told by those that are given.
_LIST = f"""
with recursive walked (number, id, bytes_before, bytes) as (
    select 0, coalesce(%(before)s::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'), 0::bigint,
           0::bigint
    union all
    select w.number + 1, next.id, w.bytes,
           w.bytes + {_ROW_BYTES} + octet_length(next.argv::text)
                   + coalesce(octet_length(next.usage::text), 0)
    from walked w
    cross join lateral (
        select id, argv, usage from commands
        where project = %(project)s and id < w.id
          and (%(status)s::text is null or status = %(status)s)
          and (%(kind)s::text is null or kind = %(kind)s)
        order by id desc
        limit 1
    ) next
    where w.number <= %(limit)s and w.bytes_before < %(page_bytes)s
), given as (
    select id from walked
    where number between 1 and %(limit)s and bytes_before < %(page_bytes)s
)
select {_COLUMNS}, (select count(*) from walked) - 1 > (select count(*) from given) as has_more
from commands
where id in (select id from given)
order by id desc
"""  # noqa: S608

_POSITION = """
select count(*) as queue_position
from (
    select from commands c, commands me
    where me.id = %(id)s and me.status = 'queued'
      and c.status = 'queued' and c.project = me.project and c.lane_class = me.lane_class
      and (c.rank, c.id) <= (me.rank, me.id)
    limit %(position_max)s
) counted
"""

# Two racing cancels, or a cancel and a claim: the row's lock decides, the loser's condition no
# longer holds. A claim that came first makes this a request on a running command.
_CANCEL = """
with ended as (
    update commands
    set status = 'cancelled', reason = 'cancelled', finished_at = now(), spec = null,
        last_seq = last_seq + 2, cancel_requested_at = now(),
        changed_xid = greatest(pg_current_xact_id(), changed_xid)
    where id = %(id)s and status = 'queued'
    returning day, id, project, kind, status, attempt, reason, last_seq, changed_xid
), event as (
    insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
    select day, id, last_seq - 1, last_seq, 0, 0, of_attempt(%(payload)b, attempt) from ended
), change as (
    insert into events (xid, type, project, command_id, kind, status, attempt, seq, detail)
    select changed_xid, event_type(status), project, id, kind, status, attempt, last_seq,
           ended_unstarted(reason)
    from ended
), entry as (
    insert into audit_entries (xid, actor, actor_name, ip, request_id, action, target, project,
                               detail)
    select changed_xid, %(key_id)s, %(key_name)s, %(ip)s, %(request_id)s, 'command.cancelled',
           command_name(id), project,
           jsonb_build_object('kind', kind, 'status', status, 'attempt', attempt)
    from ended
)
select id from ended
"""

# Asked again it changes nothing, and there is nothing to record. The lock makes sure that of two at
# once one is the first.
_REQUEST_CANCEL = """
with running as (
    select id, cancel_requested_at is null as is_first
    from commands
    where id = %(id)s and status = 'running'
    for update
), asked as (
    update commands c
    set cancel_requested_at = now(),
        changed_xid = greatest(pg_current_xact_id(), c.changed_xid)
    from running r
    where c.id = %(id)s and r.is_first
    returning c.id, c.project, c.kind, c.attempt, c.changed_xid
), entry as (
    insert into audit_entries (xid, actor, actor_name, ip, request_id, action, target, project,
                               detail)
    select changed_xid, %(key_id)s, %(key_name)s, %(ip)s, %(request_id)s,
           'command.cancel_requested', command_name(id), project,
           jsonb_build_object('kind', kind, 'attempt', attempt)
    from asked
)
select id from running
"""

_spec_decoder = msgspec.msgpack.Decoder(Spec)

# For the attempt 0; the statement says which it is.
_CANCELLED_EVENTS = final_lines(
    Outcome(status=Status.CANCELLED, reason="cancelled"),
    attempt=0,
    truncated=False,
    stdout_bytes=0,
    stderr_bytes=0,
)

# The stored form of a priority.
LEVEL_PRIORITY = {priority.level: priority for priority in Priority}


class PostgresCommands:
    """The `CommandStore` port. Source of contract: `rdev/ports/commands.py`."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def insert(self, new: NewCommand) -> Accepted:
        """See `CommandStore.insert`."""
        with translate_key_in_use():
            row = await self._one(_INSERT, _insert_parameters(new))
        if row is not None:
            return Accepted(command=to_command(row), queue_position=row["queue_position"])
        earlier = None if new.idempotency is None else await self.replay(new.idempotency)
        if earlier is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no project {new.project!r}")
        return earlier

    async def replay(self, idempotency: Idempotency) -> Accepted | None:
        """See `CommandStore.replay`."""
        made = await find_made(self._pool, idempotency)
        if made is None:
            return None
        command = await self.get(CommandId(made))
        if command is None:
            message = f"command {made!r}, which this request made, is no longer stored"
            raise RdevError(ErrorCode.GONE, message)
        position = await self.queue_position(command.id)
        return Accepted(command=command, queue_position=position, is_replay=True)

    async def get(self, command: CommandId) -> Command | None:
        """See `CommandStore.get`."""
        row = await self._one(_GET, (command_uuid(command),))
        return None if row is None else to_command(row)

    async def list_for_project(
        self,
        project: ProjectId,
        *,
        status: Status | None,
        kind: Kind | None,
        before: CommandId | None,
        limit: int,
    ) -> Page[Command]:
        """See `CommandStore.list_for_project`."""
        parameters = {
            "project": project,
            "status": status,
            "kind": kind,
            "before": None if before is None else command_uuid(before),
            "limit": limit,
            "page_bytes": PAGE_BYTES,
        }
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(_LIST, parameters)
                rows = await cursor.fetchall()
        has_more = any(row["has_more"] for row in rows)
        return Page(items=[to_command(row) for row in rows], has_more=has_more)

    async def queue_position(self, command: CommandId) -> int | None:
        """See `CommandStore.queue_position`."""
        values = {"id": command_uuid(command), "position_max": POSITION_MAX}
        row = await self._one(_POSITION, values)
        return row["queue_position"] or None if row is not None else None

    async def request_cancel(self, command: CommandId, actor: Actor) -> CancelResult | None:
        """See `CommandStore.request_cancel`. Between the two statements a running command may be
        queued again: then it is asked again, as often as that may happen."""
        values = {
            "id": command_uuid(command),
            "payload": _CANCELLED_EVENTS,
            **_actor_parameters(actor),
        }
        while True:
            ended = await self._one(_CANCEL, values) is not None
            asked = not ended and await self._one(_REQUEST_CANCEL, values) is not None
            found = await self.get(command)
            if found is None:
                return None
            if ended or asked or found.status.is_terminal:
                return CancelResult(command=found, ended_now=ended)

    async def _one(self, statement: str, parameters: Parameters) -> DictRow | None:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return await cursor.fetchone()


def _insert_parameters(new: NewCommand) -> dict[str, object]:
    return {
        "id": command_uuid(new.id),
        "project": new.project,
        "kind": new.kind,
        "lane_class": LANE_CLASS[new.kind],
        "level": new.priority.level,
        "age_step_s": AGE_STEP_S,
        "retry": new.retry,
        "argv": Jsonb(list(new.argv)),
        "detail": Jsonb(
            {"kind": new.kind, "priority": new.priority, "argv": shortened(new.argv, DETAIL_BYTES)}
        ),
        **_actor_parameters(new.actor),
        "spec": encode_spec(new.spec),
        "trace": None if new.trace is None else new.trace.stored,
        "expires_in_s": new.expires_in_s,
        "position_max": POSITION_MAX,
        **key_parameters(new.idempotency, made=new.id),
    }


def _actor_parameters(actor: Actor) -> dict[str, str]:
    return {
        "key_id": actor.key_id,
        "key_name": actor.key_name,
        "ip": actor.ip,
        "request_id": actor.request_id,
    }


def encode_spec(spec: Spec) -> bytes:
    """The stored form of a spec; it leaves the database when the command ends."""
    return msgspec.msgpack.encode(spec)


def decode_spec(stored: bytes) -> Spec:
    """The inverse of `encode_spec`."""
    return _spec_decoder.decode(stored)


def to_command(row: DictRow) -> Command:
    """A row of `commands` as the domain's value."""
    wait = None if row["started_at"] is None else row["started_at"] - row["created_at"]
    return Command(
        id=command_id(row["id"]),
        project=ProjectId(row["project"]),
        kind=Kind(row["kind"]),
        status=Status(row["status"]),
        priority=LEVEL_PRIORITY[row["level"]],
        attempt=row["attempt"],
        exit_code=row["exit_code"],
        signal=row["signal"],
        reason=row["reason"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        duration_ms=row["duration_ms"],
        queue_wait_ms=None if wait is None else int(wait.total_seconds() * 1000),
        stdout_bytes=row["out_offset"],
        stderr_bytes=row["err_offset"],
        dropped_bytes=row["dropped_bytes"],
        truncated=row["dropped_bytes"] > 0,
        argv=tuple(row["argv"]),
        key_id=row["key_id"],
        session_id=row["session_id"],
        usage=row["usage"],
        kill=None if row["kill"] is None else msgspec.convert(row["kill"], KillReport),
        last_seq=row["last_seq"],
        attempt_seq=row["attempt_seq"],
    )
