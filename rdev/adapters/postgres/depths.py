"""Counting the queue in PostgreSQL."""

from psycopg.rows import dict_row

from rdev.adapters.postgres.commands import LEVEL_PRIORITY
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import Priority
from rdev.domain.depths import Depth, Depths, ProjectDepth
from rdev.domain.ids import ProjectId

# `commands_queued` and `commands_running` serve it, so its cost is in what waits and runs (100,000
# queued: 60–100 ms), never in history. One snapshot: nothing is counted on both sides.
_COUNT = """
select project, level, count(*) as queued,
       extract(epoch from now() - min(created_at))::float8 as oldest_wait_s, 0 as running
from commands
where status = 'queued'
group by project, level
union all
select project, null, 0, 0, count(*)
from commands
where status = 'running'
group by project
"""


class PostgresDepths:
    """The `QueueDepths` port."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def count(self) -> Depths:
        """See `QueueDepths.count`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(_COUNT)
                rows = await cursor.fetchall()
        waiting: dict[ProjectId, dict[Priority, Depth]] = {}
        running: dict[ProjectId, int] = {}
        for row in rows:
            of_project = waiting.setdefault(ProjectId(row["project"]), {})
            if row["level"] is None:
                running[ProjectId(row["project"])] = row["running"]
            else:
                of_project[LEVEL_PRIORITY[row["level"]]] = Depth(
                    queued=row["queued"], oldest_wait_s=max(0.0, row["oldest_wait_s"])
                )
        return Depths(
            projects={
                project: ProjectDepth(waiting=found, running=running.get(project, 0))
                for project, found in waiting.items()
            }
        )
