"""One of each kind in half a minute; the long runs are in `test_campaign.py`."""

import random
from pathlib import Path

import pytest

from tests.faults import faults
from tests.faults.arena import open_arena
from tests.faults.ledger import Tally

POINTS = ("insert.committed", "append.uncommitted", "attach.before")


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_kills_freezes_and_a_crashed_database_lose_and_double_nothing(
    quick_place: Path, session_tally: Tally
) -> None:
    seed = random.randrange(1 << 30)
    async with open_arena(quick_place, seed=seed) as arena:
        await arena.begin(workers=2)
        for point in POINTS:
            await faults.kill_at(arena, point)
        await faults.overtake(arena)
        await faults.restart_database(arena)
        await arena.settle()
        session_tally.add(arena.tally)
        arena.check()
