"""The queue over real breakers: what cannot be reached keeps its commands, and no others."""

import pytest
import trio

from rdev.domain.breaker import BreakerSettings
from rdev.domain.commands import Kind, Status
from rdev.domain.errors import RdevError
from rdev.domain.ids import CommandId, ProjectId
from rdev.ports.telemetry import Silence
from rdev.services.guarded_executor import GuardedExecutor
from tests.fakes.store import StoreState
from tests.services.scripted import PROGRAMS, PROJECT, Place, Server, make_project, submit

BAD = ProjectId("bad")


class FarPlace(Place):
    """Every way to a place that is out of reach fails."""

    async def instance(self, project: ProjectId) -> str:
        await trio.lowlevel.checkpoint()
        self.check_reachable(project)
        return await super().instance(project)


@pytest.fixture
async def server(nursery: trio.Nursery) -> Server:
    """A server whose project BAD was found to be out of reach, and is."""
    place = FarPlace(nursery, dict(PROGRAMS))
    guard = GuardedExecutor(place, telemetry=Silence(), settings=BreakerSettings(calls_min=4))
    server = Server(state=StoreState(), place=place, guard=guard)
    for name in (PROJECT, BAD):
        await make_project(server, name)
    place.unreachable = {BAD}
    for _ in range(4):
        with pytest.raises(RdevError, match="cannot be reached"):
            await guard.tidy(BAD, [])
    assert guard.is_open(BAD)
    return server


async def _fill(server: Server) -> tuple[list[CommandId], list[CommandId]]:
    """More than the lanes take at once, in both projects, the bad one first."""
    kinds = [Kind.SHELL] * 8 + [Kind.GIT] * 3
    bad = [await submit(server, "quick", project=BAD, kind=kind) for kind in kinds]
    return bad, [await submit(server, "quick", kind=kind) for kind in kinds]


def _statuses(server: Server, commands: list[CommandId]) -> set[Status]:
    return {server.state.rows[command].command.status for command in commands}


def _taken_over(server: Server) -> int:
    entries = server.state.record.entries
    return sum(one.action == "command.taken_over" for one in entries)


async def test_while_it_is_open_nothing_is_taken_there_and_the_others_run(
    server: Server, nursery: trio.Nursery
) -> None:
    bad, good = await _fill(server)
    await nursery.start(server.queue.run)
    await trio.sleep(3)
    assert _statuses(server, good) == {Status.SUCCEEDED}
    assert _statuses(server, bad) == {Status.QUEUED}
    assert {server.state.rows[command].lease_id for command in bad} == {None}


async def test_a_trial_closes_it_and_all_run_once_without_losing_a_lease(
    server: Server, nursery: trio.Nursery
) -> None:
    bad, _ = await _fill(server)
    await nursery.start(server.queue.run)
    await trio.sleep(3)
    server.place.unreachable = set()
    began_s = trio.current_time()
    for command in bad:
        await server.ended(command)
    assert _statuses(server, bad) == {Status.SUCCEEDED}
    # Open for 5 s at most, found by a tick, tried until three trials went well.
    assert trio.current_time() - began_s < 6
    assert {server.state.rows[command].command.attempt for command in bad} == {1}
    assert _taken_over(server) == 0


async def test_a_trial_that_fails_costs_the_trial_alone(
    server: Server, nursery: trio.Nursery
) -> None:
    """The heads of its two lanes are taken; they go on when their leases have run out."""
    bad, _ = await _fill(server)
    await nursery.start(server.queue.run)
    await trio.sleep(7)
    running = [one for one in bad if server.state.rows[one].command.status is Status.RUNNING]
    assert 1 <= len(running) <= 2
    assert server.guard is not None
    assert server.guard.is_open(BAD)
    server.place.unreachable = set()
    for command in bad:
        await server.ended(command)
    assert _statuses(server, bad) == {Status.SUCCEEDED}
    assert server.place.started[0] is not None
    assert len(server.place.started) == 22


async def _left_in_the_bad_project(server: Server) -> list[CommandId]:
    """Commands that ran there when their server died."""
    left = [await submit(server, "quick", project=BAD) for _ in range(3)]
    held = await server.claim()
    assert len(held) == 3
    for one in held:
        await server.store.record_instance(one.lease, "boot-1")
    await server.store.release([one.lease for one in held])
    return left


async def test_while_it_is_open_nothing_is_taken_over_there(
    server: Server, nursery: trio.Nursery
) -> None:
    await _left_in_the_bad_project(server)
    await nursery.start(server.queue.run)
    await trio.sleep(3)
    assert _taken_over(server) == 0


async def test_what_was_left_there_goes_on_when_it_can_be_reached_and_so_does_its_queue(
    server: Server, nursery: trio.Nursery
) -> None:
    """A turn to try it is one for both: neither takes all of them from the other."""
    left = await _left_in_the_bad_project(server)
    queued, _ = await _fill(server)
    await nursery.start(server.queue.run)
    await trio.sleep(3)
    server.place.unreachable = set()
    began_s = trio.current_time()
    for command in [*left, *queued]:
        await server.ended(command)
    assert _taken_over(server) == len(left)
    assert trio.current_time() - began_s < 10
