"""Every sentence of `ports/feed.py`, on the fake and on PostgreSQL."""

from contextlib import suppress
from dataclasses import replace
from uuid import UUID

import pytest
import trio
from psycopg.conninfo import make_conninfo

from rdev.domain.commands import Kind, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.feed import START, Detail, FeedEvent, Position, cursor_of, position_of, row_of
from rdev.domain.ids import ProjectId, command_id
from tests.fakes.feed import KEPT_S, new_event
from tests.ports.conftest import Pools, World
from tests.ports.feed_world import Aborted, FeedWorld, fake_feed, postgres_feed, writing

LIMIT = 100
DEADLINE_S = 30.0


@pytest.fixture
async def real_feed(pools: Pools) -> FeedWorld:
    """The feed on PostgreSQL."""
    return postgres_feed(pools)


@pytest.fixture(params=["fake", "postgres"])
def feed(request: pytest.FixtureRequest) -> FeedWorld:
    """A feed, once in memory and once on PostgreSQL."""
    if request.param == "fake":
        return fake_feed()
    found: FeedWorld = request.getfixturevalue("real_feed")
    return found


async def read(
    feed: FeedWorld, after: Position = START, *projects: str, limit: int = LIMIT
) -> list[FeedEvent]:
    chosen = [ProjectId(project) for project in projects] or None
    return list((await feed.log.read(after=after, limit=limit, projects=chosen)).events)


async def test_what_was_written_is_read_in_its_order(feed: FeedWorld) -> None:
    ended = new_event(
        Status.FAILED,
        command=command_id(UUID(int=7)),
        project="site",
        kind=Kind.GIT,
        attempt=2,
        detail=Detail(exit_code=3, duration_ms=12, stdout_bytes=5, reason="why"),
    )
    places = [await feed.put(new_event()), await feed.put(ended)]
    assert places == sorted(places)
    first, second = await read(feed)
    assert (first.position, first.status) == (places[0], Status.QUEUED)
    assert (second.position, second.command, second.project, second.kind) == (
        places[1],
        ended.command,
        ended.project,
        ended.kind,
    )
    assert (second.status, second.attempt, second.detail) == (Status.FAILED, 2, ended.detail)


async def test_reading_goes_on_after_a_place(feed: FeedWorld) -> None:
    places = [await feed.put(new_event()) for _ in range(5)]
    found = await read(feed, places[1], limit=2)
    assert [event.position for event in found] == places[2:4]
    assert [event.position for event in await read(feed, places[3])] == places[4:]


async def test_a_page_says_how_far_it_goes(feed: FeedWorld) -> None:
    places = [await feed.put(new_event(project=name)) for name in ("a", "b", "a", "b")]
    full = await feed.log.read(after=START, limit=2, projects=None)
    assert full.end == places[1]
    of_a = await feed.log.read(after=START, limit=LIMIT, projects=[ProjectId("a")])
    assert [event.position for event in of_a.events] == [places[0], places[2]]
    assert of_a.end == places[3]  # nothing else of `a` up to there
    assert (await feed.log.read(after=places[3], limit=9, projects=None)).end == places[3]


async def test_only_the_projects_that_were_asked_for_are_read(feed: FeedWorld) -> None:
    for name in ("a", "b", "c", "b", "a"):
        await feed.put(new_event(project=name))
    assert [event.project for event in await read(feed, START, "b", "a")] == ["a", "b", "b", "a"]
    assert [event.project for event in await read(feed, START, "b", "a", limit=3)] == [
        "a",
        "b",
        "b",
    ]
    page = await feed.log.read(after=START, limit=LIMIT, projects=[])
    assert page.events == ()


async def test_an_aborted_transaction_leaves_nothing(feed: FeedWorld) -> None:
    with suppress(Aborted):
        async with feed.transaction() as transaction:
            await transaction.put(new_event())
            raise Aborted
    place = await feed.put(new_event())
    assert [event.position for event in await read(feed)] == [place]


async def test_what_stands_behind_a_writing_transaction_is_held_back(feed: FeedWorld) -> None:
    before = await feed.put(new_event())
    async with feed.transaction() as slow:
        behind = await feed.put(new_event())
        page = await feed.log.read(after=START, limit=LIMIT, projects=None)
        assert [event.position for event in page.events] == [before]
        assert page.is_held
        assert (await feed.log.bounds()).head == before
        slowly = await slow.put(new_event())
    page = await feed.log.read(after=before, limit=LIMIT, projects=None)
    assert [event.position for event in page.events] == [slowly, behind]
    assert not page.is_held


async def test_how_long_it_is_held_back_is_told(feed: FeedWorld) -> None:
    assert await feed.log.held_back_s() == 0
    async with feed.transaction():
        assert await feed.log.held_back_s() == 0  # nothing stands behind it
        await feed.put(new_event())
        with trio.fail_after(DEADLINE_S):
            while await feed.log.held_back_s() < 0.05:
                await trio.sleep(0.01)
    assert await feed.log.held_back_s() == 0


async def test_the_bounds_of_nothing_are_before_whatever_comes(feed: FeedWorld) -> None:
    bounds = await feed.log.bounds()
    assert bounds.oldest == START
    assert await read(feed, bounds.head) == []
    place = await feed.put(new_event())
    assert [event.position for event in await read(feed, bounds.head)] == [place]
    assert (await feed.log.bounds()).head == place


async def test_what_is_no_longer_stored_is_gone(feed: FeedWorld) -> None:
    old = [await feed.put(new_event()) for _ in range(3)]
    before = Position(old[-1] - 1)
    assert [event.position for event in await read(feed, before)] == [old[-1]]
    await feed.age(KEPT_S + 60)
    await feed.put(new_event())
    bounds = await feed.log.bounds()
    assert bounds.oldest == old[0]
    with pytest.raises(RdevError) as refused:
        await feed.log.read(after=Position(old[0] - 1), limit=LIMIT, projects=None)
    assert refused.value.code is ErrorCode.GONE
    assert refused.value.details == {"oldest": cursor_of(old[0])}
    assert len(await read(feed, bounds.oldest)) == 3


async def test_a_place_that_was_never_given_is_gone(feed: FeedWorld) -> None:
    place = await feed.put(new_event())
    with pytest.raises(RdevError) as refused:
        await read(feed, position_of((place >> 63) + 1_000_000, 0))
    assert refused.value.code is ErrorCode.GONE


async def test_what_the_housekeeper_took_is_gone_and_no_more_than_that(
    real_feed: FeedWorld, real: World, pools: Pools
) -> None:
    places = [await real_feed.put(new_event()) for _ in range(8)]
    before = Position(places[0] - 1)
    async with pools.requests.connection() as connection:
        # The fifth is young, and what is filed behind it stays with it.
        await connection.execute(
            "update events set at = at - interval '8 days' where position <> %s",
            (row_of(places[4])[1],),
        )
    async with real.upkeep.store_turn() as store:
        assert store is not None
        assert await store.forget_events(older_s=KEPT_S, limit=2) == 2
        assert await store.forget_events(older_s=KEPT_S, limit=2) == 1
        assert await store.forget_events(older_s=KEPT_S, limit=2) == 0
    bounds = await real_feed.log.bounds()
    assert bounds.oldest == places[3]
    found = await read(real_feed, bounds.oldest)
    assert [event.position for event in found] == places[4:]
    for after in (before, places[2]):
        with pytest.raises(RdevError) as refused:
            await read(real_feed, after)
        assert refused.value.details == {"oldest": cursor_of(places[3])}


async def test_a_part_of_a_transaction_stands_where_the_whole_does(
    real_feed: FeedWorld, pools: Pools
) -> None:
    """A savepoint has a number of its own, above that of others who have ended meanwhile."""
    async with writing(pools.settings) as slow:
        first = await slow.put(new_event(project="a"))
        between = await real_feed.put(new_event(project="b"))
        with suppress(Aborted):
            async with slow.connection.transaction():
                await slow.put(new_event(project="never"))
                raise Aborted
        async with slow.connection.transaction():
            second = await slow.put(new_event(project="a"))
        assert await read(real_feed) == []
    places = [event.position for event in await read(real_feed)]
    assert places == [first, second, between]


async def test_a_writer_of_another_database_holds_back_and_loses_nothing(
    real_feed: FeedWorld, pools: Pools
) -> None:
    elsewhere = replace(pools.settings, dsn=make_conninfo(pools.settings.dsn, dbname="template1"))
    before = await real_feed.put(new_event())
    async with writing(elsewhere):
        behind = await real_feed.put(new_event())
        page = await real_feed.log.read(after=START, limit=LIMIT, projects=None)
        assert ([event.position for event in page.events], page.is_held) == ([before], True)
        assert await real_feed.log.held_back_s() > 0
    assert [event.position for event in await read(real_feed, before)] == [behind]
