"""What a claim, a touch and a repair look at, with much queued behind busy projects."""

import re

import psycopg
import pytest

from rdev.adapters.postgres.connection import open_connection
from tests.ports.conftest import REACH, Pools, World

BUSY = ("busy-0", "busy-1")
BLOCKED = 100_000

FILL = """
insert into commands (id, project, kind, lane_class, status, level, reach, retry, key_id,
                      request_id, argv, rank, last_seq)
select gen_random_uuid(), 'busy-' || n %% 2, 'shell', 'work', 'queued', 1, %s, 'never', 'k', 'r',
       '[]', n, 1
from generate_series(1, %s) n
"""
CLAIM = f"""
select * from claim_commands(
    '{REACH}', 'one', null, 60, 30, 4, 'r', 'e', array['busy-0', 'free-1'], array['work', 'work'])
"""
CLAIM_BUT = f"""
select * from claim_commands(
    '{REACH}', 'one', null, 60, 30, 4, 'r', 'e', array['busy-0', 'free-1'], array['work', 'work'],
    array['free-1', 'free-2', 'free-3'])
"""
TOUCH = "select touch_lanes(array['busy-0', 'free-1'], array['work', 'work'], 30)"
REPAIR = f"select repair_lanes('{REACH}', 30)"
EXPLAIN_NESTED = """
load 'auto_explain';
set auto_explain.log_min_duration = 0;
set auto_explain.log_nested_statements = on;
set client_min_messages = log;
"""


async def _queue(world: World, pools: Pools, blocked: int) -> None:
    """Two projects at their cap with so many behind them, ten others with one each."""
    for name in BUSY:
        await world.project(name)
        for _ in range(4):
            await world.queued(name)
    await world.claim()
    async with pools.requests.connection() as connection:
        await connection.execute(FILL, (REACH, blocked))
    for number in range(10):
        await world.project(f"free-{number}")
        await world.queued(f"free-{number}")
    await world.lanes.repair(reach=REACH)


async def _buffers(pools: Pools, statement: str) -> int:
    """Pages that a statement and all inside of it looked at."""
    async with pools.requests.connection() as connection:
        cursor = await connection.execute("explain (analyze, buffers, format json) " + statement)
        row = await cursor.fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def _nested_plans(pools: Pools, statement: str) -> list[str]:
    plans: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        if "Query Text:" in (diagnostic.message_primary or ""):
            plans.append(diagnostic.message_primary or "")

    connection = await open_connection(pools.settings)
    connection.add_notice_handler(note)
    for setting in EXPLAIN_NESTED.strip().splitlines():
        await connection.execute(setting)
    await connection.execute(statement)
    await connection.close()
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
async def test_no_statement_of_the_lanes_scans_a_table(
    real: World, pools: Pools, analyzed: bool
) -> None:
    await _queue(real, pools, 10_000)
    if analyzed:
        async with pools.requests.connection() as connection:
            await connection.execute("analyze commands, lanes")
    for statement in (CLAIM, CLAIM_BUT, TOUCH, REPAIR):
        plans = await _nested_plans(pools, statement)
        assert len(plans) > 1
        for plan in plans:
            assert "Seq Scan" not in plan, plan
            assert "Bitmap" not in plan, plan
    claim = "\n".join(await _nested_plans(pools, CLAIM))
    # Every join looks up by a key.
    assert "Join Filter" not in claim
    assert "Index Scan using lanes_due on lanes" in claim
    assert "commands_queued on commands" in claim
    # What is sorted is what was locked: the lanes that are touched, and those that may be served.
    for key in re.findall("Sort Key: (.*)", claim):
        assert key in (
            "k.project, k.lane_class",
            "(CASE WHEN s.is_touched THEN s.exact ELSE s.due END)",
        )
    assert "commands_of_project" not in claim


@pytest.mark.slow
async def test_what_is_blocked_costs_a_claim_nothing(real: World, pools: Pools) -> None:
    """Pages, not time: the same number with a hundred and with 100,000 behind two busy projects."""
    seen: list[dict[str, int]] = []
    await _queue(real, pools, 100)
    for _ in range(2):
        seen.append({name: await _buffers(pools, one) for name, one in STATEMENTS.items()})
        async with pools.requests.connection() as connection:
            await connection.execute(FILL, (REACH, BLOCKED))
        await real.lanes.repair(reach=REACH)
    few, many = seen
    for name, pages in few.items():
        # An index of 100,000 is a level or two deeper.
        assert many[name] <= 2 * pages + 50, f"{name}: {few} {many}"


STATEMENTS = {"claim": CLAIM, "touch": TOUCH, "repair": REPAIR}
