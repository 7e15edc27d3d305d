"""The queue: claims, permits, heartbeats, take-overs, and what stop leaves behind."""

from collections.abc import Callable, Collection
from contextlib import asynccontextmanager

import trio
from trio.testing import wait_all_tasks_blocked

from rdev.domain.commands import LaneClass, Status
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.stream import Chunk
from rdev.ports.commands import Claims
from rdev.services.queue import TICK_S
from tests.fakes.commands import FakeCommands
from tests.fakes.executor import FakeRun
from tests.fakes.lanes import FakeLanes
from tests.fakes.store import ACTOR, StoreState
from tests.services.scripted import (
    LEASE_S,
    PROGRAMS,
    PROJECT,
    Place,
    Server,
    make_project,
    submit,
)

LANE = Lane(project=PROJECT, lane_class=LaneClass.WORK)


async def _until(condition: Callable[[], bool], *, within_s: float = 600) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


def _status(server: Server, command: CommandId) -> Status:
    return server.state.rows[command].command.status


def _another(server: Server, holder: str) -> Server:
    """A second process on the same store and place."""
    return Server(state=server.state, place=server.place, holder=holder)


async def test_a_queued_command_is_claimed_run_and_ended(
    server: Server, nursery: trio.Nursery
) -> None:
    await nursery.start(server.queue.run)
    command = await submit(server, "quick")
    server.queue.wake(LANE)
    assert await server.ended(command) is Status.SUCCEEDED
    await wait_all_tasks_blocked()
    statistics = server.queue.statistics()
    assert (statistics.claimed, statistics.finished, statistics.running) == (1, 1, 0)
    assert (statistics.taken_over, statistics.stale) == (0, 0)


async def test_a_wake_up_is_answered_at_once(server: Server, nursery: trio.Nursery) -> None:
    await nursery.start(server.queue.run)
    await wait_all_tasks_blocked()
    began = trio.current_time()
    command = await submit(server, "quick")
    server.queue.wake(LANE)
    await wait_all_tasks_blocked()
    assert _status(server, command) is Status.SUCCEEDED
    assert trio.current_time() == began


async def test_a_lost_wake_up_costs_a_tick_at_most(server: Server, nursery: trio.Nursery) -> None:
    await nursery.start(server.queue.run)
    await wait_all_tasks_blocked()
    began = trio.current_time()
    await server.ended(await submit(server, "quick"))
    assert trio.current_time() - began <= TICK_S + 0.1


async def test_an_end_makes_room_for_the_next_at_once(
    server: Server, nursery: trio.Nursery
) -> None:
    for _ in range(40):
        await submit(server, "quick")
    began = trio.current_time()
    await nursery.start(server.queue.run)
    for command in list(server.state.rows):
        await server.ended(command)
    assert trio.current_time() - began < TICK_S


async def test_no_more_run_than_there_are_permits(server: Server, nursery: trio.Nursery) -> None:
    server = Server(state=server.state, place=server.place, running_max=3)
    for name in ("a", "b", "c"):
        await make_project(server, name)
        for _ in range(3):
            await submit(server, "forever", project=name)
    await nursery.start(server.queue.run)
    await trio.sleep(10)
    assert server.queue.statistics().running == 3
    assert len(server.place.started) == 3
    server.queue.cancel(server.place.started[0])
    await _until(lambda: len(server.place.started) == 4)
    assert server.queue.statistics().running == 3


async def test_heartbeats_keep_a_long_command_ours(server: Server, nursery: trio.Nursery) -> None:
    command = await submit(server, "forever")
    await nursery.start(server.queue.run)
    other = _another(server, "two")
    await nursery.start(other.queue.run)
    await trio.sleep(10 * LEASE_S)
    assert server.queue.statistics().running + other.queue.statistics().running == 1
    assert other.queue.statistics().taken_over + server.queue.statistics().taken_over == 0
    left_s = server.state.rows[command].lease_until - trio.current_time()
    assert left_s > LEASE_S / 2


class CountedHeartbeats(FakeCommands):
    """Notes when heartbeats come."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.state, lease_s=LEASE_S)
        self.at: list[float] = []

    async def heartbeat(self, leases):  # type: ignore[no-untyped-def]
        self.at.append(trio.current_time())
        return await super().heartbeat(leases)


async def test_a_heartbeat_comes_every_third_of_a_lease(
    server: Server, nursery: trio.Nursery
) -> None:
    server.queue._leases = store = CountedHeartbeats(server)
    await submit(server, "forever")
    await nursery.start(server.queue.run)
    await trio.sleep(LEASE_S + 1)
    assert [round(at) for at in store.at] == [10, 20, 30]


async def test_a_stale_attempt_is_abandoned_and_the_command_goes_on(
    server: Server, nursery: trio.Nursery
) -> None:
    command = await submit(server, "forever")
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 1)
    await server.store.release_holder("one")
    other = _another(server, "two")
    await other.claim()
    await trio.sleep(LEASE_S / 2)
    statistics = server.queue.statistics()
    assert (statistics.running, statistics.stale) == (0, 1)
    assert _status(server, command) is Status.RUNNING
    assert server.place.started == [command]


class SlowToClose(Place):
    """Places where the end of an attachment takes longer than a heartbeat."""

    @asynccontextmanager
    async def attach(self, *place, **how):  # type: ignore[no-untyped-def]
        async with super().attach(*place, **how) as attachment:
            yield attachment
        await trio.sleep(LEASE_S / 2)


async def test_a_heartbeat_while_a_finished_attempt_closes_finds_nothing_stale(
    nursery: trio.Nursery,
) -> None:
    """Its end is committed meanwhile, so the lease is over; it was nobody else's."""
    server = Server(state=StoreState(), place=SlowToClose(nursery, dict(PROGRAMS)))
    await make_project(server)
    await nursery.start(server.queue.run)
    command = await submit(server, "quick")
    server.queue.wake(LANE)
    assert await server.ended(command) is Status.SUCCEEDED
    await _until(lambda: server.queue.statistics().running == 0)
    statistics = server.queue.statistics()
    assert (statistics.finished, statistics.stale) == (1, 0)


class LateReplies(FakeLanes):
    """Claims that are committed a second before they are answered."""

    async def claim(self, **how):  # type: ignore[no-untyped-def]
        found = await super().claim(**how)
        await trio.sleep(1)
        return found


async def test_a_cancel_between_a_claim_and_its_reply_waits_for_no_heartbeat(
    server: Server, nursery: trio.Nursery
) -> None:
    server.queue._lanes = LateReplies(server.state, lease_s=LEASE_S)
    await nursery.start(server.queue.run)
    command = await submit(server, "forever")
    server.queue.wake(LANE)
    await _until(lambda: _status(server, command) is Status.RUNNING)
    await server.store.request_cancel(command, ACTOR)
    server.queue.cancel(command)
    asked_at = trio.current_time()
    assert await server.ended(command) is Status.CANCELLED
    assert trio.current_time() - asked_at < LEASE_S / 6


async def test_a_cancel_elsewhere_reaches_the_holder_by_heartbeat(
    server: Server, nursery: trio.Nursery
) -> None:
    command = await submit(server, "forever")
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 1)
    await server.store.request_cancel(command, ACTOR)
    began = trio.current_time()
    assert await server.ended(command) is Status.CANCELLED
    assert trio.current_time() - began <= LEASE_S / 3 + 1


async def test_a_cancel_here_is_obeyed_at_once(server: Server, nursery: trio.Nursery) -> None:
    command = await submit(server, "forever")
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 1)
    await server.store.request_cancel(command, ACTOR)
    server.queue.cancel(command)
    server.queue.cancel(CommandId("cmd_unknown"))
    await wait_all_tasks_blocked()
    assert _status(server, command) is Status.CANCELLED


async def test_what_waited_too_long_is_ended_and_announced(
    server: Server, nursery: trio.Nursery
) -> None:
    server = Server(state=server.state, place=server.place, running_max=1)
    await submit(server, "forever")
    await nursery.start(server.queue.run)
    command = await submit(server, "quick", expires_in_s=5)
    assert await server.ended(command) is Status.EXPIRED
    assert server.announced.count(command) == 1


async def test_a_claim_is_announced(server: Server, nursery: trio.Nursery) -> None:
    """Its event `running` stands in the log, and no appender publishes it."""
    command = await submit(server, "forever")
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 1)
    assert server.announced == [command]


# Stop


async def test_stop_gives_the_leases_back_and_leaves_the_commands_running(
    server: Server, nursery: trio.Nursery
) -> None:
    commands = [await submit(server, "forever") for _ in range(3)]
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await _until(lambda: server.queue.statistics().running == 3)
        began = trio.current_time()
        server.queue.stop()
        server.queue.stop()
    assert trio.current_time() == began
    assert {_status(server, command) for command in commands} == {Status.RUNNING}
    assert all(server.state.rows[one].lease_until < trio.current_time() for one in commands)
    other = _another(server, "two")
    await nursery.start(other.queue.run)
    await _until(lambda: other.queue.statistics().running == 3, within_s=TICK_S)
    assert len(server.place.started) == 3


class SlowClaims(FakeLanes):
    """A claim whose answer takes its time."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.state, lease_s=LEASE_S)
        self.claiming = trio.Event()

    async def claim(
        self,
        *,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        touched: Collection[Lane] = (),
        closed: Collection[ProjectId] = (),
    ) -> Claims:
        self.claiming.set()
        found = await super().claim(
            reach=reach,
            instance=instance,
            holder=holder,
            limit=limit,
            touched=touched,
            closed=closed,
        )
        await trio.sleep(1)
        return found


async def test_a_claim_in_flight_at_stop_is_given_back_too(server: Server) -> None:
    server.queue._lanes = store = SlowClaims(server)
    command = await submit(server, "forever")
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await store.claiming.wait()
        await trio.sleep(0.5)
        server.queue.stop()
    assert server.queue.statistics().running == 0
    assert server.state.rows[command].lease_until < trio.current_time()


async def test_a_cancelled_queue_forgets_no_claim(server: Server) -> None:
    """Cancelled while the claim commits: the attempt exists when the leases are counted."""
    server.queue._lanes = store = SlowClaims(server)
    await submit(server, "forever")
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await store.claiming.wait()
        own.cancel_scope.cancel()
    assert server.queue.statistics().claimed == 1


async def test_stop_may_end_the_commands_instead(server: Server, nursery: trio.Nursery) -> None:
    commands = [await submit(server, "forever") for _ in range(2)]
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await _until(lambda: server.queue.statistics().running == 2)
        server.queue.cancel_running()
        server.queue.stop()
    assert {_status(server, command) for command in commands} == {Status.CANCELLED}


async def test_stop_does_not_wait_for_a_database_that_is_gone(server: Server) -> None:
    await submit(server, "forever")
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await _until(lambda: server.queue.statistics().running == 1)
        server.state.unavailable = True
        await trio.sleep(60)
        began = trio.current_time()
        server.queue.stop()
    assert trio.current_time() - began <= 5


async def test_nothing_is_claimed_after_stop(server: Server) -> None:
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        server.queue.stop()
    await submit(server, "quick")
    async with trio.open_nursery() as own:
        assert await server.queue.claim_once(own) == 0


# A server that dies, a database that is gone


async def test_a_restarted_server_takes_back_what_it_held(
    server: Server, nursery: trio.Nursery
) -> None:
    command = await submit(server, "forever")
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await _until(lambda: server.queue.statistics().running == 1)
        own.cancel_scope.cancel()
    assert server.state.rows[command].lease_until > trio.current_time()
    again = _another(server, "one")
    await nursery.start(again.queue.run)
    await _until(lambda: again.queue.statistics().running == 1, within_s=TICK_S)
    assert again.queue.statistics().taken_over == 1
    assert server.place.started == [command]


async def test_the_commands_of_a_dead_server_are_taken_over_when_its_leases_end(
    server: Server, nursery: trio.Nursery
) -> None:
    command = await submit(server, "forever")
    async with trio.open_nursery() as own:
        await own.start(server.queue.run)
        await _until(lambda: server.queue.statistics().running == 1)
        own.cancel_scope.cancel()
    other = _another(server, "two")
    await nursery.start(other.queue.run)
    began = trio.current_time()
    await _until(lambda: other.queue.statistics().running == 1)
    assert LEASE_S - 1 < trio.current_time() - began < LEASE_S + 2
    assert server.place.started == [command]


async def test_an_outage_is_survived_and_our_commands_stay_ours(
    server: Server, nursery: trio.Nursery
) -> None:
    """Longer than a lease: when the database is back we renew before anybody takes over."""
    command = await submit(server, "forever")
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 1)
    server.state.unavailable = True
    await trio.sleep(4 * LEASE_S)
    server.state.unavailable = False
    queued = await submit(server, "quick")
    assert await server.ended(queued) is Status.SUCCEEDED
    statistics = server.queue.statistics()
    assert (statistics.taken_over, statistics.stale, statistics.running) == (0, 0, 1)
    server.queue.cancel(command)
    assert await server.ended(command) is Status.CANCELLED


async def test_an_outage_at_the_start_is_survived(server: Server, nursery: trio.Nursery) -> None:
    server.state.unavailable = True
    await nursery.start(server.queue.run)
    await trio.sleep(60)
    server.state.unavailable = False
    assert await server.ended(await submit(server, "quick")) is Status.SUCCEEDED


async def test_lost_replies_lose_no_command(server: Server, nursery: trio.Nursery) -> None:
    """A claim whose reply was lost runs out, and is taken over: nothing starts twice."""
    await nursery.start(server.queue.run)
    commands = []
    for number in range(20):
        server.state.lost_replies = 0
        commands.append(await submit(server, "quick"))
        server.state.lost_replies = number % 4
        await trio.sleep(7)
    server.state.lost_replies = 0
    for command in commands:
        assert await server.ended(command) is Status.SUCCEEDED
        assert server.payload(command).count(b"hello") == 1
    assert len(server.place.started) == len(set(server.place.started)) == 20


async def test_a_place_that_is_unknown_concerns_its_command_only(
    server: Server, nursery: trio.Nursery
) -> None:
    await make_project(server, "other")
    server.place._projects.discard(ProjectId("other"))
    lost = await submit(server, "quick", project="other")
    fine = await submit(server, "quick", project=PROJECT)
    await nursery.start(server.queue.run)
    assert await server.ended(fine) is Status.SUCCEEDED
    assert _status(server, lost) is Status.RUNNING
    server.place._projects.add(ProjectId("other"))
    assert await server.ended(lost) is Status.SUCCEEDED


async def test_two_servers_share_the_work_and_run_nothing_twice(
    server: Server, nursery: trio.Nursery
) -> None:
    async def short(run: FakeRun) -> int:
        run.write(b"hello\n")
        await trio.sleep(3)
        return 0

    server.place._programs = {"short": short}
    other = _another(server, "two")
    for name in ("a", "b", "c"):
        await make_project(server, name)
        for _ in range(10):
            await submit(server, "short", project=name)
    await nursery.start(server.queue.run)
    await nursery.start(other.queue.run)
    for command in list(server.state.rows):
        assert await server.ended(command) is Status.SUCCEEDED
    assert len(server.place.started) == len(set(server.place.started)) == 30
    assert _published(server) + _published(other) == 30


def _published(server: Server) -> int:
    final: list[Chunk] = [chunk for chunk in server.published if chunk.is_final]
    return len(final)


# Wake-ups between servers


async def _full_and_idle(server: Server, nursery: trio.Nursery) -> tuple[Server, Server]:
    """Two servers: one has no permit left, the other waits for work."""
    full = Server(state=server.state, place=server.place, holder="full", running_max=1)
    await submit(full, "forever")
    await nursery.start(full.queue.run)
    await _until(lambda: full.queue.statistics().running == 1)
    idle = _another(server, "idle")
    await nursery.start(idle.queue.run)
    await trio.sleep(0.3)
    await wait_all_tasks_blocked()
    return full, idle


async def test_what_is_queued_at_a_full_server_starts_at_once_on_another(
    server: Server, nursery: trio.Nursery
) -> None:
    full, idle = await _full_and_idle(server, nursery)
    full.replicas.append(idle.queue)
    began = trio.current_time()
    command = await submit(full, "quick")
    full.queue.wake(LANE)
    await wait_all_tasks_blocked()
    assert _status(server, command) is Status.SUCCEEDED
    assert trio.current_time() == began


async def test_with_all_notifications_lost_nothing_is_late_by_more_than_a_tick(
    server: Server, nursery: trio.Nursery
) -> None:
    full, _ = await _full_and_idle(server, nursery)
    for _ in range(10):
        await trio.sleep(0.37)
        began = trio.current_time()
        command = await submit(full, "quick")
        full.queue.wake(LANE)
        assert await server.ended(command) is Status.SUCCEEDED
        assert trio.current_time() - began <= TICK_S + 0.1


async def test_what_a_claim_leaves_for_want_of_permits_is_told_to_others(
    server: Server, nursery: trio.Nursery
) -> None:
    """Others may have passed by the lane while it was held."""
    woken: list[float] = []
    server = Server(state=server.state, place=server.place, running_max=2)
    server.queue._wake_replicas = lambda: woken.append(trio.current_time())
    for _ in range(3):
        await submit(server, "forever")
    await server.lanes.touch([LANE])
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 2)
    assert woken != []


async def test_what_a_claim_finds_expired_is_announced(
    server: Server, nursery: trio.Nursery
) -> None:
    late = await submit(server, "quick", expires_in_s=0)
    command = await submit(server, "quick")
    await server.lanes.touch([LANE])
    assert await server.queue.claim_once(nursery) == 2
    assert server.announced == [late, command]
    assert _status(server, late) is Status.EXPIRED


async def test_nothing_is_taken_over_for_one_heartbeat_after_an_outage(
    server: Server, nursery: trio.Nursery
) -> None:
    """Its holder could not renew either."""
    command = await submit(server, "forever")
    [claimed] = await server.claim()
    other = _another(server, "two")
    await nursery.start(other.queue.run)
    server.state.unavailable = True
    await trio.sleep(2 * LEASE_S)
    server.state.unavailable = False
    back = trio.current_time()
    await _until(lambda: other.queue.statistics().running == 1)
    waited_s = trio.current_time() - back
    assert LEASE_S / 3 <= waited_s <= LEASE_S / 3 + 5 + TICK_S  # 5: the longest pause
    assert server.state.rows[command].lease_id != claimed.lease.id


async def test_a_holder_that_is_back_first_keeps_its_commands(
    server: Server, nursery: trio.Nursery
) -> None:
    await submit(server, "forever")
    other = _another(server, "two")
    await nursery.start(server.queue.run)
    await _until(lambda: server.queue.statistics().running == 1)
    await nursery.start(other.queue.run)
    server.state.unavailable = True
    await trio.sleep(3 * LEASE_S)
    server.state.unavailable = False
    await trio.sleep(3 * LEASE_S)
    assert server.queue.statistics().running == 1
    assert other.queue.statistics().taken_over == 0
