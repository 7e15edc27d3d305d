"""What every route does alike, asked of every route that is described."""

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rdev.adapters.http.access import ACCESS, Route
from rdev.adapters.http.openapi import DESCRIBED
from tests.app.server import Api, Server, open_api
from tests.contract.run import recording_server

NOWHERE = {
    "project": "nowhere",
    **{
        name: prefix + "0" * 32
        for name, prefix in {
            "command": "cmd_",
            "key": "key_",
            "webhook": "whk_",
            "delivery": "dlv_",
        }.items()
    },
}
MADE_ID = re.compile(r"req-[0-9a-f]{32}")
PAGES = [
    route
    for route, each in DESCRIBED.items()
    if any(answer.is_page for answer in each.answers.values())
]
KEPT = [route for route, each in DESCRIBED.items() if each.is_idempotent]


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """Nothing that is sent here is run."""
    with recording_server(quick_place) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    async with open_api(server) as api:
        await api.project()
        yield api


def nowhere(route: Route) -> str:
    """The route's path about things that are not there."""
    return route[1].format(**NOWHERE)


def check_problem(answer, *, code: str | None = None) -> None:
    """RFC 9457 and the original envelope, with the ids of the exchange."""
    assert answer.headers["Content-Type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code
    assert body["error"]["message"] == body["detail"]
    assert {"type", "title", "instance", "meta"} <= body.keys()
    assert body["meta"]["request_id"] == answer.headers["X-Request-Id"]
    if code is not None:
        assert body["error"]["code"] == code


@pytest.mark.parametrize("route", ACCESS, ids=" ".join)
async def test_without_a_key_it_is_a_problem_with_a_challenge(api: Api, route: Route) -> None:
    request = api.http.build_request(route[0], nowhere(route))
    del request.headers["Authorization"]
    answer = await api.http.send(request)
    assert answer.status_code == 401
    check_problem(answer, code="UNAUTHORIZED")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert MADE_ID.fullmatch(answer.headers["X-Request-Id"])


@pytest.mark.parametrize("route", DESCRIBED, ids=" ".join)
async def test_the_clients_request_id_is_echoed_and_the_rate_limits_told(
    api: Api, route: Route
) -> None:
    if route == ("GET", "/events"):
        pytest.skip("an endless stream: tests/app/test_feed.py")
    answer = await api.http.request(
        route[0], nowhere(route), headers={"X-Request-Id": "mine-1.2_3"}
    )
    assert answer.headers["X-Request-Id"] == "mine-1.2_3"
    assert answer.status_code < 500
    if answer.status_code >= 400:
        check_problem(answer)
    assert str(answer.status_code) in {
        *map(str, DESCRIBED[route].answers),
        *("400", "401", "403", "404", "409", "415"),
    }


@pytest.mark.parametrize("path", sorted({path for _, path in DESCRIBED}))
async def test_a_wrong_method_is_a_problem_that_names_the_right_ones(api: Api, path: str) -> None:
    answer = await api.http.request("PUT", path.format(**NOWHERE))
    assert answer.status_code == 405
    check_problem(answer)
    taken = {method for method, other in DESCRIBED if other == path}
    assert taken <= set(answer.headers["Allow"].split(", "))


@pytest.mark.parametrize("route", PAGES, ids=" ".join)
async def test_a_list_comes_in_pages_of_the_size_asked_for(api: Api, route: Route) -> None:
    path = route[1].replace("{project}", "demo")
    if "{webhook}" in path:
        made = await api.post("/webhooks", DESCRIBED["POST", "/webhooks"].example)
        path = path.replace("{webhook}", made.json()["data"]["id"])
    for n in range(3):
        await api.project(f"page-{n}")
        await api.post("/keys", {"name": "k", "scopes": ["projects:read"]})
        await api.submit("true")
        if "/deliveries" in path:
            await api.post(path.replace("/deliveries", "/test"), {})
    for wrong in ("0", "201", "-1", "x", "1.5", "9" * 30):
        refused = await api.get(path, params={"limit": wrong})
        assert refused.status_code == 400
        check_problem(refused, code="BAD_REQUEST")
    refused = await api.get(path, params={"cursor": "no cursor"})
    assert refused.status_code == 400
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(500):
        more = {} if cursor is None else {"cursor": cursor}
        page = (await api.get(path, params={"limit": "2", **more})).json()
        assert len(page["data"]) <= 2
        seen += [str(item.get("id", item.get("seq"))) for item in page["data"]]
        cursor = page["meta"].get("next_cursor")
        if cursor is None:
            break
    assert cursor is None
    assert len(seen) == len(set(seen))
    if path.startswith(("/projects", "/keys")) or "/deliveries" in path:  # what was made above
        assert len(seen) >= 3


@pytest.mark.parametrize("route", KEPT, ids=" ".join)
async def test_a_repeat_with_the_same_key_is_the_same_thing(api: Api, route: Route) -> None:
    path = route[1].replace("{project}", "demo")
    if "{key}" in path:
        made = await api.post("/keys", {"name": "k", "scopes": ["projects:read"]})
        path = path.replace("{key}", made.json()["data"]["id"])
    if "{webhook}" in path:
        made = await api.post("/webhooks", DESCRIBED["POST", "/webhooks"].example)
        path = path.replace("{webhook}", made.json()["data"]["id"])
    body = dict(DESCRIBED[route].example or {})
    body |= {"id": "not-there-yet"} if path == "/projects" else {}
    headers = {"Idempotency-Key": f"key of {path}"}
    first = await api.post(path, body, headers=headers)
    again = await api.post(path, body, headers=headers)
    status, made_id = (202, "delivery_id") if path.endswith("/test") else (201, "id")
    assert (first.status_code, again.status_code) == (status, status)
    assert again.json()["data"][made_id] == first.json()["data"][made_id]
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json()["data"].get("key") is None
    other = {**body, **({"name": "other"} if path == "/keys" else {})}
    other |= {"grace_s": 1} if "/rotate" in path else {}
    other |= {"description": "other"} if path == "/webhooks" else {}
    other |= {"id": "other"} if path == "/projects" else {}
    other |= {"timeout_s": 7} if path.startswith("/projects/") else {}
    if path.endswith("/test"):  # whose body holds nothing: another request has another path
        made = await api.post("/webhooks", DESCRIBED["POST", "/webhooks"].example)
        path = f"/webhooks/{made.json()['data']['id']}/test"
    refused = await api.post(path, other, headers=headers)
    assert refused.status_code == 422
    check_problem(refused, code="IDEMPOTENCY_MISMATCH")


@pytest.mark.parametrize(
    "route", [route for route, each in DESCRIBED.items() if each.is_idempotent], ids=" ".join
)
async def test_a_key_that_is_none_is_refused(api: Api, route: Route) -> None:
    path = route[1].format(**{**NOWHERE, "project": "demo"})
    body = DESCRIBED[route].example
    for wrong in ("", "x" * 256, "é"):
        headers = {"Idempotency-Key": wrong.encode()}
        refused = await api.post(path, body, headers=headers)
        assert refused.status_code == 400, wrong
        check_problem(refused, code="BAD_REQUEST")
