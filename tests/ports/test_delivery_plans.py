"""What claiming and settling deliveries looks at, with much owed to endpoints that have no room."""

import re

import psycopg
import pytest

from rdev.adapters.postgres import deliveries as deliveries_sql
from rdev.adapters.postgres.connection import open_connection
from tests.ports.conftest import Pools
from tests.ports.hooks import Hooks, accepted, postgres_hooks, refused

BLOCKED = 60_000
CLAIM = "select * from claim_deliveries('one', 60, 64, 32, 32, 16, '{}')"
SORTED = {
    "w.owner, (GREATEST((GREATEST(d.due, d.created_at)), l_1.served_at))",
    "r.waits",
    'w.owner, f.number, d_1.due, d_1."position"',
    "r.number",
}
# Half of it was delivered; of the rest one endpoint's is due and it has no room, the other's is due
# in a day.
FILL = """
insert into deliveries (webhook_id, event_id, type, project, status, due)
select w.id, m.id, 'command.queued', 'demo',
       case when n %% 2 = 0 then 'delivered' else 'pending' end,
       clock_timestamp() + case when w.id = %(busy)s then interval '0' else interval '1 day' end
from generate_series(1, %(rows)s) n, (select id from webhook_messages limit 1) m,
     (select id from webhooks where id in (%(busy)s, %(later)s)) w
"""
EXPLAIN_NESTED = """
load 'auto_explain';
set auto_explain.log_min_duration = 0;
set auto_explain.log_nested_statements = on;
set client_min_messages = log;
"""


async def _owed(hooks: Hooks, pools: Pools, rows: int) -> dict[str, object]:
    """Two endpoints with much behind them, eight with one delivery each; what `FILL` is given."""
    busy, later = [await hooks.endpoint() for _ in range(2)]
    for _ in range(8):
        await hooks.endpoint()
    await hooks.happen("command.queued")
    for owed in await hooks.claim():
        # The busy one is left with its only attempt under way.
        if owed.webhook != busy:
            await hooks.queue.settle([accepted(owed)])
    await hooks.happen("command.started")
    values = {
        "busy": busy.removeprefix("whk_"),
        "later": later.removeprefix("whk_"),
        "rows": rows // 2,
    }
    async with pools.requests.connection() as connection:
        await connection.execute(FILL, values)
    return values


async def _nested_plans(pools: Pools) -> list[str]:
    plans: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        if "Query Text:" in (diagnostic.message_primary or ""):
            plans.append(diagnostic.message_primary or "")

    connection = await open_connection(pools.settings)
    connection.add_notice_handler(note)
    for setting in EXPLAIN_NESTED.strip().splitlines():
        await connection.execute(setting)
    await connection.execute(CLAIM)
    await connection.close()
    return plans


async def _pages(pools: Pools) -> int:
    """Pages that a claim and all inside of it looks at; it takes nothing."""
    async with (
        pools.requests.connection() as connection,
        connection.transaction(force_rollback=True),
    ):
        cursor = await connection.execute("explain (analyze, buffers, format json) " + CLAIM)
        row = await cursor.fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.slow
@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
async def test_a_claim_asks_the_indexes_of_each_lane(pools: Pools, analyzed: bool) -> None:
    hooks = postgres_hooks(pools.requests)
    await _owed(hooks, pools, 10_000)
    if analyzed:
        async with pools.requests.connection() as connection:
            await connection.execute("analyze deliveries, webhook_lanes, webhooks")
    plans = [plan for plan in await _nested_plans(pools) if " deliveries " in plan]
    assert len(plans) >= 3  # which lanes, and what of them, for those that accept and the others
    for plan in plans:
        assert "Seq Scan on deliveries" not in plan, plan
        assert "Bitmap" not in plan, plan
        # The first of a lane is the first of its index; what is under way has an index too.
        used = set(re.findall(r"using (deliver\w+) on deliveries", plan))
        assert used <= {"deliveries_pending", "deliveries_sending", "deliveries_pkey"}, plan
        # Lanes are sorted, by owner too, and what of them is taken: what waits behind it never.
        assert set(re.findall("Sort Key: (.*)", plan)) <= SORTED


@pytest.mark.slow
async def test_what_waits_for_endpoints_without_room_costs_a_claim_nothing(pools: Pools) -> None:
    """Pages, not time: the same number with a hundred rows and with many thousand."""
    hooks = postgres_hooks(pools.requests)
    values = await _owed(hooks, pools, 100)
    few = await _pages(pools)
    async with pools.requests.connection() as connection:
        await connection.execute(FILL, values | {"rows": BLOCKED // 2})
    many = await _pages(pools)
    # An index of that many is a level or two deeper.
    assert many <= 2 * few + 50, (few, many)


async def test_a_settle_planned_for_an_empty_table_looks_up_by_key(pools: Pools) -> None:
    """Its plan is kept while the table grows."""
    hooks = postgres_hooks(pools.requests)
    await hooks.endpoint()
    await hooks.happen("command.queued")
    (owed,) = await hooks.claim()
    given = deliveries_sql._settle_parameters([refused(owed)])
    async with pools.requests.connection() as connection:
        cursor = await connection.execute("explain " + deliveries_sql._SETTLE, given)
        plan = [row[0] for row in await cursor.fetchall()]
    (at,) = [at for at, line in enumerate(plan) if " on deliveries d" in line and "Scan" in line]
    assert re.search("(Index|Recheck) Cond: .*id = ", plan[at + 1]), "\n".join(plan)
