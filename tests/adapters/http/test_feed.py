"""The feeds on real sockets, written straight to them (HTTP/1.1) and through hypercorn (1.0)."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

import pytest
import trio

from rdev.adapters.http.feed import Feeds
from rdev.adapters.http.following import Followers
from rdev.adapters.http.server import ConnectionTimes
from rdev.adapters.http.stream import stream_routes
from rdev.domain.commands import Command, Status
from rdev.domain.feed import Detail, Position, cursor_of
from rdev.domain.ids import CommandId, KeyId, ProjectId
from rdev.domain.keys import Grant, Principal, Scope
from rdev.ports.telemetry import Silence
from rdev.services import stream_reader
from rdev.services.feed import Feed
from rdev.services.key_watch import KeyWatch
from rdev.services.stream import Fanout
from tests.adapters.http.conftest import KEY, NOON, Serve, Site, Wire, check_project
from tests.fakes.feed import KEPT_S, FakeFeed, new_event
from tests.fakes.keys import FakeKeys
from tests.fakes.output import FakeOutput
from tests.fakes.store import StoreState

_ID = re.compile(rb"id: (\S+)\nevent: (?:status|complete)\n")


class Counted(Silence):
    """What was told of events that were sent, by label and type."""

    def __init__(self) -> None:
        self.sent: dict[tuple[str, str], int] = {}

    def events_sent(self, project: ProjectId, event_type: str, count: int) -> None:
        key = project, event_type
        self.sent[key] = self.sent.get(key, 0) + count


@dataclass(slots=True, kw_only=True)
class Desk:
    """A server with feeds whose record the test writes."""

    site: Site
    log: FakeFeed
    feed: Feed
    told: Counted
    version: str

    async def put(self, project: str = "demo", status: Status = Status.QUEUED) -> Position:
        place = await self.log.put(new_event(status, project=project))
        self.feed.changed()
        return place

    @asynccontextmanager
    async def follow(self, path: str = "/events", **headers: str) -> AsyncIterator[Wire]:
        """A client that has seen the head and `connected`."""
        lines = [f"GET {path} HTTP/{self.version}", "Host: test", f"X-API-Key: {KEY}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        async with self.site.connect() as wire:
            await wire.send("\r\n".join([*lines, "", ""]).encode())
            head = await wire.head()
            assert head.status == 200
            assert head.header("content-type") == "text/event-stream"
            await wire.until(b"event: connected\n")
            yield wire


@pytest.fixture(params=["1.1", "1.0"])
async def desk(request: pytest.FixtureRequest, serve: Serve, nursery: trio.Nursery) -> Desk:
    """A server whose feeds are written in one of the two ways."""
    return await _desk(serve, nursery, request.param)


async def _desk(
    serve: Serve, nursery: trio.Nursery, version: str = "1.1", **options: object
) -> Desk:
    log, told, state = FakeFeed(), Counted(), StoreState()
    feed = Feed(log=log, tell_replicas=lambda: None)
    fanout = Fanout(log=FakeOutput(state), tell_replicas=lambda _: None)
    followers = Followers(KeyWatch(store=FakeKeys(state), now=lambda: NOON).watch, told)
    feeds = Feeds(feed, followers, check_project, lambda *_: nullcontext())
    site = await serve(plain=stream_routes(_NoCommands(), fanout, feeds, followers), **options)
    await nursery.start(feed.run)
    return Desk(site=site, log=log, feed=feed, told=told, version=version)


class _NoCommands:
    """Nobody asks for a command's stream here."""

    async def get(self, command: CommandId) -> Command:
        raise AssertionError(command)

    async def oldest_seq(self, command: CommandId) -> int | None:
        raise AssertionError(command)


async def ids_until(wire: Wire, wanted: int) -> list[str]:
    """The ids of the next events, so many of them."""
    seen = wire._unread  # what came with `connected`
    while len(found := [match[1].decode() for match in _ID.finditer(seen)]) < wanted:
        seen += await wire.stream.receive_some(65_536)
    return found


async def test_events_come_with_their_ids(desk: Desk) -> None:
    async with desk.follow() as wire:
        places = [await desk.put(status=status) for status in (Status.QUEUED, Status.FAILED)]
        assert await ids_until(wire, 2) == [cursor_of(place) for place in places]
    assert desk.told.sent == {("*", "status"): 1, ("*", "complete"): 1}


async def test_a_client_resumes_behind_its_last_event(desk: Desk) -> None:
    places = [await desk.put() for _ in range(6)]
    ids = [cursor_of(place) for place in places]
    async with desk.follow(last_event_id=ids[1]) as wire:
        assert await ids_until(wire, 4) == ids[2:]
    async with desk.follow(f"/projects/demo/events?after={ids[3]}") as wire:
        assert await ids_until(wire, 2) == ids[4:]
    async with desk.follow("/events?after=0", last_event_id=ids[4]) as wire:
        assert await ids_until(wire, 1) == ids[5:]


async def test_a_client_that_reads_late_loses_nothing(desk: Desk) -> None:
    async with desk.follow() as late:
        places = []
        for _ in range(100):
            for _ in range(100):
                places.append(await desk.log.put(new_event()))
            desk.feed.changed()
            await trio.sleep(0)
        assert await ids_until(late, len(places)) == [cursor_of(place) for place in places]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_client_that_stalls_is_cut_and_disturbs_nobody(
    serve: Serve, nursery: trio.Nursery, version: str
) -> None:
    desk = await _desk(serve, nursery, version, times=ConnectionTimes(write_s=1.0))
    large = new_event(detail=Detail(reason="x" * 60_000))
    places = []
    async with desk.follow() as stalled, desk.follow() as reader:
        while desk.feed.statistics().subscriptions == 2:
            places.append(await desk.log.put(large))
            desk.feed.changed()
            assert await ids_until(reader, 1) == [cursor_of(places[-1])]
        assert desk.feed.statistics().subscriptions == 1
        # It is told nothing twice, and its body has no end that would look like one.
        rest = await stalled.closed()
        found = [match[1].decode() for match in _ID.finditer(rest)]
        assert found == [cursor_of(place) for place in places[: len(found)]]
        assert len(found) < len(places)
        assert not rest.endswith(b"0\r\n\r\n")


async def test_silence_is_broken_with_a_place_to_resume_from(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_reader, "HEARTBEAT_S", 0.05)
    async with desk.follow("/projects/demo/events") as wire:
        place = await desk.put("other")
        await wire.until(b"id: " + cursor_of(place).encode() + b"\nevent: heartbeat\n")
    place = await desk.put()
    before = cursor_of(Position(place - 1))
    async with desk.follow("/projects/demo/events", last_event_id=before) as wire:
        assert await ids_until(wire, 1) == [cursor_of(place)]


async def test_a_drain_is_told_and_ends_the_body(
    desk: Desk, eventually: Callable[[Callable[[], bool]], Awaitable[None]]
) -> None:
    async with desk.follow() as wire:
        await eventually(lambda: desk.feed.statistics().subscriptions == 1)
        desk.feed.stop()
        rest = await wire.closed()
    assert b'event: disconnecting\ndata: {"reason":"draining"}\n\n' in rest
    await eventually(lambda: desk.feed.statistics().subscriptions == 0)


async def test_what_is_refused_is_refused_before_the_head(
    serve: Serve, nursery: trio.Nursery
) -> None:
    desk = await _desk(serve, nursery)
    places = [await desk.put() for _ in range(3)]
    desk.log.age(KEPT_S + 1)
    for path, status in {
        "/events?after=7": 400,
        "/events?after=" + cursor_of(places[0])[:-1] + "~": 400,
        "/events?after=" + cursor_of(Position(places[0] - 1)): 410,
        "/events?after=" + cursor_of(Position(places[-1] << 9)): 410,
        "/projects/nowhere/events": 404,
        "/projects/No.Name/events": 404,
    }.items():
        reply = await desk.site.request("GET", path)
        assert reply.status == status, path
        if status == 410:
            assert reply.json()["oldest"] == cursor_of(places[0])
    assert desk.feed.statistics().subscriptions == 0


async def test_a_key_of_some_projects_sees_these_alone(serve: Serve, nursery: trio.Nursery) -> None:
    grant = Grant(
        scopes=frozenset({Scope.ADMIN}), project_ids=frozenset({ProjectId("a"), ProjectId("b")})
    )

    async def of_two(credential: str | None, client_ip: str) -> Principal:
        return Principal(key_id=KeyId("key_1"), name="two projects", grant=grant)

    desk = await _desk(serve, nursery, authenticate=of_two)
    async with desk.follow() as wire:
        places = [await desk.put(name) for name in "abcab"]
        wanted = [cursor_of(place) for place in (*places[:2], *places[3:])]
        assert await ids_until(wire, 4) == wanted


async def test_watchers_of_one_project_are_counted_under_it(
    serve: Serve, nursery: trio.Nursery
) -> None:
    """Whichever way they came: the hub counts for both of them at once."""
    grant = Grant(scopes=frozenset({Scope.ADMIN}), project_ids=frozenset({ProjectId("demo")}))

    async def of_one(credential: str | None, client_ip: str) -> Principal:
        return Principal(key_id=KeyId("key_1"), name="one project", grant=grant)

    desk = await _desk(serve, nursery, authenticate=of_one)
    async with desk.follow("/projects/demo/events") as one, desk.follow() as other:
        place = await desk.put()
        for wire in (one, other):
            assert await ids_until(wire, 1) == [cursor_of(place)]
    assert desk.told.sent == {("demo", "status"): 2}
