"""Reading a feed costs what it brings: looks into two keys, however much is stored."""

import json

import pytest

from rdev.adapters.postgres import feed as feed_sql
from tests.fakes.feed import KEPT_S
from tests.ports.conftest import Pools

ROWS = 120_000
# Seven projects and 400 transactions, of which the test server has ended more.
FILL = f"""
insert into events (xid, type, project, command_id, kind, status, attempt)
select (100 + n / 300)::text::xid8, 'command.queued', 'p' || n % 7, gen_random_uuid(), 'shell',
       'queued', 0
from generate_series(1, {ROWS}) n
"""  # a constant of ours
# A page of few rows reads the pages of these and of some edges; all of history has thousands.
BLOCKS_MAX = 80


async def _explain(pools: Pools, statement: str, xid: int, *, limit: int = 20) -> dict:
    parameters = {
        "xid": str(xid),
        "position": 0,
        "limit": limit,
        "kept_s": KEPT_S,
        "projects": ["p1", "p3", "nobody"],
    }
    async with pools.requests.connection() as connection:
        explain = "explain (analyze, buffers, format json) " + statement
        row = await (await connection.execute(explain, parameters)).fetchone()
        assert row is not None
        plan = row[0] if isinstance(row[0], list) else json.loads(row[0])
        return plan[0]["Plan"]


def _nodes(plan: dict) -> list[dict]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in _nodes(child))]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_a_page_is_a_range_of_a_key_wherever_it_stands(pools: Pools, mode: str) -> None:
    async with pools.requests.connection() as connection:
        await connection.execute(FILL)
        await connection.execute("vacuum analyze events")
        await connection.execute(f"set plan_cache_mode = {mode}")
    for xid in (1, 300, 499, 501):
        for statement, key in (
            (feed_sql._READ_ALL, "events_pkey"),
            (feed_sql._READ_PROJECTS, "events_of_project"),
        ):
            plan = await _explain(pools, statement, xid)
            scans = [node for node in _nodes(plan) if node.get("Relation Name") == "events"]
            assert {node["Node Type"] for node in scans} <= {"Index Scan", "Index Only Scan"}, scans
            ranges = [node for node in scans if "ROW(" in node.get("Index Cond", "")]
            assert [node["Index Name"] for node in ranges] == [key], scans
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, plan


@pytest.mark.slow
async def test_what_is_held_back_is_passed_by(pools: Pools) -> None:
    """The rows behind the edge are many, and none of them is looked at."""
    async with pools.requests.connection() as connection:
        await connection.execute(FILL.replace("(100 + n / 300)", "(4000000000 + n)"))
        await connection.execute("vacuum analyze events")
    plan = await _explain(pools, feed_sql._READ_ALL, 1)
    assert plan["Actual Rows"] == 1  # the edges alone
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, plan
