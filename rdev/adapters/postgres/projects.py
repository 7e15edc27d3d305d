"""Projects in PostgreSQL."""

from collections.abc import Collection

import msgspec
from psycopg import Rollback
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.entries import ENTRY, entry_parameters
from rdev.adapters.postgres.idempotency import find_made, keep, translate_key_in_use
from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import Action, Actor
from rdev.domain.commands import LANE_CAP, LaneClass
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus, Wanted
from rdev.ports.projects import ProjectMade

# Two racing requests with the same id: one inserts, the other finds its row.
_INSERT = f"""
with made as (
    insert into projects (id, executor, reach, definition, settled)
    values (%(id)s, %(executor)s, %(reach)s, %(definition)s, %(settled)s)
    on conflict (id) do nothing
    returning id, reach
), entry as ({ENTRY} from made
)
insert into lanes (project, lane_class, reach, cap)
select made.id, cap.key, made.reach, cap.value::integer
from made, jsonb_each_text(%(caps)s) as cap
"""  # noqa: S608  (put together from constants)

# The counts are taken over the partial indexes of queued and running commands.
SELECT_PROJECTS = """
select p.id, p.executor, p.reach, p.status, p.definition, p.created_at, p.uid, p.wanted,
       p.wanted_at, p.forced, p.settled, p.adopted, p.trouble,
       extract(epoch from now() - p.wanted_at)::float8 as wanted_s,
       (select count(*) from commands c where c.project = p.id and c.status = 'queued') as queued,
       (select count(*) from commands c where c.project = p.id and c.status = 'running') as running
from projects p
"""
GET = SELECT_PROJECTS + "where p.id = %s"
_LIST = (
    SELECT_PROJECTS
    + """
where (%(after)s::text is null or p.id > %(after)s)
  and (%(within)s::text[] is null or p.id = any(%(within)s))
order by p.id
limit %(limit)s
"""
)


class PostgresProjects:
    """The `ProjectStore` port."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def insert(
        self,
        definition: ProjectDefinition,
        actor: Actor,
        *,
        executor: str,
        reach: str,
        is_settled: bool = True,
        idempotency: Idempotency | None = None,
    ) -> ProjectMade:
        """See `ProjectStore.insert`."""
        values = _insert_parameters(definition, actor, executor=executor, reach=reach)
        values["settled"] = is_settled
        # Closed while there is nothing to run in; see 0006 and 0017.
        caps = {lane: LANE_CAP[lane] * (1 if is_settled else -1) for lane in LaneClass}
        values["caps"] = Jsonb(caps)
        with translate_key_in_use():
            is_new = await self._insert(values, idempotency, made=definition.id)
        # A key that was kept meanwhile stands for what its request made.
        earlier = None if is_new or idempotency is None else await self.replay(idempotency)
        if earlier is not None:
            return earlier
        project = await self.get(definition.id)
        if project is None or project.wanted is Wanted.DELETED:
            raise RdevError(
                ErrorCode.CONFLICT, f"project {definition.id!r} is being deleted", retry_after_s=2
            )
        if project.definition != definition:
            message = f"project {definition.id!r} exists with another definition"
            raise RdevError(ErrorCode.CONFLICT, message)
        return ProjectMade(project=project, is_new=is_new)

    async def _insert(
        self, values: dict[str, object], idempotency: Idempotency | None, *, made: str
    ) -> bool:
        """Whether it was made now. The key is kept where it was, and only there."""
        is_new = False
        with translate_errors():
            async with self._pool.connection() as connection, connection.transaction() as whole:
                if await keep(connection, idempotency, made=made):
                    is_new = (await connection.execute(_INSERT, values)).rowcount > 0
                if not is_new:
                    raise Rollback(whole)
        return is_new

    async def replay(self, idempotency: Idempotency) -> ProjectMade | None:
        """See `ProjectStore.replay`."""
        made = await find_made(self._pool, idempotency)
        if made is None:
            return None
        project = await self.get(ProjectId(made))
        if project is None:
            message = f"project {made!r}, which this request made, is no longer stored"
            raise RdevError(ErrorCode.GONE, message)
        return ProjectMade(project=project, is_new=False, is_replay=True)

    async def get(self, project: ProjectId) -> Project | None:
        """See `ProjectStore.get`."""
        rows = await self._select(GET, (project,))
        return rows[0] if rows else None

    async def list_all(
        self, *, within: Collection[ProjectId] | None, after: ProjectId | None, limit: int
    ) -> list[Project]:
        """See `ProjectStore.list_all`."""
        ids = None if within is None else sorted(within)
        return await self._select(_LIST, {"within": ids, "after": after, "limit": limit})

    async def _select(self, statement: str, parameters: Parameters) -> list[Project]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return [to_project(row) for row in await cursor.fetchall()]


def _insert_parameters(
    definition: ProjectDefinition, actor: Actor, *, executor: str, reach: str
) -> dict[str, object]:
    values = {
        "id": definition.id,
        "executor": executor,
        "reach": reach,
        "definition": Jsonb(msgspec.to_builtins(definition)),
    }
    return values | entry_parameters(
        actor,
        Action.PROJECT_CREATED,
        definition.id,
        project=definition.id,
        detail={"executor": executor, "image": definition.image},
    )


def to_project(row: DictRow) -> Project:
    """A row of `SELECT_PROJECTS` as the domain's value."""
    definition = msgspec.convert(row["definition"], ProjectDefinition)
    return Project(
        id=ProjectId(row["id"]),
        name=row["id"],
        status=ProjectStatus(row["status"]),
        executor=row["executor"],
        reach=row["reach"],
        image=definition.image,
        created_at=row["created_at"],
        definition=definition,
        queued=row["queued"],
        running=row["running"],
        uid=str(row["uid"]),
        wanted=Wanted(row["wanted"]),
        wanted_at=row["wanted_at"],
        wanted_s=row["wanted_s"],
        is_forced=row["forced"],
        is_settled=row["settled"],
        is_adopted=row["adopted"],
        trouble=row["trouble"],
    )
