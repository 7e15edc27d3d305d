"""The record of events in PostgreSQL, read below `pg_snapshot_xmin`.

Every transaction with a number below it has ended, and what a row is filed under is never less than
its writer's number (`sql/0009_events.sql`): so below it nothing can be added. That number moves on
with the oldest writing transaction of the whole cluster; a long one holds the feed back.
"""

from collections.abc import Collection

import msgspec
from psycopg.rows import DictRow, dict_row

from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.commands import Kind, Status
from rdev.domain.feed import Detail, FeedEvent, Position, check_kept, position_of, row_of
from rdev.domain.ids import ProjectId, command_id
from rdev.ports.feed import FeedBounds, FeedPage

# The first row, the last that may be read, and the last of all: a look each at an end of the
# primary key. A first row that is old is what the housekeeper leaves of all that went before it.
_EDGES = """
edge as materialized (
    select pg_snapshot_xmin(pg_current_snapshot()) as xmin
), oldest as materialized (
    select xid, position from (
        select xid, position, at from events order by xid, position limit 1
    ) first
    where at < clock_timestamp() - make_interval(secs => %(kept_s)s)
), head as materialized (
    select xid, position from events
    where xid < (select xmin from edge)
    order by xid desc, position desc
    limit 1
), newest as materialized (
    select xid from events order by xid desc, position desc limit 1
)"""
_EDGES_COLUMNS = """
    edge.xmin::text::bigint as edge_xid,
    oldest.xid::text::bigint as oldest_xid, oldest.position as oldest_position,
    head.xid::text::bigint as head_xid, head.position as head_position,
    coalesce(newest.xid >= edge.xmin, false) as is_held"""
_EDGES_FROM = """
from edge
left join oldest on true
left join head on true
left join newest on true"""

_EVENT = """
    e.xid::text::bigint as xid, e.position, e.command_id, e.project, e.kind, e.status, e.attempt,
    e.detail::text as detail"""

# The primary key serves it: one range, from the place on.
_OF_ALL = f"""
    select {_EVENT}
    from events e
    where (e.xid, e.position) > (%(xid)s::text::xid8, %(position)s::bigint)
      and e.xid < (select xmin from edge)
      and e.command_id is not null
    order by e.xid, e.position
    limit %(limit)s
"""  # noqa: S608  # a constant of ours

# `events_of_project` serves it: such a range for each project, then the first of all these. The
# range names the project in its ends: with `project = …` and an order by (xid, position) alone the
# planner takes the primary key, and reads all that others did to find that a silent project did
# nothing. (What is held back of these projects is passed by within the key.)
_OF_PROJECTS = f"""
    select {_EVENT}
    from unnest(%(projects)s::text[]) p (project)
    cross join lateral (
        select *
        from events e
        where (e.project, e.xid, e.position)
              > (p.project, %(xid)s::text::xid8, %(position)s::bigint)
          and (e.project, e.xid) < (p.project, (select xmin from edge))
          and e.command_id is not null
        order by e.project, e.xid, e.position
        limit %(limit)s
    ) e
    order by e.xid, e.position
    limit %(limit)s
"""  # noqa: S608  # a constant of ours

_READ = """
with {edges}, page as ({page})
select {columns}, page.*
{source}
left join page on true
order by page.xid, page.position
"""
_READ_ALL = _READ.format(edges=_EDGES, page=_OF_ALL, columns=_EDGES_COLUMNS, source=_EDGES_FROM)
_READ_PROJECTS = _READ.format(
    edges=_EDGES, page=_OF_PROJECTS, columns=_EDGES_COLUMNS, source=_EDGES_FROM
)

_BOUNDS = f"with {_EDGES} select {_EDGES_COLUMNS} {_EDGES_FROM}"

# Who writes: every session that has a transaction number, of whatever database, and what was
# prepared. (When a session of another role began is told to members of pg_read_all_stats only.)
_HELD_BACK = """
select coalesce(max(extract(epoch from clock_timestamp() - writer.began)), 0)::float8
from (
    select xact_start as began from pg_stat_activity where backend_xid is not null
    union all
    select prepared from pg_prepared_xacts
) writer
where (select xid from events order by xid desc, position desc limit 1)
      >= pg_snapshot_xmin(pg_current_snapshot())
"""

_decode_detail = msgspec.json.Decoder(Detail).decode


class PostgresFeed:
    """The `FeedLog` port."""

    def __init__(self, *, pool: Pool, kept_s: float) -> None:
        """Events are kept for `kept_s` seconds at least."""
        self._pool = pool
        self._kept_s = kept_s

    async def read(
        self, *, after: Position, limit: int, projects: Collection[ProjectId] | None
    ) -> FeedPage:
        """See `FeedLog.read`. One statement, so one snapshot."""
        xid, position = row_of(after)
        parameters: dict[str, object] = {"xid": str(xid), "position": position, "limit": limit}
        if projects is not None:
            parameters["projects"] = sorted(projects)
        statement = _READ_ALL if projects is None else _READ_PROJECTS
        rows = await self._rows(statement, parameters)
        bounds = _bounds(rows[0])
        check_kept(after, oldest=bounds.oldest, end=position_of(rows[0]["edge_xid"], 0))
        events = tuple(_event(row) for row in rows if row["xid"] is not None)
        is_full = len(events) == limit
        return FeedPage(
            events=events,
            end=events[-1].position if is_full else max(after, bounds.head),
            is_held=rows[0]["is_held"],
        )

    async def bounds(self) -> FeedBounds:
        """See `FeedLog.bounds`."""
        return _bounds((await self._rows(_BOUNDS, {}))[0])

    async def held_back_s(self) -> float:
        """See `FeedLog.held_back_s`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                row = await (await connection.execute(_HELD_BACK)).fetchone()
                return 0.0 if row is None else row[0]

    async def _rows(self, statement: str, parameters: dict[str, object]) -> list[DictRow]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters | {"kept_s": self._kept_s})
                return await cursor.fetchall()


def _bounds(row: DictRow) -> FeedBounds:
    has_old, has_head = row["oldest_xid"] is not None, row["head_xid"] is not None
    start = position_of(row["edge_xid"], 0)
    return FeedBounds(
        oldest=position_of(row["oldest_xid"], row["oldest_position"]) if has_old else Position(0),
        head=position_of(row["head_xid"], row["head_position"]) if has_head else start,
    )


def _event(row: DictRow) -> FeedEvent:
    return FeedEvent(
        position=position_of(row["xid"], row["position"]),
        command=command_id(row["command_id"]),
        project=ProjectId(row["project"]),
        kind=Kind(row["kind"]),
        status=Status(row["status"]),
        attempt=row["attempt"] or 0,
        detail=_decode_detail(row["detail"]),
    )
