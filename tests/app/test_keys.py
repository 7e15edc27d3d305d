"""API keys over HTTP, against a real server."""

import re

import httpx2
import pytest
import trio

from tests.app.server import (
    DEADLINE_S,
    POLL_S,
    Api,
    Event,
    Json,
    Server,
    metric,
    read_events,
    until_async,
)

FORM = re.compile(r"rdev_sk_[0-9A-Za-z]{8}_[0-9A-Za-z]{49}")


async def make(api: Api, **fields: object) -> Json:
    made = await api.post("/keys", {"name": "ci", "scopes": ["projects:read"], **fields})
    assert made.status_code == 201, made.text
    return made.json()["data"]


async def status_with(api: Api, key: object, path: str = "/projects") -> tuple[int, str | None]:
    answer = await api.http.get(path, headers={"Authorization": f"Bearer {key}"})
    code = None if answer.status_code < 400 else answer.json()["error"]["code"]
    return answer.status_code, code


async def test_a_key_is_shown_once_and_is_good(api: Api) -> None:
    made = await api.post("/keys", {"name": "ci", "scopes": ["projects:read"]})
    data = made.json()["data"]
    assert made.headers["Location"] == f"/keys/{data['id']}"
    assert FORM.fullmatch(data["key"])
    assert data["key"].startswith(data["key_prefix"])
    assert re.fullmatch(r"key_[0-9a-f]{32}", data["id"])
    assert (data["name"], data["status"], data["scopes"]) == ("ci", "active", ["projects:read"])
    assert (data["project_ids"], data["allowed_ips"], data["rate_limit"]) == (None, [], None)
    assert (data["created_by"], data["revoked_at"]) == ("key_admin", None)
    shown = (await api.get(f"/keys/{data['id']}")).json()["data"]
    assert "key" not in shown
    assert shown == {name: value for name, value in data.items() if name != "key"}
    assert await status_with(api, data["key"]) == (200, None)
    both = await api.http.get("/projects", headers={"X-API-Key": data["key"]})
    assert both.status_code == 200


async def test_the_text_is_in_no_list_and_no_log(api: Api, server: Server) -> None:
    made = await make(api)
    await status_with(api, made["key"])
    await status_with(api, f"{made['key']}x")
    assert str(made["key"]) not in (await api.get("/keys?limit=200")).text
    assert str(made["key"])[17:] not in server.log


async def test_a_typo_and_an_unknown_key_are_refused_alike(api: Api) -> None:
    made = await make(api)
    typo = str(made["key"])[:-1] + ("0" if not str(made["key"]).endswith("0") else "1")
    for text in (typo, "rdev_sk_nothing", "-"):
        assert await status_with(api, text) == (401, "UNAUTHORIZED")
    answer = await api.http.get("/projects", headers={"Authorization": f"Bearer {typo}"})
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_revoked_key_is_refused_as_such_and_stays_visible(api: Api) -> None:
    made = await make(api)
    assert await status_with(api, made["key"]) == (200, None)
    first = await api.http.delete(f"/keys/{made['id']}")
    assert first.status_code == 200
    assert first.json()["data"]["status"] == "revoked"
    again = await api.http.delete(f"/keys/{made['id']}")
    for answer in (first, again):
        assert answer.json()["data"]["revoked_at"] == first.json()["data"]["revoked_at"]
    assert await status_with(api, made["key"]) == (401, "KEY_REVOKED")
    shown = (await api.get(f"/keys/{made['id']}")).json()["data"]
    assert shown["revoked_at"] == first.json()["data"]["revoked_at"]


async def test_an_expired_key_is_refused_as_such(api: Api) -> None:
    made = await make(api, expires_in=1)
    with trio.fail_after(DEADLINE_S):
        while await status_with(api, made["key"]) == (200, None):
            await trio.sleep(0.05)
    assert await status_with(api, made["key"]) == (401, "KEY_EXPIRED")
    assert (await api.get(f"/keys/{made['id']}")).json()["data"]["status"] == "expired"


async def test_a_rotation_gives_another_secret_under_the_same_id(api: Api) -> None:
    made = await make(api)
    turned = await api.post(f"/keys/{made['id']}/rotate", {})
    assert turned.status_code == 201
    fresh = turned.json()["data"]
    assert (fresh["id"], fresh["name"]) == (made["id"], made["name"])
    assert fresh["key"] != made["key"]
    for key in (made["key"], fresh["key"]):
        assert await status_with(api, key) == (200, None)
    bare = await api.http.post(f"/keys/{made['id']}/rotate")
    assert bare.status_code == 201
    last = (await api.post(f"/keys/{made['id']}/rotate", {"grace_s": 0})).json()["data"]
    for key in (made["key"], fresh["key"], bare.json()["data"]["key"]):
        assert await status_with(api, key) == (401, "KEY_REVOKED")
    assert await status_with(api, last["key"]) == (200, None)


async def test_a_replay_is_the_same_key_without_its_text(api: Api) -> None:
    headers = {"Idempotency-Key": "make it once"}
    body = {"name": "once", "scopes": ["projects:read"]}
    first = await api.post("/keys", body, headers=headers)
    again = await api.post("/keys", body, headers=headers)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert again.json()["data"] == first.json()["data"] | {"key": None}
    other = await api.post("/keys", {**body, "name": "other"}, headers=headers)
    assert other.status_code == 422
    turned = {"Idempotency-Key": "turn it once"}
    path = f"/keys/{first.json()['data']['id']}/rotate"
    fresh = await api.post(path, {"grace_s": 0}, headers=turned)
    replay = await api.post(path, {"grace_s": 0}, headers=turned)
    assert replay.json()["data"]["key"] is None
    assert await status_with(api, fresh.json()["data"]["key"]) == (200, None)


async def test_keys_come_in_pages_newest_first(api: Api) -> None:
    made = [(await make(api))["id"] for _ in range(5)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        parameters = {"limit": "2"} | ({} if cursor is None else {"cursor": cursor})
        page = (await api.get("/keys", params=parameters)).json()
        assert len(page["data"]) <= 2
        seen += [key["id"] for key in page["data"]]
        cursor = page["meta"].get("next_cursor")
        if cursor is None:
            break
    assert seen == sorted(set(seen), reverse=True)
    assert set(made) <= set(seen)


async def test_every_fault_of_a_key_is_told_together(api: Api) -> None:
    refused = await api.post(
        "/keys", {"scopes": ["nope"], "allowed_ips": ["10.0.0.1/8"], "expires_in": 0, "x": 1}
    )
    assert refused.status_code == 400
    assert refused.headers["Content-Type"] == "application/problem+json"
    pointers = {fault["pointer"] for fault in refused.json()["error"]["details"]}
    assert pointers == {"/name", "/scopes/0", "/allowed_ips/0", "/expires_in", "/x"}


@pytest.mark.parametrize("key", ["key_admin", "nope", "key_" + "0" * 32, "%00"])
async def test_an_unknown_key_is_404(api: Api, key: str) -> None:
    for answer in (
        await api.get(f"/keys/{key}"),
        await api.http.delete(f"/keys/{key}"),
        await api.post(f"/keys/{key}/rotate", {}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")


async def test_a_key_cannot_grant_what_it_does_not_hold(api: Api) -> None:
    made = await make(api, scopes=["keys:write", "projects:read"], project_ids=["demo"])
    headers = {"Authorization": f"Bearer {made['key']}"}

    async def ask(**fields: object) -> httpx2.Response:
        body = {"name": "n", "scopes": ["projects:read"], "project_ids": ["demo"], **fields}
        return await api.post("/keys", body, headers=headers)

    for wider in (
        {"scopes": ["admin"]},
        {"scopes": ["projects:execute"]},
        {"project_ids": None},
        {"project_ids": ["demo", "other"]},
        {"expires_in": "never"},
    ):
        refused = await ask(**wider)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "FORBIDDEN")
    granted = await ask()
    assert granted.status_code == 201
    assert granted.json()["data"]["created_by"] == made["id"]


async def test_the_last_use_is_seen_soon(api: Api) -> None:
    made = await make(api)
    await status_with(api, made["key"])
    found: list[object] = []

    async def look() -> None:
        while not found:
            shown = (await api.get(f"/keys/{made['id']}")).json()["data"]["last_used_at"]
            found.extend([shown] if shown else [])
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await until_async(lambda: found, "the use is written")


async def test_a_revocation_ends_the_streams_of_the_key(api: Api) -> None:
    await api.project()
    made = await make(api, scopes=["projects:execute"])
    command = await api.submit("echo up; exec sleep 600")
    path, key = f"/commands/{command}/events", {"Authorization": f"Bearer {made['key']}"}
    heard: list[Event] = []
    with trio.fail_after(DEADLINE_S):
        async with api.wire(path, key) as wire:
            assert wire.status == 200
            async for event in read_events(wire):
                if event.name == "output":
                    assert (await api.http.delete(f"/keys/{made['id']}")).status_code == 200
                heard.append(event)
    assert (heard[-1].name, heard[-1].data) == ("disconnecting", {"reason": "key_revoked"})
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_a_reader_that_has_stalled_is_cut_when_its_key_ends(api: Api, server: Server) -> None:
    await api.project("stalled")
    made = await make(api, scopes=["projects:execute"])
    line = "x" * 99
    script = f"yes {line} | head -c 20000000; exec sleep 600"
    command = await api.submit(script, project="stalled")
    path, key = f"/commands/{command}/events", {"Authorization": f"Bearer {made['key']}"}

    def open_streams() -> float:
        return metric(server, "rdev_sse_connections_active", project="stalled")

    with trio.fail_after(DEADLINE_S):
        async with api.wire(path, key) as wire:
            assert (wire.status, open_streams()) == (200, 1)
            while (await api.command(command))["stdout_bytes"] < 20_000_000:
                await trio.sleep(POLL_S)
            # Without the key's end it would stay for 30 s more.
            assert (await api.http.delete(f"/keys/{made['id']}")).status_code == 200
            with trio.fail_after(20):
                await until_async(lambda: open_streams() == 0, "its place is free")
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)
