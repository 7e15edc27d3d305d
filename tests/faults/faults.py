"""The faults: each is injected into an arena and waited out, and counted in its tally."""

import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import trio

from tests.faults.arena import (
    LEASE_S,
    PATIENCE_S,
    RECOVERY_MAX_S,
    Arena,
    Node,
    wait_until,
    wait_until_async,
)
from tests.faults.ledger import Work

Fault = Callable[[Arena], Awaitable[None]]
# What a listening connection says of itself when it begins.
LISTENING = b"rdev/listen"


async def kill(arena: Arena) -> None:
    """kill -9 of one server at any time; the other one takes over."""
    node = arena.chance.choice(arena.nodes)
    await trio.sleep(arena.chance.uniform(0, 0.5))
    node.signal(SIGKILL)
    arena.injected("kill")
    await _outlive(arena, node)


async def kill_at(arena: Arena, point: str) -> None:
    """The same at a named point."""
    # Only the first server may be one that is full.
    node = arena.nodes[0] if point.startswith("touch.") else arena.chance.choice(arena.nodes)
    if point.startswith("take_over."):
        await _kill_in_take_over(arena, node, point)
        return
    if point.startswith("release_holder."):
        node.signal(SIGKILL)
        arena.injected("kill")
        await node.ended()
        await node.forget_client()
        node.points.arm(point)
        node.server.spawn()
    else:
        node.points.arm(point, nth=arena.chance.choice((1, 1, 1, 2, 3)))
        if point.startswith("release."):
            node.points.arm(point)
            node.signal(SIGTERM)
        arena.nursery.start_soon(_provoke, arena, node, point)
    arena.injected(f"kill_at {point}")
    await wait_until(lambda: not node.lives, f"{node.name} dies at {point}", PATIENCE_S)
    await _outlive(arena, node)


async def _provoke(arena: Arena, node: Node, point: str) -> None:
    """Do what leads there, where the load does so seldom."""
    what = point.partition(".")[0]
    works = {
        "cancel": Work.NEVER,
        "request_cancel": Work.CANCELLED,
        "kill_command": Work.CANCELLED,
        "expire": Work.EXPIRED,
    }
    while what in works and node.points.armed:
        for _ in range(3):
            arena.nursery.start_soon(arena.carry_out, arena.new_record(works[what]))
        await trio.sleep(2)


async def _kill_in_take_over(arena: Arena, node: Node, point: str) -> None:
    """One is killed, and the one that takes over too."""
    other = arena.other(node)
    node.points.arm(point)
    other.signal(SIGKILL)
    arena.injected("kill")
    arena.injected(f"kill_at {point}")
    await node.ended()
    await other.ended()
    held = await arena.held_by(node) + await arena.held_by(other)
    await other.start()
    since_s = time.monotonic()
    arena.tally.recoveries_s.append(await arena.recovered(held, since_s))
    await node.start()


async def _outlive(arena: Arena, node: Node) -> None:
    """The other server goes on with what the dead one held; then it comes back."""
    died_at_s = await node.ended()
    held = await arena.held_by(node)
    recovery_s = await arena.recovered(held, died_at_s)
    arena.tally.recoveries_s.append(recovery_s)
    if recovery_s > RECOVERY_MAX_S:
        arena.tally.findings.append(f"FOUND a recovery of {recovery_s:.2f} s of {held}")
    await node.start()


async def freeze(arena: Arena) -> None:
    """SIGSTOP past the lease, then SIGCONT: what it then writes is stale."""
    node = arena.chance.choice(arena.nodes)
    await _freeze(arena, node, lambda: node.signal(SIGSTOP))
    arena.injected("freeze")


async def freeze_at(arena: Arena, point: str) -> None:
    """The same at a named point: a late exec, a late append."""
    node = arena.chance.choice(arena.nodes)
    node.points.arm(point, action=SIGSTOP)
    fired = len(node.points.fired)
    await wait_until(lambda: len(node.points.fired) > fired, f"it stops at {point}", PATIENCE_S)
    await _freeze(arena, node, lambda: None)
    arena.injected(f"freeze_at {point}")


async def overtake(arena: Arena) -> None:
    """One stands still with an append in hand, the other takes over and stands still before it has
    appended anything: the first one's append fits the log, and only the lease tells that it is
    stale."""
    node = arena.chance.choice(arena.nodes)
    other = arena.other(node)
    node.points.arm("append.before", action=SIGSTOP)
    await wait_until(lambda: not node.points.armed, "it stops with an append", PATIENCE_S)
    # Ticks before the lease is over take nothing over.
    while await arena.held_by(node):
        other.points.arm("take_over.committed", action=SIGSTOP)
        other.signal(SIGCONT)
        await wait_until(lambda: not other.points.armed, "it stops", PATIENCE_S)
    node.signal(SIGCONT)
    await trio.sleep(1)
    other.signal(SIGCONT)
    arena.injected("overtake", 2)
    await _goes_on(arena)


async def _freeze(arena: Arena, node: Node, stop: Callable[[], None]) -> None:
    stop()
    stopped_at_s = time.monotonic()
    held = await arena.held_by(node)
    try:
        await arena.recovered(held, stopped_at_s + LEASE_S / 2)
        await trio.sleep(max(0.0, stopped_at_s + 1.5 * LEASE_S - time.monotonic()))
    finally:
        node.signal(SIGCONT)


async def restart_database(arena: Arena) -> None:
    """PostgreSQL stops at once (`-m immediate`) and comes back after a while."""
    await trio.to_thread.run_sync(arena.database.crash)
    await trio.sleep(arena.chance.choice((0, 0, 0.5, LEASE_S + 1)))
    await trio.to_thread.run_sync(arena.database.start)
    arena.injected("restart_database")
    await _goes_on(arena)


async def kill_backend(arena: Arena) -> None:
    """SIGKILL of one session's process: PostgreSQL ends all of them and recovers."""
    if await trio.to_thread.run_sync(arena.database.kill_backend, arena.chance):
        arena.injected("kill_backend")
    await _goes_on(arena)


async def terminate_storm(arena: Arena) -> None:
    """`pg_terminate_backend` on every session, again and again."""
    for _ in range(5):
        await trio.to_thread.run_sync(arena.database.terminate_sessions)
        arena.injected("terminate_sessions")
        await trio.sleep(arena.chance.uniform(0.05, 0.4))
    await _goes_on(arena)


async def half_open(arena: Arena) -> None:
    """Nothing passes between one server and the database any more, and nothing is closed."""
    node = arena.chance.choice(arena.nodes)
    assert node.proxy is not None
    held = await arena.held_by(node)
    node.proxy.black_hole()
    since_s = time.monotonic()
    arena.injected("half_open")
    await arena.recovered(held, since_s + LEASE_S / 2)
    node.proxy.open_again()
    await node.ready()
    await _works_again(arena, node)


async def step_clock(arena: Arena) -> None:
    """One server's clock is an hour off for a while."""
    node = arena.chance.choice(arena.nodes)
    clock = node.server.state_dir / "clock"
    clock.write_text(str(arena.chance.choice((-3_600, 3_600))))
    arena.injected("step_clock")
    await trio.sleep(1.5 * LEASE_S)
    clock.unlink()
    arena.injected("step_clock")
    await _goes_on(arena)


async def deafen(arena: Arena) -> None:
    """No notification reaches either server for a while."""
    for node in arena.nodes:
        assert node.proxy is not None
        node.proxy.silenced = LISTENING
        arena.injected("deafen")
    await trio.sleep(2 * LEASE_S)
    await _goes_on(arena)
    for node in arena.nodes:
        assert node.proxy is not None
        node.proxy.silenced = None


async def fill_disk(arena: Arena, disk: Path) -> None:
    """The database's file system is full for longer than a lease; rdev answers 503 meanwhile."""
    ballast = disk / "ballast"
    await trio.to_thread.run_sync(_fill, ballast)
    arena.injected("fill_disk")
    await wait_until_async(lambda: _is_refused(arena), "it says 503", PATIENCE_S)
    await trio.sleep(1.5 * LEASE_S)
    await trio.to_thread.run_sync(ballast.unlink)
    if not arena.database.serves:  # without room for its WAL it ends; an operator starts it
        await trio.to_thread.run_sync(arena.database.crash)
        await trio.to_thread.run_sync(arena.database.start)
        arena.injected("restart_database")
    for node in arena.nodes:
        await node.ready()
    await _goes_on(arena)


def _fill(ballast: Path) -> None:
    """Take every byte; again, since what was in flight may have given some back."""
    with ballast.open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4_096))


async def _is_refused(arena: Arena) -> bool:
    """Whether a new command meets "not now"."""
    node = arena.chance.choice(arena.nodes)
    assert node.api is not None
    record = arena.new_record(Work.QUICK)
    try:
        refused = await arena.is_refused(node, record)
    finally:
        arena.nursery.start_soon(arena.carry_out, record)
    return refused


async def _goes_on(arena: Arena) -> None:
    """Every command that runs is heard of again."""
    held = [command for node in arena.nodes for command in await arena.held_by(node)]
    await arena.recovered(held, time.monotonic())


async def _works_again(arena: Arena, node: Node) -> None:
    """The server itself claims and appends again."""
    known = set(await arena.held_by(node))
    with trio.move_on_after(PATIENCE_S):
        while not (new := set(await arena.held_by(node)) - known):
            await trio.sleep(0.05)
        await arena.recovered(list(new), time.monotonic() - PATIENCE_S)
        return
    raise AssertionError(f"{node.name} does not work again")
