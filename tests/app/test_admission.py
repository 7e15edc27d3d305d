"""Limits of the queue, idempotency keys and the queue's own page, against a real server."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import psycopg
import pytest
import trio

from rdev.adapters.postgres.embedded import running_embedded
from tests.app.server import Api, Server, metric, open_api, open_server, rdev

PROJECT_MAX, SERVER_MAX = 5, 8


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """A server whose queue is soon full."""
    limits = {"RDEV_QUEUE_PROJECT_MAX": str(PROJECT_MAX), "RDEV_QUEUE_MAX": str(SERVER_MAX)}
    with open_server(quick_place, **limits) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    async with open_api(server) as api:
        yield api


async def hold_lane(api: Api, project: str) -> None:
    """Let four commands run, so that all others wait."""
    await api.project(project)
    for _ in range(4):
        await api.running(await api.submit("sleep 60", project=project))
    # What was accepted counts as queued until the next count.
    await trio.sleep(1.1)


async def let_go(api: Api, *projects: str) -> None:
    for project in projects:
        found = (await api.get(f"/projects/{project}/commands?limit=200")).json()["data"]
        for command in found:
            await api.http.delete(f"/commands/{command['id']}")
        for command in found:
            await api.ended(command["id"])
    await trio.sleep(1.1)


async def post(api: Api, project: str, key: str | None = None, **more: object) -> httpx2.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    path = f"/projects/{project}/shell"
    return await api.post(path, {"command": "sleep 60", **more}, headers=headers)


@pytest.mark.slow
async def test_a_full_project_is_429_and_a_full_server_503(api: Api, server: Server) -> None:
    for project in ("one", "two"):
        await hold_lane(api, project)
    statuses = [(await post(api, "one", f"k{number}")).status_code for number in range(PROJECT_MAX)]
    assert statuses == [201] * PROJECT_MAX
    refused = await post(api, "one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "TOO_MANY_REQUESTS")
    assert int(refused.headers["Retry-After"]) >= 1
    # What was accepted is told again, however full the queue is.
    again = await post(api, "one", "k0")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert [(await post(api, "two")).status_code for _ in range(3)] == [201] * 3
    refused = await post(api, "two")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "SERVICE_UNAVAILABLE")
    assert int(refused.headers["Retry-After"]) >= 1
    assert metric(server, "rdev_limit_reached_total", limit="queue_project") == 2
    assert metric(server, "rdev_limit_reached_total", limit="queue") == 1
    await trio.sleep(1.1)
    await _check_queue(api, server)
    await let_go(api, "one", "two")
    assert (await post(api, "one")).status_code == 201
    await let_go(api, "one")


async def _check_queue(api: Api, server: Server) -> None:
    found = (await api.get("/queue")).json()["data"]
    assert (found["queued"], found["running"]) == (8, 8)
    assert found["oldest_wait_s"] > 0
    assert found["priorities"]["normal"]["queued"] == 8
    assert found["priorities"]["high"] == {"queued": 0, "oldest_wait_s": None}
    shown = {one["id"]: (one["queued"], one["running"]) for one in found["projects"]}
    assert shown == {"one": (5, 4), "two": (3, 4)}
    assert [one["id"] for one in found["projects"]] == ["one", "two"]
    assert found["limits"] == {"project_max": PROJECT_MAX, "server_max": SERVER_MAX}
    assert found["server"]["running"] == 8
    assert found["server"]["claimed"] >= 8
    assert {"claims_per_s", "stale_writes", "take_overs"} <= found["server"].keys()
    table = rdev("queue", environment=server.client_environment)
    assert table.returncode == 0, table.stderr
    lines = [line.split() for line in table.stdout.decode().splitlines()]
    assert lines[1][:5] == ["one", "5", "0", "5", "0"]
    assert lines[3][:2] == ["(all)", "8"]
    as_json = rdev("queue", "--output", "json", environment=server.client_environment)
    assert json.loads(as_json.stdout)["queued"] == 8


async def test_an_empty_queue_is_shown(api: Api) -> None:
    found = (await api.get("/queue")).json()["data"]
    assert (found["queued"], found["running"], found["oldest_wait_s"]) == (0, 0, None)
    assert (found["projects"], found["projects_total"]) == ([], 0)


async def test_a_repeat_is_201_with_the_same_id_and_the_present_state(api: Api) -> None:
    await api.project("keys-0")
    first = await post(api, "keys-0", "a key", command="echo once")
    assert "Idempotent-Replayed" not in first.headers
    await api.ended(first.json()["data"]["id"])
    again = await post(api, "keys-0", "a key", command="echo once")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert again.headers["Location"] == first.headers["Location"]
    data = again.json()["data"]
    assert data["id"] == first.json()["data"]["id"]
    assert (data["status"], data["queue_position"]) == ("succeeded", None)
    listed = (await api.get("/projects/keys-0/commands")).json()["data"]
    assert len(listed) == 1


async def test_a_repeat_may_wait(api: Api) -> None:
    await api.project("keys-1")
    body, headers = {"command": "sleep 0.3; echo out"}, {"Idempotency-Key": "waiting"}
    first = await api.post("/projects/keys-1/shell", body, headers=headers)
    again = await api.post("/projects/keys-1/shell?wait=30", body, headers=headers)
    data = again.json()["data"]
    assert data["id"] == first.json()["data"]["id"]
    assert (data["exit_code"], data["stdout_tail"]) == (0, "out\n")


async def test_another_body_is_422_and_the_order_of_names_is_no_other_body(api: Api) -> None:
    await api.project("keys-2")
    headers = {"Idempotency-Key": "same", "Content-Type": "application/json"}
    one = b'{"command": "true", "env": {"A": "1", "B": "2"}}'
    two = b'{"env":{"B":"2","A":"1"},"command":"true"}'
    path = "/projects/keys-2/shell"
    first = await api.http.post(path, content=one, headers=headers)
    again = await api.http.post(path, content=two, headers=headers)
    assert again.json()["data"]["id"] == first.json()["data"]["id"]
    for other in (b'{"command": "false"}', b'{"command": "true"}'):
        refused = await api.http.post(path, content=other, headers=headers)
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "IDEMPOTENCY_MISMATCH"
    elsewhere = await api.http.post(
        "/projects/keys-2/git", content=b'{"args": ["status"]}', headers=headers
    )
    assert elsewhere.status_code == 422


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9"])
async def test_a_bad_key_is_400_and_stores_nothing(api: Api, key: str) -> None:
    await api.project("bad-keys")
    headers = {"Idempotency-Key": key.encode("latin-1")}
    refused = await api.post("/projects/bad-keys/shell", {"command": "true"}, headers=headers)
    assert refused.status_code == 400
    assert (await api.get("/projects/bad-keys/commands")).json()["data"] == []


async def test_fifty_at_once_with_one_key_run_once(api: Api, server: Server) -> None:
    await api.project("fifty")
    file = server.state_dir / "ran"
    answers: list[httpx2.Response] = []

    async def submit() -> None:
        answers.append(await post(api, "fifty", "fifty", command=f"echo ran >> {file}"))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(submit)
    assert {answer.status_code for answer in answers} == {201}
    [command] = {answer.json()["data"]["id"] for answer in answers}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    await api.ended(command)
    assert file.read_text() == "ran\n"


async def test_output_that_was_pruned_is_410(api: Api, server: Server) -> None:
    await api.project("pruned")
    command = await api.submit("echo gone", project="pruned")
    await api.ended(command)
    dsn = running_embedded(server.state_dir)
    assert dsn is not None
    with psycopg.connect(dsn) as connection:
        uuid = command.removeprefix("cmd_")
        connection.execute("delete from output where command_id = %s", (uuid,))
    for path in ("events", "output", "output?stream=all", "output?tail_bytes=10"):
        answer = await api.get(f"/commands/{command}/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "GONE")
    assert (await api.command(command))["status"] == "succeeded"
