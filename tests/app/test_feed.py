"""The feeds over the whole road: submitted on one server, seen on another, resumed on a third."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from signal import SIGTERM

import psycopg
import pytest
import trio

from tests.app.server import (
    DEADLINE_S,
    Api,
    Event,
    Server,
    metric,
    open_api,
    open_server,
    read_events,
    until_async,
)

LIFE = ["queued", "running", "succeeded"]


@pytest.fixture
def settings(migrated_dsn: str, tmp_path: Path) -> dict[str, str]:
    """Those of servers that are one service."""
    return {
        "RDEV_DATABASE_DSN": migrated_dsn,
        "RDEV_PROJECTS_DIR": str(tmp_path / "projects"),
        "RDEV_DRAIN_DELAY_S": "0",
    }


@pytest.fixture
def pair(quick_place: Path, settings: dict[str, str]) -> Iterator[tuple[Server, Server]]:
    with ExitStack() as stack:
        one = stack.enter_context(open_server(quick_place, **settings))
        two = stack.enter_context(open_server(quick_place, **settings))
        yield one, two


@pytest.fixture
def own(quick_place: Path, settings: dict[str, str]) -> Iterator[Server]:
    with open_server(quick_place, **settings) as server:
        yield server


@asynccontextmanager
async def feed(
    api: Api, path: str = "/events", *, last_id: str | None = None
) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a feed as they arrive; the first is `connected`."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    async with api.wire(path, headers) as wire:
        assert wire.status == 200, wire.status
        async with aclosing(read_events(wire)) as events:
            yield events


async def watch(server: Server, into: list[Event], path: str = "/events", key: str = "") -> None:
    """Follow a feed to its end."""
    async with open_api(server) as api:
        if key:
            api.http.headers["Authorization"] = f"Bearer {key}"
        async with feed(api, path) as events:
            async for event in events:
                into.append(event)


async def take(events: AsyncIterator[Event], wanted: int) -> list[Event]:
    """The next so many events with an id that are no `connected` or `heartbeat`."""
    found: list[Event] = []
    with trio.fail_after(DEADLINE_S):
        while len(found) < wanted:
            event = await anext(events)
            if event.name in ("status", "complete"):
                found.append(event)
    return found


def told(events: list[Event]) -> list[tuple[object, object]]:
    """What happened to which command."""
    return [
        (event.data["command_id"], event.data["status"]) for event in events if "kind" in event.data
    ]


async def test_what_happens_here_is_seen_there_once_and_in_order(
    pair: tuple[Server, Server],
) -> None:
    one, two = pair
    here: list[Event] = []
    there: list[Event] = []
    async with open_api(one) as api, trio.open_nursery() as nursery:
        await api.project()
        await api.project("site")
        nursery.start_soon(watch, one, here)
        nursery.start_soon(watch, two, there)
        await until_async(lambda: here and there, "both are connected")
        assert here[0].name == "connected"
        assert here[0].data == {"reconnecting": False}
        assert here[0].retry_ms == 2_000
        commands = [
            await api.submit("echo x; exit 0", project=name) for name in ("demo", "site") * 4
        ]
        for command in commands:
            await api.ended(command)
        for seen in (here, there):
            await until_async(lambda s=seen: len(told(s)) == 3 * len(commands), "all is told")
            for command in commands:
                assert [status for name, status in told(seen) if name == command] == LIFE
        assert [event.id for event in here[1:]] == [event.id for event in there[1:]]
        complete = next(event for event in here if event.name == "complete")
        assert complete.data | {"command_id": 0, "duration_ms": 0, "project": 0} == {
            "command_id": 0,
            "project": 0,
            "kind": "shell",
            "status": "succeeded",
            "exit_code": 0,
            "signal": None,
            "duration_ms": 0,
            "reason": None,
            "truncated": False,
            "stdout_bytes": 2,
            "stderr_bytes": 0,
        }
        nursery.cancel_scope.cancel()


async def test_a_feed_is_resumed_where_it_was_after_a_restart(own: Server) -> None:
    own.keep_port()
    async with open_api(own) as api:
        await api.project()
        async with feed(api) as events:
            first = await api.submit("exit 0")
            seen = await take(events, 2)
        await api.ended(first)
        own.kill()
        own.start()
        second = await api.submit("exit 3")
        await api.ended(second)
        async with feed(api, last_id=seen[-1].id) as events:
            connected = await anext(events)
            assert connected.data == {"reconnecting": True}
            assert connected.id == seen[-1].id
            seen += await take(events, 4)
        assert told(seen) == [
            *((first, status) for status in LIFE),
            *((second, status) for status in ("queued", "running", "failed")),
        ]
        async with feed(api, "/projects/demo/events?after=0") as events:
            assert (await anext(events)).data == {"project": "demo", "reconnecting": False}
            again = await take(events, 6)
        assert [event.id for event in again] == [event.id for event in seen]


async def test_a_long_transaction_holds_the_feed_back_and_the_metric_says_so(
    own: Server, migrated_dsn: str
) -> None:
    seen: list[Event] = []
    async with open_api(own) as api, trio.open_nursery() as nursery:
        await api.project()
        nursery.start_soon(watch, own, seen)
        await until_async(lambda: seen, "it is connected")
        with psycopg.connect(migrated_dsn) as connection:
            connection.execute("select pg_current_xact_id()")
            command = await api.submit("exit 0")
            await api.ended(command)
            await until_async(
                lambda: metric(own, "rdev_feed_held_back_s") > 0.5, "the metric says so"
            )
            assert told(seen) == []
            connection.rollback()
        await until_async(lambda: len(told(seen)) == 3, "nothing is missing")
        assert told(seen) == [(command, status) for status in LIFE]
        await until_async(lambda: metric(own, "rdev_feed_held_back_s") == 0, "it is over")
        nursery.cancel_scope.cancel()


async def test_a_key_sees_its_projects_alone(own: Server) -> None:
    async with open_api(own) as api, trio.open_nursery() as nursery:
        for name in ("demo", "site", "other"):
            await api.project(name)
        body = {"name": "two", "scopes": ["projects:read"], "project_ids": ["demo", "site"]}
        made = await api.post("/keys", body)
        key = made.json()["data"]["key"]
        mine: list[Event] = []
        demo: list[Event] = []
        nursery.start_soon(watch, own, mine, "/events", key)
        nursery.start_soon(watch, own, demo, "/projects/demo/events", key)
        await until_async(lambda: mine and demo, "both are connected")
        commands = {
            name: await api.submit("exit 0", project=name) for name in ("other", "demo", "site")
        }
        await until_async(lambda: len(told(mine)) == 6 and len(told(demo)) == 3, "all is told")
        assert {event.data["project"] for event in mine[1:]} == {"demo", "site"}
        assert told(demo) == [(commands["demo"], status) for status in LIFE]
        for path, status in {"/projects/other/events": 403, "/projects/demo/events": 200}.items():
            headers = {"Authorization": f"Bearer {key}"}
            answer = await api.http.request("HEAD", path, headers=headers)
            assert answer.status_code == status
        assert (await api.get("/projects/nowhere/events")).status_code == 404
        # It must leave when its key does.
        await api.http.delete(f"/keys/{made.json()['data']['id']}")
        await until_async(lambda: mine[-1].name == demo[-1].name == "disconnecting", "both leave")
        assert mine[-1].data == {"reason": "key_revoked"}


async def test_what_is_no_longer_stored_is_410_and_nonsense_is_400(
    own: Server, migrated_dsn: str
) -> None:
    async with open_api(own) as api:
        await api.project()
        async with feed(api) as events:
            before = (await anext(events)).id
            await api.ended(await api.submit("exit 0"))
            seen = await take(events, 3)
        with psycopg.connect(migrated_dsn, autocommit=True) as connection:
            connection.execute("update events set at = at - interval '8 days'")
        answer = await api.get("/events", params={"after": before})
        assert answer.status_code == 410
        assert answer.json()["error"]["code"] == "GONE"
        oldest = answer.json()["oldest"]
        async with feed(api, f"/events?after={oldest}") as events:
            found = await take(events, 2)
        assert [oldest, *(event.id for event in found)] == [event.id for event in seen]
        beyond = await api.get("/events", params={"after": "f" * 10 + "A" * 12})
        assert beyond.status_code == 410
        for nonsense in ("1", "abc", "-1", "Ä", seen[0].id + "=", seen[0].id[:-1]):
            answer = await api.get("/events", params={"after": nonsense})
            assert answer.status_code == 400, nonsense
            assert "id of an event of a feed" in answer.json()["detail"]


async def test_a_draining_server_says_so_and_ends_its_feeds(own: Server) -> None:
    seen: list[Event] = []
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, own, seen)
            await until_async(lambda: seen, "it is connected")
            own.signal(SIGTERM)
    assert seen[-1].name == "disconnecting"
    assert seen[-1].data == {"reason": "draining"}
    assert seen[-1].retry_ms is not None
    assert await trio.to_thread.run_sync(own.wait) == 0
    await trio.to_thread.run_sync(own.start)


async def test_feeds_are_streams_like_all_others(server: Server, api: Api) -> None:
    async with api.wire("/events", {}) as wire:
        assert wire.headers["content-type"] == "text/event-stream"
        assert wire.headers["cache-control"] == "no-store, no-transform"
        assert wire.headers["x-accel-buffering"] == "no"
        assert wire.headers["connection"] == "close"
        await until_async(
            lambda: metric(server, "rdev_sse_connections_active", project="*") == 1, "it is counted"
        )


@pytest.mark.slow
async def test_who_follows_a_project_is_told_its_last_words_and_that_it_was_deleted(
    pair: tuple[Server, Server],
) -> None:
    """Deleted on one server, followed on the other; then it is a project that is not there."""
    one, two = pair
    async with open_api(one) as api, open_api(two) as follower:
        await api.project("brief")
        seen: list[Event] = []
        with trio.fail_after(DEADLINE_S):
            async with feed(follower, "/projects/brief/events") as events:
                async for event in events:
                    seen.append(event)
                    if event.name == "connected":
                        await api.submit("sleep 60", project="brief")
                    elif event.data.get("status") == "running":
                        answer = await api.http.delete("/projects/brief?force=true")
                        assert answer.status_code == 202, answer.text
        told = [event.data.get("status") for event in seen if event.data.get("status")]
        assert told[-1] == "cancelled", told
        assert seen[-1].name == "disconnecting"
        assert seen[-1].data == {"reason": "project_deleted"}
        assert (await follower.get("/projects/brief/events")).status_code == 404
