"""Lanes in PostgreSQL: which command is next, and claiming it.

The statements are functions of `sql/0002_lanes.sql` and `sql/0012_record.sql`, because each of
their steps needs a snapshot of its own: what is read under a lane's lock must be newer than the
lock. Their cost does not depend on how much is queued or blocked: `lanes_due` gives the lanes,
`commands_queued` the head of each.
"""

from collections.abc import Collection

from rdev.adapters.postgres.leases import CLAIMED_COLUMNS, to_claimed
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import Outcome, Status
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.lanes import AGE_STEP_S, Lane
from rdev.domain.stream import final_lines, status_line
from rdev.ports.commands import Claims

_TOUCH = "select touch_lanes(%s, %s, %s)"

_CLAIM = f"""
select c.status, {CLAIMED_COLUMNS}
from claim_commands(
    %(reach)s, %(holder)s, %(instance)s, %(lease_s)s, %(age_step_s)s, %(limit)s,
    %(running_event)s, %(expired_events)s, %(touched_projects)s, %(touched_classes)s,
    %(closed_projects)s) c
"""  # noqa: S608  # a constant of ours

_REPAIR = "select repair_lanes(%s, %s)"

# `commands_expiring` serves it.
_EXPIRE = """
with late as (
    select id from commands
    where status = 'queued' and expires_at <= clock_timestamp()
    order by expires_at
    limit %(limit)s
    for update skip locked
)
select id, expire_command(id, %(expired_events)s, %(holder)s) from late
"""

_EXPIRED_EVENTS = final_lines(
    Outcome(status=Status.EXPIRED, reason="expired"),
    attempt=0,
    truncated=False,
    stdout_bytes=0,
    stderr_bytes=0,
)


class PostgresLanes:
    """The `Lanes` port. `lease_s`: how long a claim holds, in seconds."""

    def __init__(self, *, pool: Pool, lease_s: float) -> None:
        self._pool = pool
        self._lease_s = lease_s

    async def touch(self, lanes: Collection[Lane]) -> None:
        """See `Lanes.touch`."""
        projects = [lane.project for lane in lanes]
        lane_classes = [lane.lane_class for lane in lanes]
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute(_TOUCH, (projects, lane_classes, AGE_STEP_S))

    async def claim(
        self,
        *,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        touched: Collection[Lane] = (),
        closed: Collection[ProjectId] = (),
    ) -> Claims:
        """See `Lanes.claim`."""
        parameters = {
            "reach": reach,
            "holder": holder,
            "instance": instance,
            "lease_s": self._lease_s,
            "age_step_s": AGE_STEP_S,
            "limit": limit,
            "running_event": status_line(Status.RUNNING, attempt=0),
            "expired_events": _EXPIRED_EVENTS,
            "touched_projects": [lane.project for lane in touched],
            "touched_classes": [lane.lane_class for lane in touched],
            "closed_projects": list(closed),
        }
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(binary=True)
                await cursor.execute(_CLAIM, parameters)
                rows = await cursor.fetchall()
        return Claims(
            claimed=[to_claimed(*row, take_over=False) for status, *row in rows if _runs(status)],
            expired=[command_id(id) for status, id, *_ in rows if not _runs(status)],
        )

    async def repair(self, *, reach: str) -> int:
        """See `Lanes.repair`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                row = await (await connection.execute(_REPAIR, (reach, AGE_STEP_S))).fetchone()
                return 0 if row is None else row[0]

    async def expire(self, *, holder: str, limit: int) -> list[CommandId]:
        """See `Lanes.expire`."""
        parameters = {"limit": limit, "expired_events": _EXPIRED_EVENTS, "holder": holder}
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_EXPIRE, parameters)
                return [command_id(row[0]) for row in await cursor.fetchall()]


def _runs(status: str) -> bool:
    """A claimed command; the others have expired."""
    return status == Status.RUNNING
