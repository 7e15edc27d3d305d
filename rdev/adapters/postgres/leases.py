"""Leases in PostgreSQL: heartbeat, take-over, release. All times are the database's."""

from collections.abc import Collection, Sequence
from functools import partial
from uuid import UUID

from psycopg.rows import args_row

from rdev.adapters.postgres.commands import decode_spec
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import Claimed, Kind, Lease, Retry
from rdev.domain.execution import Offsets
from rdev.domain.ids import ProjectId, command_id, command_uuid
from rdev.domain.traces import parse_stored
from rdev.ports.commands import Beat

# What `to_claimed` takes, of a row `c`. Not the whole row: most of its columns are for readers.
CLAIMED_COLUMNS = """
    c.id, c.lease_id, c.project, c.kind, c.spec, c.retry, c.attempt,
    extract(epoch from clock_timestamp() - c.started_at)::float8,
    c.instance, c.out_offset, c.err_offset, c.last_seq, c.attempt_seq, c.dropped_bytes,
    trunc(extract(epoch from c.started_at - c.created_at) * 1000)::bigint,
    c.cancel_requested_at is not null, c.trace
"""

# Each command whose lease has run out once, whoever looks: the row's lock decides.
_TAKE_OVER = f"""
with expired as (
    select id, holder as left_by, lease_id as left_lease from commands
    where reach = %(reach)s and status = 'running' and lease_until < clock_timestamp()
      and project <> all (%(closed)s)
    order by id
    limit %(limit)s
    for update skip locked
), taken as (
    update commands c
    set lease_id = nextval('lease_ids'),
        lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s),
        holder = %(holder)s,
        changed_xid = greatest(pg_current_xact_id(), c.changed_xid)
    from expired
    where c.id = expired.id
    returning c.*, expired.left_by, expired.left_lease
), entry as (
    insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
    select changed_xid, 'server', holder, 'command.taken_over', command_name(id), project,
           jsonb_build_object('kind', kind, 'attempt', attempt, 'from', left_by)
    from taken
)
select {CLAIMED_COLUMNS}, c.left_lease from taken c
"""  # noqa: S608  # a constant of ours

# Waits for rows that an append holds (milliseconds); id order, so two statements cannot deadlock.
# By the primary key whatever the planner thinks of the table: see `_APPEND` in `output.py`.
_HEARTBEAT = """
with mine as (
    select c.id
    from (
        select * from unnest(%(ids)s::uuid[], %(leases)s::bigint[]) h (id, lease_id) order by id
    ) held
    cross join lateral (
        select c.id
        from commands c
        where c.id = held.id and c.lease_id = held.lease_id and c.status || '' = 'running'
        for update
    ) c
)
update commands c
set lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
from mine
where c.id = any(%(ids)s::uuid[]) and c.id = mine.id
returning c.id, c.lease_id, c.cancel_requested_at is not null as cancel_requested
"""

# The same instance may be recorded again: the reply may have been lost.
_RECORD_INSTANCE = """
update commands
set instance = %(instance)s
where id = %(id)s and lease_id = %(lease_id)s and status = 'running'
  and coalesce(instance, %(instance)s) = %(instance)s
"""

# Rows are locked in id order like everywhere: a heartbeat of the same rows may be under way.
_RELEASE = """
with mine as (
    select c.id
    from (
        select * from unnest(%(ids)s::uuid[], %(leases)s::bigint[]) h (id, lease_id) order by id
    ) held
    cross join lateral (
        select c.id
        from commands c
        where c.id = held.id and c.lease_id = held.lease_id and c.status || '' = 'running'
        for update
    ) c
)
update commands c
set lease_until = clock_timestamp() - interval '1 second'
from mine
where c.id = any(%(ids)s::uuid[]) and c.id = mine.id
"""

_RELEASE_HOLDER = """
with mine as (
    select id from commands
    where holder = %s and status = 'running' and lease_until >= clock_timestamp()
    order by id
    for update
)
update commands c
set lease_until = clock_timestamp() - interval '1 second'
from mine
where c.id = mine.id
"""


class PostgresLeases:
    """The `Leases` port. `lease_s`: how long a claim or a heartbeat holds, in seconds."""

    def __init__(self, *, pool: Pool, heartbeats: Pool, lease_s: float) -> None:
        """`heartbeats` is a pool of its own (size 1): a busy pool must not cost a lease."""
        self._pool = pool
        self._heartbeats = heartbeats
        self._lease_s = lease_s

    async def take_over(
        self, *, reach: str, holder: str, limit: int, closed: Collection[ProjectId] = ()
    ) -> list[Claimed]:
        """See `Leases.take_over`."""
        parameters = {
            "reach": reach,
            "holder": holder,
            "limit": limit,
            "lease_s": self._lease_s,
            "closed": list(closed),
        }
        with translate_errors():
            async with self._pool.connection() as connection:
                make = args_row(partial(to_claimed, take_over=True))
                cursor = connection.cursor(binary=True, row_factory=make)
                await cursor.execute(_TAKE_OVER, parameters)
                return await cursor.fetchall()

    async def heartbeat(self, leases: Sequence[Lease]) -> Beat:
        """See `Leases.heartbeat`."""
        parameters = {
            "ids": [command_uuid(lease.command) for lease in leases],
            "leases": [lease.id for lease in leases],
            "lease_s": self._lease_s,
        }
        with translate_errors():
            async with self._heartbeats.connection() as connection:
                cursor = await connection.execute(_HEARTBEAT, parameters)
                rows = await cursor.fetchall()
        alive = {Lease(command=command_id(row[0]), id=row[1]): row[2] for row in rows}
        return Beat(
            stale=frozenset(leases) - alive.keys(),
            cancel_requested=frozenset(lease for lease, asked in alive.items() if asked),
        )

    async def record_instance(self, lease: Lease, instance: str) -> bool:
        """See `Leases.record_instance`."""
        values = {"instance": instance, "id": command_uuid(lease.command), "lease_id": lease.id}
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_RECORD_INSTANCE, values)
                return cursor.rowcount == 1

    async def release(self, leases: Sequence[Lease]) -> None:
        """See `Leases.release`."""
        values = {
            "ids": [command_uuid(lease.command) for lease in leases],
            "leases": [lease.id for lease in leases],
        }
        with translate_errors():
            async with self._heartbeats.connection() as connection:
                await connection.execute(_RELEASE, values)

    async def release_holder(self, holder: str) -> int:
        """See `Leases.release_holder`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_RELEASE_HOLDER, (holder,))
                return cursor.rowcount


def to_claimed(
    uuid: UUID,
    lease_id: int,
    project: str,
    kind: str,
    spec: bytes,
    retry: str,
    attempt: int,
    running_s: float,
    instance: str | None,
    out_offset: int,
    err_offset: int,
    last_seq: int,
    attempt_seq: int,
    dropped_bytes: int,
    queue_wait_ms: int,
    cancel_requested: bool,
    trace: str | None,
    taken_from: int | None = None,
    *,
    take_over: bool,
) -> Claimed:
    """The CLAIMED_COLUMNS of a command under a fresh lease, and of a take-over the former one."""
    return Claimed(
        lease=Lease(command=command_id(uuid), id=lease_id),
        project=ProjectId(project),
        kind=Kind(kind),
        spec=decode_spec(spec),
        retry=Retry(retry),
        attempt=attempt,
        running_s=running_s if take_over else 0.0,
        take_over=take_over,
        instance=instance,
        offsets=Offsets(stdout=out_offset, stderr=err_offset),
        last_seq=last_seq,
        attempt_seq=attempt_seq,
        dropped_bytes=dropped_bytes,
        queue_wait_ms=queue_wait_ms,
        cancel_requested=cancel_requested,
        trace=parse_stored(trace),
        taken_from=taken_from,
    )
