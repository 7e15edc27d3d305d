"""Webhooks over HTTP, against a real server: from the commit to a receiver that verifies."""

import json
from base64 import b64decode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h11
import httpx2
import psycopg
import pytest
import trio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook as Judge

from rdev.adapters.postgres import cluster
from tests.app.server import DEADLINE_S, POLL_S, Api, Json, Server, open_server

SCHEDULE = "0.2,0.2,0.2"


@pytest.fixture(scope="module")
def server(quick_place: Path):
    settings = {
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_WEBHOOK_SCHEDULE": SCHEDULE,
    }
    with open_server(quick_place, **settings) as server:
        yield server


@dataclass
class Sink:
    """A receiver on loopback; answers with `answers`, one after the other, then with 200."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.requests]

    def bodies(self) -> list[Json]:
        return [json.loads(body) for _, body in self.requests]

    async def received(self, count: int) -> None:
        await until(lambda: len(self.requests) >= count)

    async def handle(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        headers: dict[str, str] = {}
        body = b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                try:
                    http.receive_data(await stream.receive_some(65_536))
                except trio.BrokenResourceError:
                    return
            elif isinstance(event, h11.Request):
                headers = {name.decode(): value.decode() for name, value in event.headers}
                body = b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.requests.append((headers, body))
                status, more = self.answers.pop(0) if self.answers else (200, {})
                answer = h11.Response(
                    status_code=status, headers=[("content-length", "2"), *more.items()]
                )
                for sent in (answer, h11.Data(data=b"ok"), h11.EndOfMessage()):
                    await stream.send_all(http.send(sent))
                http.start_next_cycle()
            else:
                return


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not condition():
            await trio.sleep(POLL_S)


@pytest.fixture
async def sink_of(nursery: trio.Nursery) -> Callable[..., Awaitable[Sink]]:
    async def start(*answers: tuple[int, dict[str, str]]) -> Sink:
        sink = Sink(answers=list(answers))
        serve = partial(trio.serve_tcp, sink.handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        sink.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/hooks"
        return sink

    return start


async def make(api: Api, sink: Sink, **fields: object) -> Json:
    body = {"url": sink.url, "events": ["command.queued"], **fields}
    made = await api.post("/webhooks", body)
    assert made.status_code == 201, made.text
    return made.json()["data"]


async def happen(server: Server, *types: str, project: str = "demo") -> list[str]:
    """Write events as the statements that change commands do; their ids."""
    dsn = cluster.conninfo(server.state_dir / "run")
    return await trio.to_thread.run_sync(_insert, dsn, types, project)


def _insert(dsn: str, types: tuple[str, ...], project: str) -> list[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        rows = connection.execute(
            "insert into events (xid, type, project, command_id, kind, status, attempt, seq)"
            " select pg_current_xact_id(), t, %s, gen_random_uuid(), 'shell', 'x', 1, 1"
            " from unnest(%s::text[]) t returning id",
            (project, list(types)),
        ).fetchall()
    return [f"evt_{row[0].hex}" for row in rows]


async def delivery_of(api: Api, hook: Json, status: str | None = None) -> Json:
    """Its only delivery, in detail, once it has this status."""
    with trio.fail_after(DEADLINE_S):
        while True:
            listed = (await api.get(f"/webhooks/{hook['id']}/deliveries")).json()["data"]
            if listed and status in (None, listed[0]["status"]):
                (one,) = listed
                return (await api.get(f"/deliveries/{one['id']}")).json()["data"]
            await trio.sleep(POLL_S)


async def test_an_event_arrives_and_the_published_library_accepts_it(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    hook = await make(api, sink, events=["command.queued"])
    (event,) = await happen(server, "command.queued")
    await sink.received(1)

    ((headers, body),) = sink.requests
    assert headers["webhook-id"] == event
    assert Judge(str(hook["secret"])).verify(body, headers)["type"] == "command.queued"
    found = await delivery_of(api, hook, "delivered")
    (attempt,) = found["attempts"]
    assert (attempt["status"], attempt["response_body"], found["attempt"]) == (200, "ok", 1)
    assert attempt["request_headers"]["webhook-signature"] == "v1,[redacted]"
    assert json.loads(found["payload"]) == json.loads(body)


async def test_a_failure_is_tried_again_under_the_same_id_until_it_is_dead_and_then_on_demand(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of(*[(500, {})] * 4)
    hook = await make(api, sink)
    (event,) = await happen(server, "command.queued")
    found = await delivery_of(api, hook, "dead")
    assert (found["reason"], found["attempt"]) == ("exhausted", 4)
    assert [one["status"] for one in found["attempts"]] == [500] * 4
    dead = await api.get(f"/webhooks/{hook['id']}/deliveries?status=dead")
    assert [one["id"] for one in dead.json()["data"]] == [found["id"]]

    again = await api.post(f"/deliveries/{found['id']}/redeliver", {})
    assert again.status_code == 202
    await delivery_of(api, hook, "delivered")
    assert sink.ids() == [event] * 5

    body = {"since": "2020-01-01T00:00:00Z", "status": "delivered"}
    ranged = await api.post(f"/webhooks/{hook['id']}/redeliver", body)
    assert ranged.json()["data"] == {"redelivered": 1}
    await sink.received(6)
    assert sink.ids() == [event] * 6


async def test_an_answer_410_disables_until_somebody_enables(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of((410, {}))
    hook = await make(api, sink)
    path = f"/webhooks/{hook['id']}"
    await happen(server, "command.queued")
    await delivery_of(api, hook, "dead")
    shown = (await api.get(path)).json()["data"]
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "gone")
    assert (await api.post(f"{path}/test", {})).status_code == 409

    enabled = await api.http.patch(path, json={"enabled": True})
    assert (enabled.json()["data"]["enabled"], enabled.json()["data"]["disabled_reason"]) == (
        True,
        None,
    )
    assert (await api.post(f"{path}/test", {})).status_code == 202
    await sink.received(2)
    assert sink.bodies()[1]["type"] == "ping"


async def test_during_a_rotation_both_secrets_sign(
    api: Api, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    hook = await make(api, sink)
    path = f"/webhooks/{hook['id']}"
    rotated = (await api.post(f"{path}/rotate-secret", {})).json()["data"]
    assert rotated["secret"] != hook["secret"]
    assert rotated["previous_secret_until"] is not None
    await api.post(f"{path}/test", {})
    await sink.received(1)
    headers, body = sink.requests[0]
    for secret in (hook["secret"], rotated["secret"]):
        Judge(str(secret)).verify(body, headers)
    await api.post(f"{path}/rotate-secret", {"grace_s": 0})
    await api.post(f"{path}/test", {})
    await sink.received(2)
    assert len(sink.requests[1][0]["webhook-signature"].split()) == 1


async def test_of_scheme_v1a_the_public_key_is_for_everybody_and_the_private_for_nobody(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    hook = await make(api, sink, signature_scheme="v1a")
    path = f"/webhooks/{hook['id']}"
    assert (hook["signature_scheme"], hook["secret"]) == ("v1a", None)
    shown = (await api.get(path)).json()["data"]
    assert shown["public_key"] == hook["public_key"]
    assert "secret" not in shown
    await api.post(f"{path}/test", {})
    await sink.received(1)
    assert schemes(sink.requests[0][0]) == ["v1a"]
    check_v1a(hook["public_key"], *sink.requests[0])

    rotated = (await api.post(f"{path}/rotate-secret", {})).json()["data"]
    assert rotated["secret"] is None
    assert rotated["public_key"] != hook["public_key"]
    assert rotated["previous_public_key"] == hook["public_key"]
    await api.post(f"{path}/test", {})
    await sink.received(2)
    assert schemes(sink.requests[1][0]) == ["v1a", "v1a"]
    for one in (rotated, hook):
        check_v1a(one["public_key"], *sink.requests[1])

    await api.post(f"{path}/rotate-secret", {"grace_s": 0})
    shown = (await api.get(path)).json()["data"]
    assert (shown["previous_public_key"], shown["previous_secret_until"]) == (None, None)
    listed = await api.get("/webhooks?limit=200")
    assert "whsk_" not in listed.text + server.log


async def test_another_scheme_is_a_rotation_in_which_both_sign(
    api: Api, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    hook = await make(api, sink)
    path = f"/webhooks/{hook['id']}"
    same = (await api.http.patch(path, json={"signature_scheme": "v1"})).json()["data"]
    assert (same["secret"], same["previous_secret_until"]) == (None, None)

    turned = (await api.http.patch(path, json={"signature_scheme": "v1a"})).json()["data"]
    assert (turned["secret"], turned["previous_public_key"]) == (None, None)
    assert turned["previous_secret_until"] is not None
    await api.post(f"{path}/test", {})
    await sink.received(1)
    headers, body = sink.requests[0]
    assert schemes(headers) == ["v1a", "v1"]
    Judge(str(hook["secret"])).verify(body, headers)
    check_v1a(turned["public_key"], headers, body)

    back = (await api.http.patch(path, json={"signature_scheme": "v1"})).json()["data"]
    assert back["previous_public_key"] == turned["public_key"]
    await api.post(f"{path}/test", {})
    await sink.received(2)
    headers, body = sink.requests[1]
    assert schemes(headers) == ["v1", "v1a"]
    Judge(back["secret"]).verify(body, headers)
    check_v1a(turned["public_key"], headers, body)


def schemes(headers: dict[str, str]) -> list[str]:
    return [one.partition(",")[0] for one in headers["webhook-signature"].split(" ")]


def check_v1a(public_key: str, headers: dict[str, str], body: bytes) -> None:
    """By the specification's words: one signature is of this key."""
    key = Ed25519PublicKey.from_public_bytes(b64decode(public_key.removeprefix("whpk_")))
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    for one in headers["webhook-signature"].split(" "):
        if one.startswith("v1a,"):
            with suppress(InvalidSignature):
                return key.verify(b64decode(one[4:]), content)
    raise AssertionError("no signature is of this key")


async def test_a_repeated_ping_is_answered_as_the_first_whatever_became_of_the_endpoint(
    api: Api, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    hook = await make(api, await sink_of())
    path, headers = f"/webhooks/{hook['id']}", {"Idempotency-Key": "ping once"}
    first = await api.post(f"{path}/test", {}, headers=headers)
    await api.http.patch(path, json={"enabled": False})
    again = await api.post(f"{path}/test", {}, headers=headers)
    assert (again.status_code, again.json()["data"]) == (202, first.json()["data"])
    assert again.headers["Idempotent-Replayed"] == "true"
    other = await api.post(f"{path}/test", {}, headers={"Idempotency-Key": "ping twice"})
    assert other.status_code == 409


async def test_a_secret_is_shown_once_and_stored_nowhere(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"url": (await sink_of()).url, "events": ["ping"]}
    first = await api.http.post("/webhooks", json=body, headers=headers)
    again = await api.http.post("/webhooks", json=body, headers=headers)
    assert first.json()["data"]["id"] == again.json()["data"]["id"]
    assert again.json()["data"]["secret"] is None
    assert again.headers["Idempotent-Replayed"] == "true"
    secret = first.json()["data"]["secret"]
    listed = await api.get("/webhooks?limit=200")
    assert secret not in listed.text
    assert secret not in server.log


async def test_every_fault_of_a_body_is_told(api: Api) -> None:
    made = await api.post("/webhooks", {"events": ["command.nothing"], "enabled": 1, "x": 1})
    pointers = [one["pointer"] for one in made.json()["error"]["details"]]
    assert made.status_code == 400
    assert sorted(pointers) == ["/enabled", "/events/0", "/url", "/x"]
    inside = await api.post("/webhooks", {"url": "https://10.0.0.1/", "events": ["ping"]})
    assert inside.status_code == 400


async def test_a_key_is_told_of_its_own_projects_only(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    scopes = ["webhooks:write", "webhooks:read", "projects:read"]
    key = await api.post("/keys", {"name": "a", "scopes": scopes, "project_ids": ["demo"]})
    headers = {"Authorization": f"Bearer {key.json()['data']['key']}"}
    body: Json = {"url": sink.url, "events": ["*"], "project_ids": ["other"]}
    refused = await api.http.post("/webhooks", json=body, headers=headers)
    assert refused.status_code == 403
    made = await api.http.post("/webhooks", json=body | {"project_ids": None}, headers=headers)
    assert made.json()["data"]["project_ids"] == ["demo"]

    await happen(server, "command.queued", project="other")
    (seen,) = await happen(server, "command.queued", project="demo")
    await sink.received(1)
    assert sink.ids() == [seen]
    # With its key an endpoint ends.
    await api.http.delete(f"/keys/{key.json()['data']['id']}")
    hook = f"/webhooks/{made.json()['data']['id']}"
    with trio.fail_after(DEADLINE_S):
        while (await api.get(hook)).json()["data"]["disabled_reason"] != "key_ended":
            await trio.sleep(POLL_S)
    await happen(server, "command.queued", project="demo")
    assert sink.ids() == [seen]


async def test_of_deliveries_a_key_sees_those_of_its_own_projects(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    """Also where the endpoint was told of others, before somebody narrowed it."""
    sink = await sink_of()
    hook = await make(api, sink, project_ids=["demo", "other"])
    await happen(server, "command.queued", project="other")
    await happen(server, "command.queued", project="demo")
    await sink.received(2)
    path = f"/webhooks/{hook['id']}"
    narrowed = await api.http.patch(path, json={"project_ids": ["demo"]})
    assert narrowed.status_code == 200
    with trio.fail_after(DEADLINE_S):
        while True:
            found = (await api.get(path + "/deliveries?status=delivered")).json()["data"]
            ids = {one["project"]: one["id"] for one in found}
            if set(ids) == {"demo", "other"}:
                break
            await trio.sleep(POLL_S)

    scopes = ["webhooks:write", "webhooks:read"]
    key = await api.post("/keys", {"name": "a", "scopes": scopes, "project_ids": ["demo"]})
    headers = {"Authorization": f"Bearer {key.json()['data']['key']}"}
    listed = (await api.get(path + "/deliveries", headers=headers)).json()["data"]
    assert [one["id"] for one in listed] == [ids["demo"]]
    foreign = f"/deliveries/{ids['other']}"
    assert (await api.get(foreign, headers=headers)).status_code == 404
    assert (await api.post(foreign + "/redeliver", {}, headers=headers)).status_code == 404
    since = {"since": "2020-01-01T00:00:00Z", "status": "all"}
    again = await api.post(path + "/redeliver", since, headers=headers)
    assert again.json()["data"] == {"redelivered": 1}
    # It may not read commands: of what is sent it learns nothing.
    own = f"/deliveries/{ids['demo']}"
    assert (await api.get(own, headers=headers)).json()["data"]["payload"] is None
    assert (await api.get(own)).json()["data"]["payload"] is not None


async def test_only_who_may_read_commands_is_told_of_them(
    api: Api, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    key = await api.post("/keys", {"name": "a", "scopes": ["webhooks:write"]})
    headers = {"Authorization": f"Bearer {key.json()['data']['key']}"}
    body: Json = {"url": (await sink_of()).url, "events": ["command.queued"]}
    refused = await api.http.post("/webhooks", json=body, headers=headers)
    assert refused.status_code == 403
    body["events"] = ["endpoint.disabled"]
    made = await api.http.post("/webhooks", json=body, headers=headers)
    assert made.status_code == 201
    path = f"/webhooks/{made.json()['data']['id']}"
    widened = await api.http.patch(path, json={"events": ["*"]}, headers=headers)
    assert widened.status_code == 403


async def test_an_ordered_endpoint_gets_its_events_in_sequence(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of((500, {}), (200, {}), (503, {"retry-after": "1"}))
    await make(api, sink, ordered=True)
    ids = await happen(server, *["command.queued"] * 20)
    await sink.received(22)
    assert list(dict.fromkeys(sink.ids())) == ids


async def test_a_deleted_endpoint_is_gone(
    api: Api, server: Server, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    hook = await make(api, sink)
    path = f"/webhooks/{hook['id']}"
    for expected in (204, 404):
        answer: httpx2.Response = await api.http.delete(path)
        assert answer.status_code == expected
    assert (await api.get(path)).status_code == 404


async def test_the_life_of_a_command_is_told_in_sequence(
    api: Api, sink_of: Callable[..., Awaitable[Sink]]
) -> None:
    sink = await sink_of()
    types = ["command.queued", "command.started", "command.completed", "command.failed"]
    await make(api, sink, events=types, ordered=True)
    command = await api.run("exit 3")
    await sink.received(3)
    bodies = sink.bodies()
    assert [body["type"] for body in bodies] == [types[0], types[1], types[3]]
    data = [body["data"] for body in bodies]
    assert {one["command_id"] for one in data} == {command["id"]}
    assert [one["sequence"] for one in data] == sorted(one["sequence"] for one in data)
    assert (data[2]["exit_code"], data[2]["status"], data[2]["type"]) == (3, "failed", "shell")
    print(json.dumps(bodies[2], indent=1))
