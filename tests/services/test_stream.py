"""The hub: what a reader saw is the log, whatever happens in between."""

from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.stream import Chunk, GapEvent, Source, gap_line
from rdev.services.stream import (
    BUFFER_BYTES,
    HEARTBEAT_S,
    Frames,
    Signal,
    Subscription,
)
from tests.fakes.store import StoreState
from tests.services.hub import COMMAND, OTHER, Client, Event, Hub, SlowLog, events_of, read_all


@pytest.fixture
def hub() -> Hub:
    return Hub()


# The property


@dataclass(frozen=True)
class Reading:
    """How a reader behaves: how long it pauses, and when it comes back from how far behind."""

    pause_ms: int
    # Frames that its client takes at once when the hub writes; None: it takes by itself.
    room: int | None
    stays: tuple[int, ...]
    backs: tuple[int, ...]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["publish", "publish", "replica", "lost", "wake", "pause"]),
        st.integers(1, 4),
        st.sampled_from([30, 300, 900]),
        st.integers(0, 40),
    ),
    max_size=40,
)
READINGS = st.builds(
    Reading,
    pause_ms=st.sampled_from([0, 1, 7, 50]),
    room=st.sampled_from([None, 0, 1, 1_000]),
    stays=st.lists(st.integers(1, 120), max_size=4).map(tuple),
    backs=st.lists(st.integers(0, 5), min_size=4, max_size=4).map(tuple),
)


async def _write(hub: Hub, steps: list[tuple[str, int, int, int]]) -> None:
    for what, events, size_bytes, pause_ms in steps:
        match what:
            case "publish":
                hub.publish(events, size_bytes=size_bytes)
            case "replica":
                hub.commit(events, size_bytes=size_bytes)
                hub.fanout.wake(COMMAND)
            case "lost":
                hub.commit(events, size_bytes=size_bytes)
            case "wake":
                hub.fanout.wake_all()
        await trio.sleep(pause_ms / 1_000)
    hub.publish(final=True)


async def _follow(hub: Hub, reading: Reading, into: list[Event]) -> None:
    """Read in several connections; each comes back some events behind what was seen."""
    ended = False
    for stay_ms, back in zip(reading.stays, reading.backs, strict=False):
        with trio.move_on_after(stay_ms / 1_000):
            await _connection(hub, reading, into)
            ended = True
        if ended:
            return
        del into[max(0, len(into) - back) :]
    await _connection(hub, reading, into)


async def _connection(hub: Hub, reading: Reading, into: list[Event]) -> None:
    if into and into[-1][1] == "complete":
        return  # the HTTP edge answers this one: there is nothing more
    after = into[-1][0] if into else 0
    client = Client(
        room=reading.room if reading.room is not None else 0,
        pause_s=reading.pause_ms / 1_000,
        seen=into,
    )
    with hub.fanout.subscribe(COMMAND, after=after) as reader:
        await client.follow(reader, offering=reading.room is not None)


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    readings=st.lists(READINGS, min_size=1, max_size=3),
    log_ms=st.tuples(st.sampled_from([0, 1, 9]), st.sampled_from([0, 1, 9])),
    runs=st.booleans(),
)
def test_what_a_reader_saw_is_the_log(
    steps: list[tuple[str, int, int, int]],
    readings: list[Reading],
    log_ms: tuple[int, int],
    runs: bool,
) -> None:
    trio.run(_compare, steps, readings, log_ms, runs, clock=MockClock(autojump_threshold=0))


async def _compare(
    steps: list[tuple[str, int, int, int]],
    readings: list[Reading],
    log_ms: tuple[int, int],
    runs: bool,
) -> None:
    log = SlowLog(StoreState(), log_ms[0] / 1_000, log_ms[1] / 1_000)
    hub = Hub(log=log, buffer_bytes=1_500)
    seen: list[list[Event]] = [[] for _ in readings]
    with trio.fail_after(300):
        async with trio.open_nursery() as loop:
            if runs:
                await loop.start(hub.fanout.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_write, hub, steps)
                for reading, into in zip(readings, seen, strict=True):
                    nursery.start_soon(_follow, hub, reading, into)
            loop.cancel_scope.cancel()
    for into in seen:
        assert into == hub.events
    assert hub.fanout.statistics().subscriptions == 0
    assert not hub.fanout._topics


# Each promise by itself


async def test_a_reader_replays_and_then_joins(hub: Hub, nursery: trio.Nursery) -> None:
    hub.commit(3)
    seen: list[Event] = []

    async def read() -> None:
        seen.extend(await read_all(hub))

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    reads = hub.log.reads
    for _ in range(5):
        hub.publish(2)
        await wait_all_tasks_blocked()
    hub.publish(final=True)
    await wait_all_tasks_blocked()
    assert seen == hub.events
    assert hub.log.reads == reads  # what is published needs no trip to the log


async def test_a_reader_resumes_inside_a_chunk(hub: Hub) -> None:
    hub.commit(5)
    hub.commit(final=True)
    for after in range(7):
        assert await read_all(hub, after=after) == hub.events[after:]


async def test_a_gap_is_seen_by_whoever_resumes_inside_it(hub: Hub) -> None:
    hub.commit(2)
    gap = gap_line(GapEvent(stream="stdout", dropped_bytes=9, first_seq=3, last_seq=8))
    hub.chunks.append(
        Chunk(
            command=COMMAND,
            first_seq=3,
            last_seq=8,
            source=Source.STDOUT,
            raw_bytes=9,
            payload=gap,
        )
    )
    hub.commit(final=True)
    seen = await read_all(hub, after=5)
    assert [(seq, name) for seq, name, _ in seen] == [(8, "gap"), (9, "status"), (10, "complete")]


async def test_a_buffer_that_is_full_falls_back_to_the_log(hub: Hub) -> None:
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        hub.publish()
        assert isinstance(await reader.receive(), Frames)
        with trio.move_on_after(0.001):
            await reader.receive()
        for _ in range(3 * BUFFER_BYTES // 60_000):
            hub.publish(size_bytes=60_000)
            assert reader.topic.tail.size_bytes <= BUFFER_BYTES
        seen: list[Event] = []
        while len(seen) < len(hub.events) - 1:
            item = await reader.receive()
            assert isinstance(item, Frames)
            seen += events_of(item)
        assert hub.fanout.statistics().fell_back == 1
    assert seen == hub.events[1:]


async def test_a_stalled_reader_holds_up_nobody(hub: Hub) -> None:
    """Publishing is synchronous: it cannot wait."""
    with hub.fanout.subscribe(COMMAND, after=0):
        for _ in range(50):
            hub.publish(size_bytes=60_000)
        hub.publish(final=True)
        assert await read_all(hub) == hub.events


async def test_silence_gives_a_heartbeat_after_15_s(hub: Hub) -> None:
    hub.commit()
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        assert isinstance(await reader.receive(), Frames)
        for _ in range(3):
            began = trio.current_time()
            assert await reader.receive() is Signal.HEARTBEAT
            assert trio.current_time() - began == pytest.approx(HEARTBEAT_S)


async def test_a_lost_wake_up_is_made_good_by_the_heartbeat(hub: Hub) -> None:
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        with trio.move_on_after(1):
            await reader.receive()
        hub.commit(2)
        assert await reader.receive() is Signal.HEARTBEAT
        item = await reader.receive()
        assert isinstance(item, Frames)
        assert events_of(item) == hub.events


async def test_another_replica_wakes_the_readers_here(hub: Hub, nursery: trio.Nursery) -> None:
    seen: list[Event] = []

    async def read() -> None:
        seen.extend(await read_all(hub))

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    began = trio.current_time()
    hub.commit(2)
    hub.commit(final=True)
    hub.fanout.wake_each([OTHER, COMMAND])
    await wait_all_tasks_blocked()
    assert seen == hub.events
    assert trio.current_time() == began


async def test_an_announcement_reaches_readers_here_and_elsewhere(
    hub: Hub, nursery: trio.Nursery
) -> None:
    seen: list[Event] = []

    async def read() -> None:
        seen.extend(await read_all(hub))

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    hub.commit(final=True)
    hub.fanout.announce(COMMAND)
    await wait_all_tasks_blocked()
    assert seen == hub.events
    assert hub.told == [COMMAND]


async def test_every_publication_is_told_to_the_replicas(hub: Hub) -> None:
    hub.publish()
    hub.publish()
    assert hub.told == [COMMAND, COMMAND]
    assert hub.fanout.statistics().published == 2


async def test_a_stop_is_heard_at_once(hub: Hub, nursery: trio.Nursery) -> None:
    heard: list[Frames | Signal] = []

    async def read() -> None:
        with hub.fanout.subscribe(COMMAND, after=0) as reader:
            heard.append(await reader.receive())

    await nursery.start(hub.fanout.run)
    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    began = trio.current_time()
    hub.fanout.stop()
    hub.fanout.stop()
    await wait_all_tasks_blocked()
    assert heard == [Signal.DISMISSED]
    assert trio.current_time() == began


async def test_a_stop_while_the_log_is_read_is_heard_too(hub: Hub, nursery: trio.Nursery) -> None:
    hub.log.after_s = 1.0
    nursery.start_soon(_stop_after, hub, 0.5)
    began = trio.current_time()
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        assert await reader.receive() is Signal.DISMISSED
    assert trio.current_time() - began == pytest.approx(1.0)


async def _stop_after(hub: Hub, pause_s: float) -> None:
    await trio.sleep(pause_s)
    hub.fanout.stop()


async def test_the_end_is_told_after_the_last_frames(hub: Hub) -> None:
    hub.commit(final=True)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        item = await reader.receive()
        assert isinstance(item, Frames)
        assert item.is_final
        assert item.counts == {"status": 1, "complete": 1}
        assert await reader.receive() is Signal.END
        assert await reader.receive() is Signal.END


async def test_a_log_that_cannot_be_read_can_be_read_later(hub: Hub) -> None:
    hub.commit(2)
    hub.log._state.unavailable = True
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        with pytest.raises(RdevError) as caught:
            await reader.receive()
        assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
        hub.log._state.unavailable = False
        item = await reader.receive()
        assert isinstance(item, Frames)
        assert events_of(item) == hub.events


async def test_what_is_pruned_before_a_reader_is_no_silence(hub: Hub) -> None:
    for _ in range(3):
        hub.commit(size_bytes=200_000)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        reader.log_reaches(3)
        first = await reader.receive()
        assert isinstance(first, Frames)
        hub.chunks.clear()
        with trio.fail_after(10), pytest.raises(RdevError) as refused:
            await read_on(reader)
    assert refused.value.code is ErrorCode.GONE


async def read_on(reader: Subscription) -> None:
    """To the third event."""
    while reader.position < 3:
        await reader.receive()


async def test_what_is_published_and_pruned_at_once_is_no_silence_either(hub: Hub) -> None:
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        for _ in range(3):
            hub.publish(size_bytes=200_000)
        hub.chunks.clear()
        with trio.fail_after(10), pytest.raises(RdevError) as refused:
            await reader.receive()
    assert refused.value.code is ErrorCode.GONE


async def test_counts_are_those_of_the_joined_frames(hub: Hub) -> None:
    hub.commit(3)
    hub.commit(2)
    with hub.fanout.subscribe(COMMAND, after=0) as reader:
        item = await reader.receive()
    assert isinstance(item, Frames)
    assert (item.first_seq, item.last_seq, item.counts) == (1, 5, {"output": 5})


async def test_whoever_waits_for_an_end_is_told(hub: Hub) -> None:
    with hub.fanout.end_of(COMMAND) as first, hub.fanout.end_of(COMMAND) as second:
        hub.publish()
        assert not first.is_set()
        hub.publish(final=True)
        assert first.is_set()
        assert second.is_set()
    with hub.fanout.end_of(COMMAND) as third:
        hub.fanout.wake_all()
        assert third.is_set()


async def test_leaving_a_subscription_leaves_nothing_behind(hub: Hub) -> None:
    with hub.fanout.subscribe(COMMAND, after=0), hub.fanout.subscribe(COMMAND, after=0):
        assert hub.fanout.statistics().subscriptions == 2
    assert hub.fanout.statistics().subscriptions == 0
    assert hub.fanout._topics == {}
    hub.publish()
