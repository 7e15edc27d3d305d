"""What the hub does while it runs: writes to whoever waits, reads once for many, sends away."""

import contextlib
from itertools import pairwise
from uuid import UUID

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rdev.domain.ids import command_id
from rdev.services import stream, stream_reader
from rdev.services.stream import (
    CLOSE_AT_ONCE,
    Signal,
)
from rdev.services.stream_tail import JOIN_BYTES
from tests.services.hub import COMMAND, Client, Hub


@pytest.fixture
def hub() -> Hub:
    return Hub()


async def test_the_hub_writes_to_whoever_waits_each_event_encoded_once(
    hub: Hub, nursery: trio.Nursery
) -> None:
    clients = [Client() for _ in range(5)]
    await nursery.start(hub.fanout.run)
    with contextlib.ExitStack() as stack:
        for client in clients:
            reader = stack.enter_context(hub.fanout.subscribe(COMMAND, after=0))
            nursery.start_soon(client.follow, reader)
        await wait_all_tasks_blocked()
        reads = hub.log.reads
        for _ in range(4):
            hub.publish(3)
            hub.publish(2)
            await wait_all_tasks_blocked()
        hub.publish(final=True)
        await wait_all_tasks_blocked()
    for client in clients:
        assert client.seen == hub.events
        assert client.signals == [Signal.END]
        # What is published at once is one write, and the same bytes for everybody.
        assert [(w.first_seq, w.last_seq) for w in client.writes] == [
            (1, 5), (6, 10), (11, 15), (16, 20), (21, 22)
        ]  # fmt: skip
        assert all(a is b for a, b in zip(client.writes, clients[0].writes, strict=True))
    assert hub.log.reads == reads
    assert hub.fanout.statistics().written == 25


async def test_how_late_a_stream_is_counts_from_the_first_word_of_news_to_the_last_write(
    hub: Hub, nursery: trio.Nursery
) -> None:
    """Another server appended: what it costs to look is part of it."""
    hub.log.before_s = 0.3
    client = Client()
    await nursery.start(hub.fanout.run)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        nursery.start_soon(client.follow, reader)
        await trio.sleep(5)
        assert hub.lags_s == []
        hub.commit(2)
        hub.fanout.wake(COMMAND)
        await trio.sleep(5)
        assert hub.lags_s == [pytest.approx(0.3)]
        hub.publish(1)
        await trio.sleep(5)
        assert hub.lags_s[1:] == [pytest.approx(0.0)]


async def test_a_write_carries_16_kib_where_more_is_pending(
    hub: Hub, nursery: trio.Nursery
) -> None:
    client = Client()
    await nursery.start(hub.fanout.run)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        nursery.start_soon(client.follow, reader)
        await wait_all_tasks_blocked()
        for _ in range(20):
            hub.publish(size_bytes=5_000)
        await wait_all_tasks_blocked()
        assert client.seen == hub.events
    assert len(client.writes) == 7
    assert all(len(write.data) <= JOIN_BYTES for write in client.writes)


async def test_a_client_that_does_not_take_everything_is_not_written_to(
    hub: Hub, nursery: trio.Nursery
) -> None:
    slow, fast = Client(room=1, pause_s=5.0), Client()
    await nursery.start(hub.fanout.run)
    with (
        hub.fanout.subscribe(COMMAND, after=0) as one,
        hub.fanout.subscribe(COMMAND, after=0) as other,
    ):
        nursery.start_soon(slow.follow, one)
        nursery.start_soon(fast.follow, other)
        await wait_all_tasks_blocked()
        for _ in range(10):
            hub.publish(2)
            await wait_all_tasks_blocked()
        assert fast.seen == hub.events
        assert len(slow.seen) == 1
        await trio.sleep(12.0)
        assert slow.seen == hub.events


async def test_what_all_have_is_not_kept(hub: Hub, nursery: trio.Nursery) -> None:
    client = Client()
    await nursery.start(hub.fanout.run)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        nursery.start_soon(client.follow, reader)
        await wait_all_tasks_blocked()
        hub.publish(size_bytes=10_000)
        assert reader.topic.tail.size_bytes > 9_000
        await wait_all_tasks_blocked()
        assert reader.topic.tail.size_bytes == 0


async def test_readers_that_take_by_themselves_leave_nothing_kept_either(
    hub: Hub, nursery: trio.Nursery
) -> None:
    client = Client()
    await nursery.start(hub.fanout.run)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        nursery.start_soon(lambda: client.follow(reader, offering=False))
        await wait_all_tasks_blocked()
        hub.publish(size_bytes=10_000)
        await trio.sleep(2.0)
        assert client.seen == hub.events
        assert reader.topic.tail.size_bytes == 0


async def test_many_readers_at_one_place_cost_one_read(hub: Hub, nursery: trio.Nursery) -> None:
    hub.commit(3)
    hub.log.before_s = 1.0
    clients = [Client() for _ in range(100)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            reader = stack.enter_context(hub.fanout.subscribe(COMMAND, after=0))
            reader.log_ends(3)
            nursery.start_soon(lambda c=client, r=reader: c.follow(r, offering=False))
        await trio.sleep(2.5)
        assert all(client.seen == hub.events for client in clients)
        assert hub.log.reads == 1
        reads = hub.log.reads
        with hub.fanout.subscribe(COMMAND, after=3) as late:
            late.log_ends(3)
            with trio.move_on_after(1):
                await late.receive()
        assert hub.log.reads == reads


async def test_a_wake_up_costs_one_read_for_all(hub: Hub, nursery: trio.Nursery) -> None:
    clients = [Client() for _ in range(50)]
    await nursery.start(hub.fanout.run)
    with contextlib.ExitStack() as stack:
        for client in clients:
            reader = stack.enter_context(hub.fanout.subscribe(COMMAND, after=0))
            nursery.start_soon(client.follow, reader)
        await wait_all_tasks_blocked()
        reads = hub.log.reads
        hub.commit(4)
        hub.fanout.wake(COMMAND)
        await wait_all_tasks_blocked()
        assert all(client.seen == hub.events for client in clients)
        assert hub.log.reads == reads + 2


async def test_a_log_that_is_gone_for_a_while_silences_the_stream_only(
    hub: Hub, nursery: trio.Nursery
) -> None:
    client = Client()
    await nursery.start(hub.fanout.run)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        nursery.start_soon(client.follow, reader)
        await wait_all_tasks_blocked()
        hub.commit(4)
        hub.log._state.unavailable = True
        hub.fanout.wake(COMMAND)
        await trio.sleep(3.5)
        assert client.seen == []
        hub.log._state.unavailable = False
        await trio.sleep(1.5)
        assert client.seen == hub.events


async def test_a_page_that_began_before_it_was_asked_for_proves_no_end(
    hub: Hub, nursery: trio.Nursery
) -> None:
    """An empty page may be older than what was committed since."""
    hub.log.after_s = 1.0
    early, late = Client(), Client()
    with hub.fanout.subscribe(COMMAND, after=0) as one:
        nursery.start_soon(lambda: early.follow(one, offering=False))
        await trio.sleep(0.5)
        hub.commit(2)  # told to nobody here: there was no other reader
        with hub.fanout.subscribe(COMMAND, after=0) as other:
            nursery.start_soon(lambda: late.follow(other, offering=False))
            await trio.sleep(3.0)
            assert late.seen == hub.events


async def test_very_many_streams_are_closed_over_the_time_given(nursery: trio.Nursery) -> None:
    hub = Hub(drain_s=10.0)
    ended: list[float] = []
    done = trio.Event()

    async def read() -> None:
        with hub.fanout.subscribe(COMMAND, after=0) as reader:
            assert await reader.receive() is Signal.DISMISSED
            ended.append(trio.current_time())

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await hub.fanout.run(task_status=task_status)
        done.set()

    await nursery.start(run)
    for _ in range(CLOSE_AT_ONCE + 50):
        nursery.start_soon(read)
    await wait_all_tasks_blocked()
    began = trio.current_time()
    hub.fanout.stop()
    await done.wait()
    await wait_all_tasks_blocked()
    after_s = [moment - began for moment in ended]
    assert len([moment for moment in after_s if moment == 0]) == CLOSE_AT_ONCE
    assert len(ended) == CLOSE_AT_ONCE + 50
    assert after_s[-1] == pytest.approx(10.0)
    assert max(b - a for a, b in pairwise(after_s[CLOSE_AT_ONCE:])) == pytest.approx(0.2)
    began = trio.current_time()
    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    assert ended[-1] == began  # whoever comes now is sent away


async def test_a_server_that_drains_looks_at_the_log_by_itself(nursery: trio.Nursery) -> None:
    """Nobody tells it of what another server appends: its ears are closed already."""
    hub = Hub(drain_s=10.0)
    await nursery.start(hub.fanout.run)
    clients = [Client() for _ in range(CLOSE_AT_ONCE + 2)]

    async def follow(client: Client) -> None:
        with hub.fanout.subscribe(COMMAND, after=0) as reader:
            await client.follow(reader)

    for client in clients:
        nursery.start_soon(follow, client)
    await wait_all_tasks_blocked()
    hub.fanout.stop()
    await trio.sleep(0.5)
    hub.commit(3)
    await trio.sleep(3.0)
    assert [len(client.seen) for client in clients].count(3) == 2


async def test_very_many_streams_that_are_marked_at_once_hold_up_nobody(
    hub: Hub, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is written: after a reconnect everybody looks at the log."""
    for module in (stream, stream_reader):
        monkeypatch.setattr(module, "YIELD_S", 0.0)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    await nursery.start(hub.fanout.run)
    with contextlib.ExitStack() as stack:
        for number in range(100):
            stack.enter_context(hub.fanout.subscribe(command_id(UUID(int=number)), after=0))
        async with trio.open_nursery() as others:
            others.start_soon(take_turns)
            hub.fanout.wake_all()
            await trio.lowlevel.checkpoint()
            while not hub.fanout.is_idle:
                await trio.lowlevel.checkpoint()
            others.cancel_scope.cancel()
    assert turns >= 90


async def test_nothing_is_read_for_readers_that_have_left(hub: Hub, nursery: trio.Nursery) -> None:
    await nursery.start(hub.fanout.run)
    hub.publish()
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        nursery.start_soon(Client().follow, reader)
        await wait_all_tasks_blocked()
        reads = hub.log.reads
        for _ in range(100):
            hub.commit(size_bytes=60_000)
        hub.log.after_s = 1.0
        hub.fanout.wake(COMMAND)
        await wait_all_tasks_blocked()
        reader.dismiss()
    await trio.sleep(60)
    assert hub.log.reads == reads + 1
