"""The queue's side of the commands: claim, heartbeat, release.

A simple queue: claims are made one after another under an advisory lock, which makes the caps of
the lanes exact. All times are the database's.
"""

from collections.abc import Sequence

from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.commands import decode_spec
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import LANE_CAP, Claimed, Kind, LaneClass, Lease, Outcome, Status
from rdev.domain.execution import Offsets
from rdev.domain.ids import CommandId, ProjectId, command_id, command_uuid
from rdev.domain.stream import final_lines, status_line
from rdev.ports.commands import Beat

_SERIALISE_CLAIMS = "select pg_advisory_xact_lock(hashtext('rdev.claim'))"

# Take-overs first, then queued commands by level and age, as far as their lane has room. Whoever
# holds the lock sees all earlier claims; a cancel that came in between fails the last condition.
_CLAIM = """
with expired as (
    select id, true as take_over
    from commands
    where reach = %(reach)s and status = 'running' and lease_until < clock_timestamp()
    order by id
    limit %(limit)s
    for update skip locked
), busy as (
    select project, lane_class, count(*) as running
    from commands
    where reach = %(reach)s and status = 'running'
    group by project, lane_class
), placed as (
    select q.id, q.level, q.created_at, q.lane_class,
           coalesce(b.running, 0) + row_number() over (
               partition by q.project, q.lane_class order by q.level, q.created_at, q.id) as place
    from commands q
    left join busy b using (project, lane_class)
    where q.reach = %(reach)s and q.status = 'queued'
      and (q.expires_at is null or q.expires_at > clock_timestamp())
), fresh as (
    select id, false as take_over
    from placed
    where place <= (%(caps)s ->> lane_class)::integer
    order by level, created_at, id
    limit %(limit)s - (select count(*) from expired)
), taken as (
    update commands c
    set status = 'running',
        attempt = attempt + (not t.take_over)::integer,
        last_seq = last_seq + (not t.take_over)::integer,
        started_at = coalesce(started_at, clock_timestamp()),
        instance = coalesce(instance, %(instance)s),
        lease_id = nextval('lease_ids'),
        lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s),
        holder = %(holder)s
    from (select * from expired union all select * from fresh) t
    where c.id = t.id and c.status = case when t.take_over then 'running' else 'queued' end
    returning c.*, t.take_over
), event as (
    insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
    select day, id, last_seq, last_seq, 0, 0, %(running_event)s
    from taken
    where not take_over
)
select * from taken order by level, created_at, id
"""

# Waits for rows that an append holds (milliseconds); id order, so two statements cannot deadlock.
_HEARTBEAT = """
with mine as (
    select c.id
    from commands c
    join unnest(%(ids)s::uuid[], %(leases)s::bigint[]) as held (id, lease_id) using (id, lease_id)
    where c.status = 'running'
    order by c.id
    for update of c
)
update commands c
set lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
from mine
where c.id = mine.id
returning c.id, c.lease_id, c.cancel_requested_at is not null as cancel_requested
"""

# The same instance may be recorded again: the reply may have been lost.
_RECORD_INSTANCE = """
update commands
set instance = %(instance)s
where id = %(id)s and lease_id = %(lease_id)s and status = 'running'
  and coalesce(instance, %(instance)s) = %(instance)s
"""

_RELEASE = """
update commands c
set lease_until = clock_timestamp() - interval '1 second'
from unnest(%s::uuid[], %s::bigint[]) as held (id, lease_id)
where c.id = held.id and c.lease_id = held.lease_id and c.status = 'running'
"""

_RELEASE_HOLDER = """
update commands set lease_until = clock_timestamp() - interval '1 second'
where holder = %s and status = 'running' and lease_until >= clock_timestamp()
"""

_EXPIRE = """
with due as (
    select id from commands
    where reach = %(reach)s and status = 'queued' and expires_at <= clock_timestamp()
    order by id
    limit %(limit)s
    for update skip locked
), ended as (
    update commands c
    set status = 'expired', reason = 'expired', finished_at = clock_timestamp(), spec = null,
        last_seq = last_seq + 2
    from due
    where c.id = due.id
    returning c.day, c.id, c.last_seq
), event as (
    insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
    select day, id, last_seq - 1, last_seq, 0, 0, %(payload)s from ended
)
select id from ended
"""


class PostgresLeases:
    """The `Leases` port. `lease_s`: how long a claim or a heartbeat holds, in seconds."""

    def __init__(self, *, pool: Pool, heartbeats: Pool, lease_s: float) -> None:
        """`heartbeats` is a pool of its own (size 1): a busy pool must not cost a lease."""
        self._pool = pool
        self._heartbeats = heartbeats
        self._lease_s = lease_s

    async def claim(
        self, *, reach: str, instance: str | None, holder: str, limit: int
    ) -> list[Claimed]:
        """See `Leases.claim`."""
        parameters = {
            "reach": reach,
            "limit": limit,
            "holder": holder,
            "lease_s": self._lease_s,
            "caps": Jsonb({lane: LANE_CAP[lane] for lane in LaneClass}),
            "instance": instance,
            "running_event": status_line(Status.RUNNING, attempt=1),
        }
        with translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                await connection.execute(_SERIALISE_CLAIMS)
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(_CLAIM, parameters)
                return [_to_claimed(row) for row in await cursor.fetchall()]

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
        values = ([command_uuid(lease.command) for lease in leases], [lease.id for lease in leases])
        with translate_errors():
            async with self._heartbeats.connection() as connection:
                await connection.execute(_RELEASE, values)

    async def release_holder(self, holder: str) -> int:
        """See `Leases.release_holder`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_RELEASE_HOLDER, (holder,))
                return cursor.rowcount

    async def expire(self, *, reach: str, limit: int) -> list[CommandId]:
        """See `Leases.expire`."""
        outcome = Outcome(status=Status.EXPIRED, reason="expired")
        payload = final_lines(outcome, attempt=0, truncated=False, stdout_bytes=0, stderr_bytes=0)
        parameters = {"reach": reach, "limit": limit, "payload": payload}
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_EXPIRE, parameters)
                return [command_id(row[0]) for row in await cursor.fetchall()]


def _to_claimed(row: DictRow) -> Claimed:
    command = command_id(row["id"])
    return Claimed(
        lease=Lease(command=command, id=row["lease_id"]),
        project=ProjectId(row["project"]),
        kind=Kind(row["kind"]),
        spec=decode_spec(row["spec"]),
        attempt=row["attempt"],
        take_over=row["take_over"],
        instance=row["instance"],
        offsets=Offsets(stdout=row["out_offset"], stderr=row["err_offset"]),
        last_seq=row["last_seq"],
        dropped_bytes=row["dropped_bytes"],
        queue_wait_ms=int((row["started_at"] - row["created_at"]).total_seconds() * 1000),
        cancel_requested=row["cancel_requested_at"] is not None,
    )
