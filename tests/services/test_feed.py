"""The feed's hub: everybody sees every event that concerns them once, in one order."""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Self
from uuid import UUID

import pytest
import trio
import trio.testing

from rdev.domain.commands import Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.feed import START, Position, parse_cursor
from rdev.domain.ids import ProjectId, command_id
from rdev.services.feed import HELD_MOST_S, PAUSE_S, POLL_S, Feed, Projects
from rdev.services.stream import Frames, OfferEach, Signal
from rdev.services.stream_reader import HEARTBEAT_S, Subscription
from tests.fakes.feed import KEPT_S, FakeFeed, new_event
from tests.fakes.outlets import one_by_one

_FRAME = re.compile(rb"id: (\S+)\nevent: (\w+)\ndata: .*")


def ids_of(frames: Frames) -> list[Position]:
    """The ids of the events in the bytes."""
    found = [_FRAME.fullmatch(frame) for frame in frames.data.split(b"\n\n") if frame]
    places = [parse_cursor(match[1].decode()) for match in found if match]
    assert len(places) == len(found)
    return [place for place in places if place is not None]


@dataclass
class Client:
    """Somebody who takes at most `room` events at once; more has to wait for `flush`."""

    room: int = 1_000_000
    pause_s: float = 0.0
    seen: list[Position] = field(default_factory=list)
    kept: list[Position] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    offers: int = 0

    def together(self, outlets: Sequence[Self]) -> OfferEach:
        return one_by_one([outlet.offer for outlet in outlets])

    def offer(self, frames: Frames) -> bool:
        assert not self.kept, "written before what was kept had left"
        assert frames.data, "an empty chunk ends the body"
        self.offers += 1
        ids = ids_of(frames)
        self.seen += ids[: self.room]
        self.kept = ids[self.room :]
        return not self.kept

    async def follow(self, reader: Subscription[Projects]) -> None:
        """Read until it is asked to go."""
        while True:
            item = await reader.receive(self)
            match item:
                case Frames():
                    self.seen += ids_of(item)
                    await trio.sleep(self.pause_s)
                case Signal.BLOCKED:
                    await trio.sleep(self.pause_s)
                    self.seen += self.kept
                    self.kept = []
                case _:
                    self.signals.append(item)
                    if item is not Signal.HEARTBEAT:
                        return


@dataclass
class Bench:
    """A running feed over a log that tests write directly."""

    nursery: trio.Nursery
    log: FakeFeed = field(default_factory=FakeFeed)
    told: int = 0
    buffer_bytes: int = 262_144

    def __post_init__(self) -> None:
        self.feed = Feed(
            log=self.log, tell_replicas=self.tell, buffer_bytes=self.buffer_bytes, drain_s=1.0
        )

    def tell(self) -> None:
        self.told += 1

    async def put(self, project: str = "demo", status: Status = Status.QUEUED) -> Position:
        """An event that is committed and told of."""
        place = await self.log.put(new_event(status, project=project))
        self.feed.changed()
        return place

    @asynccontextmanager
    async def reader(
        self, *projects: str, after: Position | None = None
    ) -> AsyncIterator[Subscription[Projects]]:
        begin, head = await self.feed.start(after)
        with self.feed.subscribe(named(*projects), after=begin, head=head) as reader:
            yield reader

    async def join(
        self, client: Client, *projects: str, after: Position | None = None
    ) -> trio.CancelScope:
        """Let a client follow; it reads live when this returns. Cancelling the scope cuts it."""

        async def follow(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            with trio.CancelScope() as scope:
                async with self.reader(*projects, after=after) as reader:
                    task_status.started(scope)
                    await client.follow(reader)

        scope: trio.CancelScope = await self.nursery.start(follow)
        await trio.testing.wait_all_tasks_blocked()
        return scope


def named(*projects: str) -> Projects:
    return frozenset(ProjectId(project) for project in projects) if projects else None


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    """A feed whose loop runs."""
    bench = Bench(nursery)
    await nursery.start(bench.feed.run)
    return bench


async def settle() -> None:
    """Time for everything that was told of."""
    await trio.sleep(10 * PAUSE_S + 0.001)


async def test_a_feed_begins_now(bench: Bench) -> None:
    await bench.put()
    client = Client()
    await bench.join(client)
    assert client.seen == []
    place = await bench.put()
    await settle()
    assert client.seen == [place]
    assert client.offers == 1  # written by the loop


async def test_a_feed_goes_on_after_an_event(bench: Bench) -> None:
    places = [await bench.put() for _ in range(5)]
    client, everything = Client(), Client()
    await bench.join(client, after=places[1])
    await bench.join(everything, after=START)
    places.append(await bench.put())
    await settle()
    assert client.seen == places[2:]
    assert everything.seen == places


async def test_everybody_sees_the_projects_they_may_see(bench: Bench) -> None:
    clients = {names: Client() for names in ((), ("a",), ("b", "c"), ("nobody",))}
    for names, client in clients.items():
        await bench.join(client, *names)
    order = [Random(7).choice("abcd") for _ in range(200)]
    places = []
    for name in order:
        places.append(await bench.put(name))
        if Random(len(places)).random() < 0.2:
            await settle()
    await settle()
    for names, client in clients.items():
        wanted = [p for p, name in zip(places, order, strict=True) if not names or name in names]
        assert client.seen == wanted


async def test_many_watchers_cost_one_read(bench: Bench) -> None:
    clients = [Client() for _ in range(50)]
    for client in clients:
        await bench.join(client)
    await trio.sleep(2 * POLL_S)
    reads = bench.log.reads
    place = await bench.put()
    await settle()
    assert [client.seen for client in clients] == [[place]] * 50
    assert bench.log.reads == reads + 1


async def test_nobody_watches_and_nothing_is_read(bench: Bench) -> None:
    await bench.put()
    await trio.sleep(10 * POLL_S)
    assert bench.log.reads == 0
    client = Client()
    scope = await bench.join(client)
    scope.cancel()
    await trio.sleep(POLL_S)
    reads = bench.log.reads
    await bench.put()
    await trio.sleep(10 * POLL_S)
    assert bench.log.reads == reads


async def test_a_lost_wake_up_costs_one_poll(bench: Bench) -> None:
    client = Client()
    await bench.join(client)
    await trio.sleep(5 * POLL_S)
    place = await bench.log.put(new_event())
    await trio.sleep(POLL_S + PAUSE_S)
    assert client.seen == [place]


async def test_the_others_are_told(bench: Bench) -> None:
    bench.feed.wake()
    assert bench.told == 0
    bench.feed.changed()
    assert bench.told == 1


async def test_what_was_held_back_for_a_moment_comes_soon(bench: Bench) -> None:
    client = Client()
    await bench.join(client)
    async with bench.log.transaction() as slow:
        behind = await bench.put()
        await trio.sleep(0.005)
        before = await slow.put(new_event())
    await trio.sleep(0.03)
    assert client.seen == [before, behind]


async def test_a_long_transaction_is_told_of_and_not_asked_for_in_vain(bench: Bench) -> None:
    client = Client()
    await bench.join(client)
    places = []
    async with bench.log.transaction() as slow:
        for _ in range(100):
            places.append(await bench.put())
            await trio.sleep(0.1)
        assert client.seen == []
        statistics = bench.feed.statistics()
        assert 9 < statistics.held_back_s <= 10
        assert statistics.looks < 10 / HELD_MOST_S + 20
        places.insert(0, await slow.put(new_event()))
    await trio.sleep(HELD_MOST_S + 10 * PAUSE_S)
    assert client.seen == places
    assert bench.feed.statistics().held_back_s == 0


async def test_a_slow_reader_falls_back_and_misses_nothing(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, buffer_bytes=2_000)
    await nursery.start(bench.feed.run)
    slow, quick = Client(room=0, pause_s=1.0), Client()
    await bench.join(slow)
    await bench.join(quick)
    places = []
    for _ in range(200):
        places.append(await bench.put())
        await trio.sleep(0.01)
    assert quick.seen == places
    assert len(slow.seen) < len(places)
    slow.pause_s = 0.0
    await trio.sleep(5)
    assert slow.seen == places
    assert bench.feed.statistics().fell_back >= 1


async def test_a_page_full_of_others_events_is_passed_by(bench: Bench) -> None:
    """The reader asks for a silent project, and stands where it is told of nothing."""
    begin = await bench.put("silent")
    for _ in range(3_000):
        await bench.log.put(new_event(project="loud"))
    client = Client()
    await bench.join(client, "silent", after=begin)
    reads = bench.log.reads
    for _ in range(100):
        await bench.put("loud")
    place = await bench.put("silent")
    await trio.sleep(0.2)
    assert client.seen == [place]
    assert bench.log.reads < reads + 20


async def test_readers_of_one_project_at_different_places_meet(bench: Bench) -> None:
    """Each joins behind events that are not its project's, at another place of the order."""
    clients = []
    for _ in range(10):
        client = Client()
        clients.append(client)
        await bench.join(client, "a")
        await bench.put("b")
        await settle()
    reads = bench.log.reads
    places = [await bench.put("a") for _ in range(3)]
    await settle()
    assert [client.seen for client in clients] == [places] * 10
    assert bench.log.reads < reads + 20


async def test_silence_is_told_with_a_place_to_resume_from(bench: Bench) -> None:
    client = Client()
    async with bench.reader("a") as reader:
        with trio.move_on_after(HEARTBEAT_S + 2):
            await client.follow(reader)
        assert client.signals == [Signal.HEARTBEAT]
        places = [await bench.put("b") for _ in range(3)]
        with trio.move_on_after(HEARTBEAT_S + 2):
            await client.follow(reader)
        assert client.seen == []
        assert bench.feed.seen(reader) == places[-1]
        place = await bench.log.put(new_event(project="a"))
        assert bench.feed.seen(reader) < place  # not before it was given


async def test_a_place_that_is_no_longer_stored_is_refused(bench: Bench) -> None:
    places = [await bench.put() for _ in range(3)]
    bench.log.age(KEPT_S + 1)
    with pytest.raises(RdevError) as refused:
        await bench.feed.start(Position(places[0] - 1))
    assert refused.value.code is ErrorCode.GONE
    client = Client()
    await bench.join(client, after=START)
    assert client.seen == places[1:]  # after the oldest


async def test_a_database_that_is_gone_is_waited_for(bench: Bench) -> None:
    client = Client()
    await bench.join(client)
    bench.log.error = RdevError(ErrorCode.SERVICE_UNAVAILABLE, "gone")
    place = await bench.put()
    await trio.sleep(3 * POLL_S)
    bench.log.error = None
    await trio.sleep(2 * POLL_S)
    assert client.seen == [place]


async def test_readers_are_asked_to_go_at_stop(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    async with trio.open_nursery() as running:
        await running.start(bench.feed.run)
        clients = [Client() for _ in range(3)]
        for client in clients:
            await bench.join(client)
        place = await bench.put()
        await settle()
        bench.feed.stop()
        bench.feed.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert [client.signals for client in clients] == [[Signal.DISMISSED]] * 3
    assert [client.seen for client in clients] == [[place]] * 3
    late = Client()
    async with bench.reader() as reader:
        await late.follow(reader)
    assert late.signals == [Signal.DISMISSED]


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_is_cut_or_held_everybody_sees_everything_once(
    nursery: trio.Nursery, seed: int
) -> None:
    """Writers commit in any order, abort, and hold; readers are cut, resume and are slow."""
    random = Random(seed)
    bench = Bench(nursery, buffer_bytes=random.choice([500, 5_000, 262_144]))
    await nursery.start(bench.feed.run)
    committed: dict[Position, str] = {}
    interests = [(), ("a",), ("b",), ("a", "c"), ("nobody",)]
    clients = [
        Client(room=random.choice([1, 3, 1_000]), pause_s=random.choice([0, 0, 0.05]))
        for _ in range(15)
    ]

    async def write() -> None:
        for _ in range(30):
            name = random.choice("abc")
            with trio.move_on_after(random.choice([0.2, 10])):
                async with bench.log.transaction() as transaction:
                    await trio.sleep(random.choice([0, 0, 0.001, 0.01, 0.3]))
                    event = new_event(
                        project=name, command=command_id(UUID(int=random.getrandbits(99)))
                    )
                    place = await transaction.put(event)
                committed[place] = name
            if random.random() < 0.9:
                bench.feed.changed()
            await trio.sleep(random.random() * 0.05)

    async def read(client: Client, *projects: str) -> None:
        begin = START
        while True:
            with trio.move_on_after(random.random()):
                async with bench.reader(*projects, after=begin) as reader:
                    await client.follow(reader)
            client.kept = []  # what did not reach it comes again
            begin = client.seen[-1] if client.seen else START

    async with trio.open_nursery() as readers:
        for number, client in enumerate(clients):
            readers.start_soon(read, client, *interests[number % len(interests)])
        async with trio.open_nursery() as writers:
            for _ in range(12):
                writers.start_soon(write)
        for number, client in enumerate(clients):
            names = interests[number % len(interests)]
            wanted = [p for p, name in sorted(committed.items()) if not names or name in names]
            with trio.move_on_after(60):
                while len(client.seen) < len(wanted):
                    await trio.sleep(0.1)
            assert client.seen == wanted
        readers.cancel_scope.cancel()
    assert len(committed) > 200
