"""How PostgreSQL runs the statements of every command, over a table with many of them."""

import re
from datetime import UTC, datetime

import pytest

from rdev.adapters.postgres import commands as commands_sql
from rdev.adapters.postgres import leases as leases_sql
from rdev.adapters.postgres import output as output_sql
from rdev.domain.ids import CommandId, command_uuid
from rdev.domain.pages import PAGE_BYTES
from rdev.domain.stream import Source
from tests.ports.conftest import Pools, World, append_to, following, lines

ROWS = 100_000

FILL = f"""
insert into commands (id, project, kind, lane_class, status, level, reach, retry, key_id,
                      request_id, argv, rank, last_seq)
select gen_random_uuid(), 'project-' || n % 500, 'shell', 'work',
       case when n % 10 = 0 then 'queued' else 'succeeded' end,
       1, 'elsewhere', 'never', 'k', 'r', '[]', n, 1
from generate_series(1, {ROWS}) n
"""
FILL_OUTPUT = """
insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
select (now() at time zone 'utc')::date, id, 1, 1, 0, 0, 's'
from commands where reach = 'elsewhere'
"""


async def _plan(pools: Pools, statement: str, parameters: dict[str, object]) -> str:
    async with pools.requests.connection() as connection:
        cursor = await connection.execute("explain " + statement, parameters)
        return "\n".join([row[0] for row in await cursor.fetchall()])


async def _many(pools: Pools) -> None:
    async with pools.requests.connection() as connection:
        await connection.execute(FILL)
        await connection.execute(FILL_OUTPUT)
        await connection.execute("analyze commands, output")


@pytest.mark.slow
async def test_no_statement_of_one_command_scans_the_table(real: World, pools: Pools) -> None:
    claimed = await real.running()
    await _many(pools)
    command = claimed.lease.command
    id_ = command_uuid(command)
    append = output_sql._append_parameters([append_to(claimed, lines(3))])
    page = {"id": id_, "after": 0, "limit": 1_000, "limit_bytes": 1_000_000}
    plans = {
        "append": await _plan(pools, output_sql._APPEND, append),
        "append ends": await _plan(pools, output_sql._APPEND_ENDS, append),
        "read": await _plan(pools, output_sql._READ, page),
        "tail": await _plan(
            pools, output_sql._READ_TAIL, {"id": id_, "source": 1, "tail_bytes": 1_000}
        ),
        "oldest": await _plan(pools, output_sql._OLDEST, {"id": id_}),
        "get": await _plan(pools, commands_sql._GET.replace("%s", "%(id)s"), {"id": id_}),
        "position": await _plan(pools, commands_sql._POSITION, {"id": id_, "position_max": 1_000}),
        "list": await _plan(
            pools,
            commands_sql._LIST,
            {
                "project": "demo",
                "before": None,
                "status": None,
                "kind": None,
                "limit": 50,
                "page_bytes": PAGE_BYTES,
            },
        ),
    }
    # The partitions of the days ahead are empty, and left out when it runs.
    today = f"output_{datetime.now(UTC):%Y%m%d}"
    for name, plan in plans.items():
        assert "Seq Scan on commands" not in plan, f"{name}:\n{plan}"
        assert f"Seq Scan on {today}" not in plan, f"{name}:\n{plan}"


async def test_a_plan_that_is_made_for_an_empty_table_serves_a_full_one(
    real: World, pools: Pools
) -> None:
    """It is kept while the table grows: it must look up by key, not read all there is."""
    claimed = await real.running()
    append = output_sql._append_parameters([append_to(claimed, lines(3)) for _ in range(2)])
    ids = [command_uuid(claimed.lease.command)] * 2
    leases: dict[str, object] = {"ids": ids, "leases": [claimed.lease.id] * 2, "lease_s": 30}
    found = []
    async with pools.appends.connection() as appends, pools.heartbeats.connection() as beats:
        for connection, statement, given in (
            (appends, output_sql._APPEND, append),
            (appends, output_sql._APPEND_ENDS, append),
            (beats, leases_sql._HEARTBEAT, leases),
            (beats, leases_sql._RELEASE, leases),
        ):
            cursor = await connection.execute("explain " + statement, given)
            found.append([row[0] for row in await cursor.fetchall()])
    for plan in found:
        scans = [at for at, line in enumerate(plan) if " on commands c" in line and "Scan" in line]
        assert len(scans) == 2
        for at in scans:
            assert re.search("(Index|Recheck) Cond: .*id = ", plan[at + 1]), plan
        assert set(re.findall(r"commands_\w+", "\n".join(plan))) == {"commands_pkey"}


async def test_appends_and_heartbeats_are_heap_only_updates(real: World, pools: Pools) -> None:
    """They touch no index: the row's moving columns are in none."""
    claimed = await real.running()
    append = append_to(claimed, lines(1))
    await real.output.append([append])
    for _ in range(100):
        append = following(append, lines(1))
        await real.output.append([append])
        await real.leases.heartbeat([claimed.lease])
    updates, hot = await _updates(pools)
    assert updates >= 200
    assert hot >= 0.95 * (updates - 1)  # a claim changes the status, which indexes hold


async def test_a_long_log_is_read_and_trimmed_by_its_own_pages(real: World, pools: Pools) -> None:
    claimed = await real.running()
    append = append_to(claimed, *[lines(1, raw_bytes=1_000) for _ in range(1_000)])
    await real.output.append([append])
    for _ in range(4):
        append = following(append, *[lines(1, raw_bytes=1_000) for _ in range(1_000)])
        await real.output.append([append])
    command = claimed.lease.command
    dropped = await real.output.trim(
        claimed.lease, Source.STDOUT, head_bytes=100_000, tail_bytes=100_000
    )
    assert dropped == 4_800_000
    assert await _numbers(real, command) == 2 + 100 + 1 + 100


async def _numbers(world: World, command: CommandId) -> int:
    return len(await world.log(command))


async def _updates(pools: Pools) -> tuple[int, int]:
    query = """
        select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'commands'
    """
    async with pools.requests.connection() as connection:
        # What other backends counted is reported when they are idle for a second.
        await connection.execute("select pg_stat_force_next_flush()")
    async with pools.appends.connection() as appends, pools.heartbeats.connection() as beats:
        for connection in (appends, beats):
            await connection.execute("select pg_stat_force_next_flush()")
            await connection.execute("select 1")
        async with pools.requests.connection() as connection:
            row = await (await connection.execute(query)).fetchone()
    assert row is not None
    return row[0], row[1]
