"""With every notification lost nothing is late by more than the poll; figures are in the ledger."""

import random
import time
from pathlib import Path

import pytest
import trio

from tests.faults.arena import PATIENCE_S, Arena, Node, open_arena, wait_until
from tests.faults.faults import LISTENING
from tests.faults.ledger import Tally

# The promise is 1.1 s; a loaded machine adds its own, and the exact figure is printed.
LATE_MAX_S = 3.0
TURNS = 8

# Lines with the time at which they were written.
TELL_TIME = "for n in 1 2 3 4 5 6 7 8; do date +%s.%N; sleep 0.4; done"


async def watch(node: Node, command: str, late_s: list[float]) -> None:
    """How late each line comes to a reader of this server."""
    assert node.api is not None
    async with node.api.stream(command) as events:
        async for event in events:
            if event.name == "output":
                late_s.append(time.time() - float(str(event.data["line"])))


async def until_event(node: Node, command: str, name: str, value: str | None = None) -> float:
    """When the reader of this server is told (monotonic)."""
    assert node.api is not None
    with trio.fail_after(PATIENCE_S):
        async with node.api.stream(command) as events:
            async for event in events:
                if event.name == name and value in (None, event.data.get("status")):
                    return time.monotonic()
    raise AssertionError(f"the stream ended without {name}")


async def lines_elsewhere(arena: Arena) -> list[float]:
    """Lines of a command, read on the server that does not run it."""
    late: dict[str, list[float]] = {"one": [], "two": []}
    assert arena.nodes[0].api is not None
    command = await arena.nodes[0].api.submit(TELL_TIME, project="p1")
    async with trio.open_nursery() as nursery:
        for node in arena.nodes:
            nursery.start_soon(watch, node, command, late[node.name])
    holders = await trio.to_thread.run_sync(
        arena.query,
        "select s.name from commands c join witness.servers s using (holder)"
        " where 'cmd_' || replace(c.id::text, '-', '') = %s",
        (command,),
    )
    return late["two" if holders[0][0] == "one" else "one"]


async def cancels_elsewhere(arena: Arena) -> list[float]:
    """From the cancel on one server to the end, seen by its reader; most run on the other."""
    late = []
    for _ in range(TURNS):
        submitter, canceller = arena.nodes
        assert submitter.api is not None
        assert canceller.api is not None
        command = await submitter.api.submit("exec sleep 600", project="p2")
        await submitter.api.running(command)
        asked_at_s = time.monotonic()
        assert (await canceller.api.http.delete(f"/commands/{command}")).status_code == 202
        late.append(await until_event(submitter, command, "complete") - asked_at_s)
    return late


async def claims_elsewhere(arena: Arena) -> list[float]:
    """What a server that is full has accepted: the other one must find it."""
    full = arena.nodes[0]
    while not await arena.held_by(full):
        assert full.api is not None
        await full.api.running(await full.api.submit("exec sleep 600", project="full"))
    late = []
    for turn in range(TURNS):
        assert full.api is not None
        command = await full.api.submit("true", project=f"p{1 + turn % 3}")
        rows: list[tuple[object, ...]] = []

        def started(command: str = command, rows: list[tuple[object, ...]] = rows) -> bool:
            rows[:] = arena.query(
                "select extract(epoch from started_at - created_at)::float8 from commands where "
                "started_at is not null and 'cmd_' || replace(id::text, '-', '') = %s",
                (command,),
            )
            return bool(rows)

        await wait_until(started, "it is claimed", PATIENCE_S)
        late.append(float(str(rows[0][0])))
    return late


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_with_every_notification_lost_nothing_waits_for_longer_than_the_poll(
    quick_place: Path, session_tally: Tally
) -> None:
    seed = random.randrange(1 << 30)
    async with open_arena(quick_place, seed=seed, proxied=True, running_max=1) as arena:
        for what in ("heard", "lost"):
            for node in arena.nodes:
                assert node.proxy is not None
                node.proxy.silenced = LISTENING if what == "lost" else None
                if what == "lost":
                    arena.injected("deafen")
            for name, measure in (
                ("lines", lines_elsewhere),
                ("cancels", cancels_elsewhere),
                ("claims", claims_elsewhere),
            ):
                late = sorted(await measure(arena))
                arena.tally.measures.append(
                    f"notifications {what}: {name} are late by p50 {late[len(late) // 2]:.3f} s, "
                    f"max {late[-1]:.3f} s of {len(late)}"
                )
                if late[-1] > LATE_MAX_S:
                    arena.tally.findings.append(f"FOUND {name} late by {late[-1]:.2f} s")
        session_tally.add(arena.tally)
        arena.check()
