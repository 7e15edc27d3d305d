"""What happened to commands, seen by a trigger of the tests' own, and held against the record."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from psycopg.rows import DictRow, dict_row

from tests.ports.conftest import Pools

_INSTALL = """
create table witness (
    id bigint generated always as identity, command uuid, project text,
    was text, status text, seq bigint, attempt integer
);
create function witness() returns trigger language plpgsql as $$
begin
    insert into witness (command, project, was, status, seq, attempt)
    values (new.id, new.project, case when tg_op = 'UPDATE' then old.status end, new.status,
            new.last_seq, new.attempt);
    return null;
end
$$;
create trigger witness_made after insert on commands for each row execute function witness();
create trigger witness_changed after update on commands for each row
    when (old.status is distinct from new.status) execute function witness();
"""
_SEEN = "select * from witness where project = coalesce(%(project)s, project) order by id"
_TOLD = """
select e.*, exists (
    select from output o
    where o.command_id = e.command_id and o.last_seq = e.seq and o.source = 0
      and position(convert_to('"status":"' || e.status || '"', 'UTF8') in o.payload) > 0
) as is_in_stream
from events e
where project = coalesce(%(project)s, project) and command_id is not null
order by xid, position
"""
_ENTERED = """
select target, action
from audit_entries
where project = coalesce(%(project)s, project)
  and action like 'command.%%' and action not in ('command.cancel_requested', 'command.taken_over')
order by xid, id
"""


async def install(pools: Pools) -> None:
    """Before anything happens."""
    async with pools.requests.connection() as connection:
        await connection.execute(_INSTALL)


async def check_record(pools: Pools, *, project: str | None = None) -> int:
    """Whether the record is what the witness saw: of each command the same changes, with their
    numbers, in their order, each as one event, one entry and one line of the command's own stream.
    Returns how many changes there were."""
    seen = await _rows(pools, _SEEN, project)
    told = await _rows(pools, _TOLD, project)
    entered = await _rows(pools, _ENTERED, project)
    changes = _by(seen, "command")
    events = _by(told, "command_id")
    entries = _by(entered, "target")
    assert events.keys() == changes.keys()
    assert entries.keys() == {f"cmd_{command.hex}" for command in changes}  # type: ignore[attr-defined]
    for command, lived in changes.items():
        mine = events[command]
        assert [_change(one) for one in mine] == [_change(one) for one in lived], command
        assert all(one["is_in_stream"] for one in mine), command
        assert all(left["seq"] < right["seq"] for left, right in pairwise(mine)), command
        actions = [one["action"] for one in entries[f"cmd_{command.hex}"]]  # type: ignore[attr-defined]
        assert actions == [_action(one) for one in lived], command
    return len(seen)


def _change(row: DictRow) -> tuple[object, ...]:
    return row["status"], row["seq"], row["attempt"]


def _action(row: DictRow) -> str:
    """What the entry of a change is called."""
    if row["was"] is None:
        return "command.submitted"
    if row["was"] == "running":
        return "command.queued" if row["status"] == "queued" else "command.finished"
    return "command.started" if row["status"] == "running" else f"command.{row['status']}"


def _by(rows: Sequence[DictRow], key: str) -> Mapping[object, list[DictRow]]:
    found: dict[object, list[DictRow]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


async def _rows(pools: Pools, query: str, project: str | None) -> list[DictRow]:
    async with pools.requests.connection() as connection:
        cursor = connection.cursor(row_factory=dict_row)
        await cursor.execute(query, {"project": project})
        return await cursor.fetchall()
