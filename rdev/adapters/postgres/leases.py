"""Leases in PostgreSQL: heartbeat, take-over, release. All times are the database's."""

from collections.abc import Sequence

from psycopg.rows import DictRow, dict_row

from rdev.adapters.postgres.commands import decode_spec
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import Claimed, Kind, Lease, Retry
from rdev.domain.execution import Offsets
from rdev.domain.ids import ProjectId, command_id, command_uuid
from rdev.ports.commands import Beat

# Each command whose lease has run out once, whoever looks: the row's lock decides.
_TAKE_OVER = """
with expired as (
    select id from commands
    where reach = %(reach)s and status = 'running' and lease_until < clock_timestamp()
    order by id
    limit %(limit)s
    for update skip locked
)
update commands c
set lease_id = nextval('lease_ids'),
    lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s),
    holder = %(holder)s
from expired
where c.id = expired.id
returning c.*, extract(epoch from clock_timestamp() - c.started_at)::float8 as running_s
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

# Rows are locked in id order like everywhere: a heartbeat of the same rows may be under way.
_RELEASE = """
with mine as (
    select c.id
    from commands c
    join unnest(%s::uuid[], %s::bigint[]) as held (id, lease_id) using (id, lease_id)
    where c.status = 'running'
    order by c.id
    for update of c
)
update commands c
set lease_until = clock_timestamp() - interval '1 second'
from mine
where c.id = mine.id
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

    async def take_over(self, *, reach: str, holder: str, limit: int) -> list[Claimed]:
        """See `Leases.take_over`."""
        parameters = {"reach": reach, "holder": holder, "limit": limit, "lease_s": self._lease_s}
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(_TAKE_OVER, parameters)
                return [to_claimed(row, take_over=True) for row in await cursor.fetchall()]

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


def to_claimed(row: DictRow, *, take_over: bool) -> Claimed:
    """A row of `commands` under a fresh lease."""
    command = command_id(row["id"])
    return Claimed(
        lease=Lease(command=command, id=row["lease_id"]),
        project=ProjectId(row["project"]),
        kind=Kind(row["kind"]),
        spec=decode_spec(row["spec"]),
        retry=Retry(row["retry"]),
        attempt=row["attempt"],
        running_s=row["running_s"] if take_over else 0.0,
        take_over=take_over,
        instance=row["instance"],
        offsets=Offsets(stdout=row["out_offset"], stderr=row["err_offset"]),
        last_seq=row["last_seq"],
        attempt_seq=row["attempt_seq"],
        dropped_bytes=row["dropped_bytes"],
        queue_wait_ms=int((row["started_at"] - row["created_at"]).total_seconds() * 1000),
        cancel_requested=row["cancel_requested_at"] is not None,
    )
