"""rdev's tables, filled as submissions would fill them, by copying one that was submitted."""

from dataclasses import dataclass
from uuid import UUID

import psycopg
import trio

from bench.peers.rig import KIND, REACH, NoopExecutor, open_rig
from rdev.adapters.postgres.migrate import up
from rdev.domain.commands import LANE_CAP, LANE_CLASS
from rdev.domain.ids import ProjectId, command_uuid

BUSY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`projects` with `each` commands, behind BUSY projects with `backlog` commands between them
    (0: no busy projects), whose first command never ends."""

    name: str
    projects: int
    each: int
    backlog: int = 0


def busy(number: int) -> ProjectId:
    """The name of a busy project."""
    return ProjectId(f"busy-{number}")


def project(number: int) -> ProjectId:
    """The name of a project."""
    return ProjectId(f"project-{number}")


def takes_s(name: ProjectId) -> float:
    """How long a command of the project runs."""
    return float("inf") if name.startswith("busy-") else 0.0


_PROJECTS = """
insert into projects (id, executor, reach, definition)
select name, 'local', %(reach)s, '{}' from unnest(%(names)s::text[]) name
"""
_LANES = """
insert into lanes (project, lane_class, reach, cap)
select name, %(lane_class)s, %(reach)s, %(cap)s from unnest(%(names)s::text[]) name
"""
# Time-ordered ids (UUIDv7), one microsecond of waiting between a command and the next.
_COMMANDS = """
insert into commands
select (jsonb_populate_record(model, jsonb_build_object(
    'id', (lpad(to_hex((extract(epoch from now()) * 1000 + n)::bigint), 12, '0') || '7'
           || substr(md5(n::text), 1, 3) || '8' || substr(md5(%(prefix)s || n), 1, 15))::uuid,
    'project', %(prefix)s || (n %% %(projects)s),
    'rank', model.rank + n * 1e-6 + %(later_s)s
))).*
from commands model, generate_series(1, %(count)s) n
where model.id = %(model)s
"""
_EVENTS = """
insert into output
select (jsonb_populate_record(o, jsonb_build_object('command_id', c.id))).*
from commands c, output o
where o.command_id = %(model)s and c.id <> %(model)s
"""


async def fill(dsn: str, work: Work) -> None:
    """Migrate an empty database and queue the work."""
    await trio.to_thread.run_sync(up, dsn)
    model = await _submit_model(dsn)
    await trio.to_thread.run_sync(_copy, dsn, work, model)


async def _submit_model(dsn: str) -> UUID:
    """Submit one command and leave it queued: nobody may run anything."""
    await trio.to_thread.run_sync(make_projects, dsn, [project(0)])
    async with open_rig(dsn, NoopExecutor(reach="nowhere")) as rig:
        return command_uuid(await rig.submit(project(0)))


def make_projects(dsn: str, names: list[ProjectId]) -> None:
    """Projects with the lane that is measured."""
    lane_class = LANE_CLASS[KIND]
    given = {"names": names, "reach": REACH, "lane_class": lane_class, "cap": LANE_CAP[lane_class]}
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_PROJECTS, given)
        connection.execute(_LANES, given)


def _copy(dsn: str, work: Work, model: UUID) -> None:
    make_projects(dsn, [project(number) for number in range(1, work.projects)])
    if work.backlog:
        make_projects(dsn, [busy(number) for number in range(BUSY)])
    sets = [
        ("busy-", BUSY, work.backlog, 0),
        ("project-", work.projects, work.projects * work.each, 1),
    ]
    with psycopg.connect(dsn, autocommit=True) as connection:
        for prefix, projects, count, later_s in sets:
            given = {"prefix": prefix, "projects": projects, "count": count, "later_s": later_s}
            connection.execute(_COMMANDS, given | {"model": model})
        connection.execute(_EVENTS, {"model": model})
        connection.execute("delete from output where command_id = %s", (model,))
        connection.execute("delete from commands where id = %s", (model,))
        connection.execute("vacuum analyze")
