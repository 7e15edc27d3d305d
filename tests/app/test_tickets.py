"""Sessions and stream tokens over HTTP, against real servers."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from http.cookies import SimpleCookie
from pathlib import Path

import httpx2
import psycopg
import pytest
import trio

from rdev.domain.ids import CommandId
from rdev.domain.keys import ADMIN
from rdev.domain.tickets import AFTER_END_S, Seals, Ticket
from rdev.services.cached import TTL_S
from tests.adapters.postgres.proxy import TcpProxy
from tests.app.server import (
    DEADLINE_S,
    Api,
    Event,
    Json,
    Server,
    Wire,
    metric,
    open_api,
    open_server,
    read_events,
)
from tests.app.test_revocation import SLACK_S, DeafProxy, started

SECRET = b"sealed for both, 32 bytes or more"
SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture(scope="module")
def server(quick_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("secret") / "secret"
    file.write_bytes(SECRET)
    settings = {"RDEV_SECRET_FILE": str(file), "RDEV_RATE_LIMIT_FAILURES": "off"}
    with open_server(quick_place, **settings) as server:
        yield server


@asynccontextmanager
async def browser(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that has no key but keeps cookies."""
    async with httpx2.AsyncClient(
        base_url=server.url, timeout=2 * DEADLINE_S, trust_env=False
    ) as http:
        yield http


@pytest.fixture
async def page(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    async with browser(server) as http:
        yield http


async def make_key(api: Api, **fields: object) -> Json:
    scopes = ["projects:read", "projects:execute"]
    made = await api.post("/keys", {"name": "k", "scopes": scopes, **fields})
    assert made.status_code == 201, made.text
    data: Json = made.json()["data"]
    return data


async def log_in(page: httpx2.AsyncClient, key: object) -> httpx2.Response:
    opened = await page.post("/session", headers={"X-API-Key": str(key)})
    assert opened.status_code == 201, opened.text
    return opened


def code_of(answer: httpx2.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"] if answer.content else None


def cookie_of(answer: httpx2.Response) -> tuple[str, Mapping[str, str]]:
    """Name and attributes of the one cookie that was set."""
    (found,) = SimpleCookie(answer.headers["Set-Cookie"]).items()
    return found[0], {name: str(value) for name, value in found[1].items() if value}


# ----------------------------------------------------------------------------- sessions


async def test_a_key_opens_a_session_that_reads(api: Api, page: httpx2.AsyncClient) -> None:
    key = await make_key(api)
    opened = await log_in(page, key["key"])
    name, attributes = cookie_of(opened)
    assert name == "rdev_session"
    assert attributes == {"max-age": "43200", "path": "/", "httponly": "True", "samesite": "Strict"}
    assert opened.headers["Cache-Control"] == "no-store"
    data = opened.json()["data"]
    assert data.keys() == {"key_id", "expires_at"}
    assert data["key_id"] == key["id"]
    ends_in = datetime.fromisoformat(data["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=11.9) < ends_in <= timedelta(hours=12)
    listed = await page.get("/projects")
    assert listed.status_code == 200
    assert listed.headers["Cache-Control"] == "no-store"


async def test_a_session_ends_no_later_than_its_key(api: Api, page: httpx2.AsyncClient) -> None:
    opened = await log_in(page, (await make_key(api, expires_in=600))["key"])
    assert int(cookie_of(opened)[1]["max-age"]) <= 600


async def test_the_administrator_has_sessions_too(server: Server, page: httpx2.AsyncClient) -> None:
    await log_in(page, server.key)
    assert (await page.get("/keys")).status_code == 200


async def test_closing_it_takes_the_cookie_away(api: Api, page: httpx2.AsyncClient) -> None:
    await log_in(page, (await make_key(api))["key"])
    closed = await page.delete("/session", headers=SAME)
    assert (closed.status_code, closed.content) == (204, b"")
    assert not page.cookies
    assert code_of(await page.get("/projects")) == (401, "UNAUTHORIZED")


async def test_without_a_key_there_is_no_session(api: Api, page: httpx2.AsyncClient) -> None:
    assert code_of(await page.post("/session")) == (401, "UNAUTHORIZED")
    await log_in(page, (await make_key(api))["key"])
    # A session that opens the next one would never end.
    again = await page.post("/session", headers=SAME)
    assert code_of(again) == (403, "FORBIDDEN")
    assert "Set-Cookie" not in again.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        (SAME, 201),
        ({"Origin": "{url}"}, 201),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "{url}"}, 403),
    ],
)
async def test_a_write_by_cookie_needs_proof_of_its_page(
    api: Api,
    server: Server,
    page: httpx2.AsyncClient,
    headers: Mapping[str, str],
    status: int,
) -> None:
    await log_in(page, (await make_key(api))["key"])
    told = {name: value.format(url=server.url) for name, value in headers.items()}
    answer = await page.post("/projects/demo/shell", json={"command": "true"}, headers=told)
    assert answer.status_code == status
    if status == 403:
        assert "Sec-Fetch-Site" in answer.json()["error"]["message"]


async def test_a_key_in_a_header_goes_before_a_cookie(api: Api, page: httpx2.AsyncClient) -> None:
    await log_in(page, (await make_key(api))["key"])
    assert (await page.get("/keys")).status_code == 403  # the session's key has no such scope
    admin = {"Authorization": api.http.headers["Authorization"]}
    assert (await page.get("/keys", headers=admin)).status_code == 200
    # With a key no proof of a page is asked for.
    made = await page.post("/projects/demo/shell", json={"command": "true"}, headers=admin)
    assert made.status_code == 201
    wrong = {"X-API-Key": "wrong"}
    assert code_of(await page.get("/projects", headers=wrong)) == (401, "UNAUTHORIZED")
    # What a proxy's own login adds is no key.
    basic = {"Authorization": "Basic dTpw"}
    assert (await page.get("/projects", headers=basic)).status_code == 200


async def test_a_session_that_is_good_no_more_is_taken_away(
    api: Api, page: httpx2.AsyncClient
) -> None:
    key = await make_key(api)
    await log_in(page, key["key"])
    await api.http.delete(f"/keys/{key['id']}")
    refused = await page.get("/projects")
    assert code_of(refused) == (401, "KEY_REVOKED")
    assert cookie_of(refused)[0] == "rdev_session"
    assert not page.cookies
    page.cookies.set("rdev_session", "rdev_session_forged")
    assert code_of(await page.get("/projects")) == (401, "UNAUTHORIZED")


async def test_a_key_is_asked_for_its_rights_at_each_request(
    api: Api, page: httpx2.AsyncClient
) -> None:
    await api.project("other")
    key = await make_key(api, scopes=["projects:read"], project_ids=["demo"])
    await log_in(page, key["key"])
    assert (await page.get("/projects/demo")).status_code == 200
    assert code_of(await page.get("/projects/other")) == (403, "FORBIDDEN")
    body = {"command": "true"}
    started = await page.post("/projects/demo/shell", json=body, headers=SAME)
    assert code_of(started) == (403, "FORBIDDEN")
    assert "RateLimit" in started.headers


# ----------------------------------------------------------------------------- stream tokens


async def make_token(api: Api, stream: str, **headers: str) -> Json:
    made = await api.post("/stream-tokens", {"stream_id": stream}, headers=headers)
    assert made.status_code == 201, made.text
    assert made.headers["Cache-Control"] == "no-store"
    data: Json = made.json()["data"]
    return data


def bearer(key: Json) -> str:
    return f"Bearer {key['key']}"


@asynccontextmanager
async def wire(server: Server, target: str, **headers: str) -> AsyncIterator[Wire]:
    """A GET without a key."""
    url = httpx2.URL(server.url)
    assert url.port is not None
    async with await trio.open_tcp_stream(url.host, url.port) as socket:
        opened = Wire(socket)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await opened.request(target, {"Host": f"{url.host}:{url.port}", **named})
        yield opened


async def follow(server: Server, target: str, **headers: str) -> list[Event]:
    with trio.fail_after(DEADLINE_S):
        async with wire(server, target, **headers) as stream:
            assert stream.status == 200, stream.headers
            return [event async for event in read_events(stream)]


async def test_a_token_opens_its_stream(api: Api, server: Server, tmp_path: Path) -> None:
    command = await api.submit(f"echo one; until [ -e {tmp_path}/go ]; do sleep 0.02; done")
    token = await make_token(api, command)
    assert token.keys() == {"token", "stream_id", "url", "expires_at"}
    assert token["stream_id"] == command
    assert token["url"] == f"/commands/{command}/events?token={token['token']}"
    ends_in = datetime.fromisoformat(str(token["expires_at"])) - datetime.now(UTC)
    assert timedelta(hours=23.9) < ends_in <= timedelta(hours=24)
    (tmp_path / "go").touch()
    events = await follow(server, str(token["url"]))
    assert (events[0].name, events[-1].name) == ("connected", "complete")
    query = f"stream_id={command}&token={token['token']}"
    assert await follow(server, f"/projects/demo/events?{query}") != []


async def test_a_stream_that_was_cut_is_read_to_its_end_after_the_commands(
    api: Api, server: Server
) -> None:
    """The token outlives the command by some minutes: nothing is lost to whoever was away."""
    command = await api.submit("echo one; echo two")
    token = await make_token(api, command)
    whole = await follow(server, str(token["url"]))
    await api.ended(command)
    last = whole[-1].seq
    assert last is not None
    for seen in range(1, last):
        rest = await follow(server, str(token["url"]), Last_Event_ID=str(seen))
        assert rest[1:] == whole[1 + seen :]
    async with wire(server, str(token["url"]), Last_Event_ID=str(last)) as ended:
        assert ended.status == 204


@pytest.mark.slow
async def test_long_after_the_end_a_token_is_good_for_204_alone(
    quick_place: Path, migrated_dsn: str
) -> None:
    """Else an EventSource that slept over the end would come back for ever."""
    settings = {"RDEV_DATABASE_DSN": migrated_dsn, "RDEV_DRAIN_DELAY_S": "0"}
    with open_server(quick_place, **settings) as server:
        async with open_api(server) as api, browser(server) as page:
            await api.project()
            command = await api.submit("echo one")
            await api.ended(command)
            last = (await api.events(command))[-1].seq
            seals = Seals((server.state_dir / "secret").read_text().strip().encode())
            long_ago = timedelta(seconds=AFTER_END_S + 60)
            ticket = Ticket(
                key_id=ADMIN.key_id,
                public_id=seals.mark_of(server.key),
                ends_at=datetime.now(UTC) + timedelta(hours=24) - long_ago,
                stream=CommandId(command),
            )
            path = f"/commands/{command}/events?token={seals.written(ticket)}"
            end = {"Last-Event-ID": str(last)}

            async def statuses() -> tuple[int, int]:
                fresh, at_end = await page.get(path), await page.get(path, headers=end)
                return fresh.status_code, at_end.status_code

            assert await statuses() == (200, 204)
            with psycopg.connect(migrated_dsn) as connection:
                connection.execute("update commands set finished_at = finished_at - %s", [long_ago])
            with trio.fail_after(DEADLINE_S):
                while await statuses() != (401, 204):  # what a server knows of it is a second old
                    await trio.sleep(0.1)


async def test_a_token_is_good_for_nothing_else(
    api: Api, server: Server, page: httpx2.AsyncClient
) -> None:
    one, two = [await api.submit("true") for _ in range(2)]
    token = (await make_token(api, one))["token"]
    for path in (
        f"/commands/{two}/events?token={token}",
        f"/projects/demo/events?stream_id={two}&token={token}",
        f"/projects/demo/events?token={token}",
    ):
        assert code_of(await page.get(path)) == (403, "FORBIDDEN")
    for path in (f"/commands/{one}", f"/commands/{one}/output", "/projects", "/queue", "/keys"):
        refused = await page.get(path, params={"token": str(token)})
        assert code_of(refused) == (401, "UNAUTHORIZED")
    as_header = await page.get(f"/commands/{one}/events", headers={"X-API-Key": str(token)})
    assert code_of(as_header) == (401, "UNAUTHORIZED")
    page.cookies.set("rdev_session", str(token))
    assert code_of(await page.get(f"/commands/{one}")) == (401, "UNAUTHORIZED")


async def test_a_session_is_no_token_and_a_wrong_token_is_no_session(
    api: Api, page: httpx2.AsyncClient
) -> None:
    command = await api.submit("true")
    await api.ended(command)
    key = await make_key(api)
    await log_in(page, key["key"])
    path = f"/commands/{command}/events"
    assert (await page.get(path)).status_code == 200
    session = page.cookies["rdev_session"]
    for wrong in (session, "x", ""):
        # The page said what it comes with: the cookie is not asked.
        answer = await page.get(path, params={"token": wrong})
        assert answer.status_code == (401 if wrong else 200)


async def test_a_token_of_another_project_is_not_made(api: Api) -> None:
    await api.project("other")
    command = await api.submit("true", project="other")
    key = await make_key(api, project_ids=["demo"])
    for stream in (command, "cmd_" + "0" * 32, "nothing"):
        refused = await api.post(
            "/stream-tokens", {"stream_id": stream}, headers={"Authorization": bearer(key)}
        )
        assert code_of(refused) == (404, "NOT_FOUND")
    faulty = await api.post("/stream-tokens", {"stream": command})
    pointers = {fault["pointer"] for fault in faulty.json()["error"]["details"]}
    assert (faulty.status_code, pointers) == (400, {"/stream_id", "/stream"})
    weak = await make_key(api, scopes=["keys:read"])
    refused = await api.post(
        "/stream-tokens", {"stream_id": command}, headers={"Authorization": bearer(weak)}
    )
    assert code_of(refused) == (403, "FORBIDDEN")


async def test_a_page_with_a_session_gets_tokens(api: Api, page: httpx2.AsyncClient) -> None:
    command = await api.submit("true")
    await log_in(page, (await make_key(api))["key"])
    body = {"stream_id": command}
    assert (await page.post("/stream-tokens", json=body)).status_code == 403
    made = await page.post("/stream-tokens", json=body, headers=SAME)
    assert made.status_code == 201
    page.cookies.clear()
    assert (await page.get(made.json()["data"]["url"])).status_code == 200


@pytest.mark.parametrize("by_token", [True, False])
async def test_a_revocation_ends_the_streams_that_tickets_opened(
    api: Api, server: Server, page: httpx2.AsyncClient, by_token: bool
) -> None:
    key = await make_key(api)
    command = await api.submit("echo up; exec sleep 600")
    headers: dict[str, str] = {}
    target = f"/commands/{command}/events"
    if by_token:
        target = str((await make_token(api, command, Authorization=bearer(key)))["url"])
    else:
        await log_in(page, key["key"])
        headers = {"Cookie": f"rdev_session={page.cookies['rdev_session']}"}
    heard: list[Event] = []
    with trio.fail_after(DEADLINE_S):
        async with wire(server, target, **headers) as stream:
            assert stream.status == 200
            async for event in read_events(stream):
                if event.name == "output":
                    assert (await api.http.delete(f"/keys/{key['id']}")).status_code == 200
                heard.append(event)
    assert (heard[-1].name, heard[-1].data) == ("disconnecting", {"reason": "key_revoked"})
    async with wire(server, target, **headers) as again:
        assert again.status == 401
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_a_stream_ends_with_its_token(api: Api, server: Server) -> None:
    command = await api.submit("echo up; exec sleep 600")
    seals = Seals(SECRET)
    ticket = Ticket(
        key_id=ADMIN.key_id,
        public_id=seals.mark_of(server.key),
        ends_at=datetime.now(UTC) + timedelta(seconds=3),
        stream=CommandId(command),
    )
    target = f"/commands/{command}/events?token={seals.written(ticket)}"
    heard = await follow(server, target)
    assert (heard[-1].name, heard[-1].data) == ("disconnecting", {"reason": "key_expired"})
    async with wire(server, target) as again:
        assert again.status == 401
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


# ----------------------------------------------------------------------------- all of it


async def test_tickets_are_in_no_log_and_no_answer(
    api: Api, server: Server, page: httpx2.AsyncClient
) -> None:
    command = await api.submit("true")
    await api.ended(command)
    key = await make_key(api)
    token = str((await make_token(api, command, Authorization=bearer(key)))["token"])
    await log_in(page, key["key"])
    session = page.cookies["rdev_session"]
    answers = [
        await page.get(f"/commands/{command}/events?token={token}"),
        await page.get(f"/commands/{command}/events?token={token}x"),
        await page.get(f"/commands/{command}?token={token}"),
        await page.get(f"/nowhere?token={token}"),
        await page.post("/projects/demo/shell", json={}, headers=SAME),
    ]
    shown = server.log + "".join(answer.text + str(answer.headers) for answer in answers)
    for ticket in (token, session):
        assert ticket not in shown
        assert ticket.rpartition(".")[2] not in shown


async def test_a_wrong_ticket_counts_as_a_wrong_key(quick_place: Path) -> None:
    with open_server(quick_place, RDEV_RATE_LIMIT_FAILURES="6/60s") as server:
        async with browser(server) as page:
            path = "/commands/cmd_" + "0" * 32 + "/events"
            for n in range(3):
                assert (await page.get(f"{path}?token=wrong{n}")).status_code == 401
            for n in range(3):
                headers = {"Cookie": f"rdev_session=wrong{n}"}
                assert (await page.get("/projects", headers=headers)).status_code == 401
            assert (await page.get("/projects")).status_code == 429
        assert metric(server, "rdev_auth_failures_total", reason="invalid") == 6


@pytest.fixture
def pair(quick_place: Path, migrated_dsn: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """Two servers with one secret."""
    (tmp_path / "secret").write_bytes(SECRET)
    settings = {
        "RDEV_DATABASE_DSN": migrated_dsn,
        "RDEV_PROJECTS_DIR": str(tmp_path / "projects"),
        "RDEV_SECRET_FILE": str(tmp_path / "secret"),
        "RDEV_DRAIN_DELAY_S": "0",
    }
    with ExitStack() as stack:
        one = stack.enter_context(open_server(quick_place, **settings))
        yield one, stack.enter_context(open_server(quick_place, **settings))


@pytest.mark.slow
async def test_tickets_are_good_on_all_servers_with_the_same_secret(
    pair: tuple[Server, Server], quick_place: Path, tmp_path: Path
) -> None:
    one, two = pair
    async with open_api(one) as api, browser(one) as page:
        await api.project()
        key = await make_key(api)
        await log_in(page, key["key"])
        command = await api.submit("echo one")
        await api.ended(command)
        token = await make_token(api, command)
        cookie = {"Cookie": f"rdev_session={page.cookies['rdev_session']}"}
    settings = {**two.settings, "RDEV_SECRET_FILE": ""}
    with open_server(quick_place, **settings) as stranger:
        for server, status in ((two, 200), (stranger, 401)):
            async with browser(server) as page:
                assert (await page.get("/projects", headers=cookie)).status_code == status
                # The bootstrap key of each of these servers is its own, so is its mark.
                assert (await page.get(str(token["url"]))).status_code == 401
        assert "RDEV_SECRET_FILE is not set" in stranger.log
        assert "RDEV_SECRET_FILE is not set" not in two.log


@pytest.mark.slow
async def test_a_revocation_that_nobody_hears_ends_tickets_within_5_s(
    quick_place: Path, migrated_dsn: str, tmp_path: Path, nursery: trio.Nursery
) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    shared = {"RDEV_SECRET_FILE": str(tmp_path / "secret")}
    proxy = DeafProxy(migrated_dsn)
    assert isinstance(proxy, TcpProxy)
    await nursery.start(proxy.run)
    async with (
        started(quick_place, RDEV_DATABASE_DSN=migrated_dsn, **shared) as first,
        started(quick_place, RDEV_DATABASE_DSN=proxy.dsn, **shared) as second,
        open_api(first) as one,
        browser(first) as login,
        browser(second) as page,
    ):
        await one.project()
        key = await make_key(one)
        await log_in(login, key["key"])
        cookie = {"Cookie": f"rdev_session={login.cookies['rdev_session']}"}
        command = await one.submit("true")
        token = await make_token(one, command, Authorization=bearer(key))

        async def statuses() -> tuple[int, int]:
            by_cookie = await page.get("/projects", headers=cookie)
            head = await page.head(str(token["url"]))
            return by_cookie.status_code, head.status_code

        assert await statuses() == (200, 200)
        proxy.is_deaf = True
        assert (await one.http.delete(f"/keys/{key['id']}")).status_code == 200
        began_s = trio.current_time()
        with trio.fail_after(DEADLINE_S):
            while await statuses() != (401, 401):
                await trio.sleep(0.05)
        assert trio.current_time() - began_s <= TTL_S + SLACK_S
        assert proxy.swallowed > 0
    nursery.cancel_scope.cancel()
