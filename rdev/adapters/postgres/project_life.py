"""What is asked of projects, in PostgreSQL. What the statements promise each other is in
`sql/0017_project_life.sql`."""

from collections.abc import Collection, Mapping
from uuid import UUID

import msgspec
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.adapters.postgres.projects import SELECT_PROJECTS, to_project
from rdev.domain.audit import Action, Actor
from rdev.domain.commands import LANE_CAP, LaneClass, Outcome, Status
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus, Told, Wanted
from rdev.domain.stream import final_lines
from rdev.ports.project_life import Asked, Tried

TROUBLE_CHARACTERS = 200
DELETED = "project_deleted"

_ACTIONS: Mapping[Wanted, Action] = {
    Wanted.RUNNING: Action.PROJECT_STARTED,
    Wanted.STOPPED: Action.PROJECT_STOPPED,
    Wanted.DELETED: Action.PROJECT_DELETED,
}

_WANT = """
select want_project(%(project)s, %(wanted)s, %(force)s, %(status)s, %(action)s,
                    %(key_id)s, %(key_name)s, %(ip)s, %(request_id)s) as asked
"""

_ADOPT = """
with made as (
    insert into projects (id, executor, reach, definition, adopted)
    values (%(id)s, %(executor)s, %(reach)s, %(definition)s, true)
    on conflict (id) do nothing
    returning id, reach
), entry as (
    insert into audit_entries (actor, actor_name, action, target, project, detail)
    select 'server', %(holder)s, 'project.adopted', id, id,
           jsonb_build_object('image', %(image)s::text)
    from made
)
insert into lanes (project, lane_class, reach, cap)
select made.id, cap.key, made.reach, cap.value::integer
from made, jsonb_each_text(%(caps)s) as cap
"""

_MISSING = """
select asked.id
from unnest(%(ids)s::text[]) asked (id)
where not exists (select from projects p where p.id = asked.id)
order by asked.id
"""

# `projects_unsettled` serves it. Who was not tried for what is wanted now has no wait.
_UNSETTLED = (
    SELECT_PROJECTS
    + """
left join unnest(%(tried)s::text[], %(wishes)s::timestamptz[], %(waits)s::float8[])
          as tried (id, wanted_at, wait_s)
    on tried.id = p.id and coalesce(tried.wanted_at, p.wanted_at) = p.wanted_at
where p.reach = %(reach)s and not p.settled and coalesce(tried.wait_s, 0) <= 0
order by tried.wait_s nulls first, p.wanted_at, p.id
limit %(limit)s
"""
)

_SETTLE = "select settle_project(%(id)s, %(uid)s, %(wanted_at)s) as settled"

_DOUBT = """
update projects set settled = false
where id = %(id)s and uid = %(uid)s and wanted_at <> %(wanted_at)s and settled
"""

_IS_STORED = "select exists (select from projects where id = %(id)s and uid = %(uid)s) as found"

_NOTE = """
update projects set trouble = %(trouble)s
where id = %(id)s and uid = %(uid)s and wanted_at = %(wanted_at)s
  and trouble is distinct from %(trouble)s
"""

_END_QUEUED = "select end_queued(%(project)s, %(reason)s, %(events)b, %(holder)s, %(limit)s) as id"
_ASK_RUNNING = "select ask_running_to_end(%(project)s, %(holder)s) as id"
_REMOVE = "select remove_project(%(id)s, %(uid)s, %(holder)s) as removed"

_WITHDRAW = """
with forgotten as (
    delete from idempotency_keys
    where key_id = %(key_id)s and key = %(key)s and made = %(id)s
), entry as (
    insert into audit_entries (actor, actor_name, action, target, project, detail)
    select 'server', %(holder)s, 'project.deleted', id, id, '{"reason": "refused"}'
    from projects
    where id = %(id)s and uid = %(uid)s and wanted <> 'deleted'
)
update projects
set wanted = 'deleted', wanted_at = clock_timestamp(), forced = true, settled = false
where id = %(id)s and uid = %(uid)s and wanted <> 'deleted'
"""

# Without counts: it is asked for often, and for all.
_TOLD = """
select p.id, p.executor, p.reach, p.status, p.definition, p.created_at, p.uid, p.wanted,
       p.wanted_at, p.forced, p.settled, p.adopted, p.trouble,
       extract(epoch from now() - p.wanted_at)::float8 as wanted_s, 0 as queued, 0 as running,
       case when p.told_for = p.wanted_at then p.told end as told
from projects p
where p.reach = %(reach)s and p.wanted = 'running' and p.settled and p.status = 'ready'
order by p.id
"""

# Who comes second finds another status, and changes nothing.
_TELL = """
with told as (
    update projects
    set told = %(status)s, told_for = wanted_at,
        changed_xid = greatest(pg_current_xact_id(), changed_xid)
    where id = %(id)s and uid = %(uid)s and wanted_at = %(wanted_at)s and wanted = 'running'
      and case when told_for = wanted_at then told end is not distinct from %(before)s::text
    returning id, changed_xid
), event as (
    insert into events (xid, type, project, status, detail)
    select changed_xid, 'project.status', id, %(status)s::text, %(detail)s::jsonb from told
)
insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
select changed_xid, 'server', %(holder)s, 'project.status', id, id,
       jsonb_build_object('status', %(status)s::text) || %(detail)s::jsonb
from told
"""

# For the attempt 0; the statement says which it is.
_DELETED_EVENTS = final_lines(
    Outcome(status=Status.CANCELLED, reason=DELETED),
    attempt=0,
    truncated=False,
    stdout_bytes=0,
    stderr_bytes=0,
)


class PostgresProjectLife:
    """The ports `ProjectLife` and `ProjectTold`."""

    def __init__(self, *, pool: Pool, holder: str) -> None:
        """`holder` names this server, in the audit log too."""
        self._pool = pool
        self._holder = holder

    async def want(
        self, project: ProjectId, wanted: Wanted, actor: Actor, *, force: bool, status: str
    ) -> Asked:
        """See `ProjectLife.want`."""
        values = {
            "project": project,
            "wanted": wanted,
            "force": force,
            "status": status,
            "action": _ACTIONS[wanted],
            "key_id": actor.key_id,
            "key_name": actor.key_name,
            "ip": actor.ip,
            "request_id": actor.request_id,
        }
        (row,) = await self._rows(_WANT, values)
        return Asked(row["asked"])

    async def adopt(self, project: ProjectId, *, executor: str, reach: str, image: str) -> bool:
        """See `ProjectLife.adopt`."""
        definition = ProjectDefinition(id=project)
        values = {
            "id": project,
            "executor": executor,
            "reach": reach,
            "definition": Jsonb(msgspec.to_builtins(definition)),
            "image": image,
            "holder": self._holder,
            "caps": Jsonb({lane: LANE_CAP[lane] for lane in LaneClass}),
        }
        return await self._change(_ADOPT, values) > 0

    async def missing(self, projects: Collection[ProjectId]) -> list[ProjectId]:
        """See `ProjectLife.missing`."""
        return [ProjectId(row["id"]) for row in await self._rows(_MISSING, {"ids": list(projects)})]

    async def unsettled(self, *, reach: str, tried: Collection[Tried], limit: int) -> list[Project]:
        """See `ProjectLife.unsettled`."""
        values = {
            "reach": reach,
            "tried": [one.project for one in tried],
            "wishes": [one.wanted_at for one in tried],
            "waits": [one.wait_s for one in tried],
            "limit": limit,
        }
        rows = await self._rows(_UNSETTLED, values)
        return [to_project(row) for row in rows]

    async def settle(self, project: Project) -> bool:
        """See `ProjectLife.settle`."""
        (row,) = await self._rows(_SETTLE, _key(project))
        return bool(row["settled"])

    async def doubt(self, project: Project) -> None:
        """See `ProjectLife.doubt`."""
        await self._change(_DOUBT, _key(project))

    async def is_stored(self, project: Project) -> bool:
        """See `ProjectLife.is_stored`."""
        (row,) = await self._rows(_IS_STORED, _key(project))
        return bool(row["found"])

    async def note(self, project: Project, trouble: str) -> None:
        """See `ProjectLife.note`."""
        values = {**_key(project), "trouble": trouble[:TROUBLE_CHARACTERS]}
        await self._change(_NOTE, values)

    async def end_queued(self, project: ProjectId, *, limit: int) -> list[CommandId]:
        """See `ProjectLife.end_queued`."""
        values = {
            "project": project,
            "reason": DELETED,
            "events": _DELETED_EVENTS,
            "holder": self._holder,
            "limit": limit,
        }
        return [command_id(row["id"]) for row in await self._rows(_END_QUEUED, values)]

    async def ask_running_to_end(self, project: ProjectId) -> list[CommandId]:
        """See `ProjectLife.ask_running_to_end`."""
        rows = await self._rows(_ASK_RUNNING, {"project": project, "holder": self._holder})
        return [command_id(row["id"]) for row in rows]

    async def remove(self, project: Project) -> bool:
        """See `ProjectLife.remove`."""
        (row,) = await self._rows(_REMOVE, {**_key(project), "holder": self._holder})
        return bool(row["removed"])

    async def withdraw(self, project: Project, idempotency: Idempotency | None) -> None:
        """See `ProjectLife.withdraw`."""
        values = {
            **_key(project),
            "holder": self._holder,
            "key_id": idempotency and idempotency.key_id,
            "key": idempotency and idempotency.key,
        }
        await self._change(_WITHDRAW, values)

    async def told(self, *, reach: str) -> list[Told]:
        """See `ProjectTold.told`."""
        rows = await self._rows(_TOLD, {"reach": reach})
        return [
            Told(project=to_project(row), status=row["told"] and ProjectStatus(row["told"]))
            for row in rows
        ]

    async def tell(self, told: Told, *, status: ProjectStatus, reason: str | None) -> bool:
        """See `ProjectTold.tell`."""
        values = {
            **_key(told.project),
            "before": told.status,
            "status": status,
            "detail": Jsonb({} if reason is None else {"reason": reason}),
            "holder": self._holder,
        }
        return await self._change(_TELL, values) > 0

    async def _rows(self, statement: str, values: Mapping[str, object]) -> list[DictRow]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, values)
                return await cursor.fetchall()

    async def _change(self, statement: str, values: Mapping[str, object]) -> int:
        with translate_errors():
            async with self._pool.connection() as connection:
                return (await connection.execute(statement, values)).rowcount


def _key(project: Project) -> dict[str, object]:
    return {"id": project.id, "uid": UUID(project.uid), "wanted_at": project.wanted_at}
