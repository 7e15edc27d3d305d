"""Every limit at its edge and one over, and that each refusal is counted."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from tests.app.server import (
    DEADLINE_S,
    Api,
    Json,
    Server,
    metric,
    open_api,
    open_server,
    until_async,
)

ARG_MAX_BYTES = 131_071


def refusals(server: Server, limit: str) -> float:
    return metric(server, "rdev_limit_reached_total", limit=limit)


@pytest.mark.parametrize(
    ("kind", "field", "body", "most"),
    [
        ("shell", "command", {"command": ""}, ARG_MAX_BYTES),
        ("shell", "stdin", {"command": "wc -c", "stdin": ""}, 524_288),
        ("claude", "prompt", {"prompt": ""}, ARG_MAX_BYTES),
        ("claude", "append_system_prompt", {"prompt": "x", "append_system_prompt": ""}, 131_071),
    ],
)
async def test_a_text_at_its_limit_runs_and_one_byte_more_is_counted(
    api: Api, server: Server, kind: str, field: str, body: Json, most: int
) -> None:
    before = refusals(server, field)
    filler = "true #" + "x" * (most - 6) if field == "command" else "y" * most
    made = await api.submit_body(f"/projects/demo/{kind}", body | {field: filler})
    shown = await api.ended(made)
    if kind == "shell":
        assert shown["status"] == "succeeded"
    if field == "stdin":
        assert await api.output(made) == b"%d\n" % most
    refused = await api.post(f"/projects/demo/{kind}", body | {field: filler + "z"})
    assert refused.status_code == 400
    fault = refused.json()["error"]["details"][0]
    assert fault["pointer"] == f"/{field}"
    assert f"at most {most} bytes" in fault["message"]
    assert refusals(server, field) == before + 1


async def test_an_argument_of_git_at_its_limit_runs(api: Api, server: Server) -> None:
    before = refusals(server, "args")
    body: Json = {"args": ["log", "x" * ARG_MAX_BYTES]}
    shown = await api.ended(await api.submit_body("/projects/demo/git", body))
    assert (shown["status"], shown["exit_code"]) == ("failed", 128)
    refused = await api.post("/projects/demo/git", {"args": ["log", "x" * (ARG_MAX_BYTES + 1)]})
    assert refused.status_code == 400
    assert refused.json()["error"]["details"][0]["pointer"] == "/args/1"
    assert refusals(server, "args") == before + 1


async def test_a_variable_at_its_limit_is_set(api: Api, server: Server) -> None:
    before = refusals(server, "env")
    value = "v" * (ARG_MAX_BYTES - len("NAME="))
    command = await api.submit('printf %s "$NAME" | wc -c', env={"NAME": value})
    await api.ended(command)
    assert await api.output(command) == b"%d\n" % len(value)
    refused = await api.post(
        "/projects/demo/shell", {"command": "true", "env": {"NAME": value + "v"}}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["details"][0]["pointer"] == "/env/NAME"
    assert refusals(server, "env") == before + 1


async def test_a_whole_environment_at_its_limit_is_set(api: Api) -> None:
    each = 131_000
    env = {f"N{number}": "v" * (each - 4) for number in range(4)}
    command = await api.submit("env | wc -c", env=env)
    assert (await api.ended(command))["status"] == "succeeded"
    assert int(await api.output(command)) > 4 * (each - 4)
    refused = await api.post(
        "/projects/demo/shell", {"command": "true", "env": env | {"N4": "v" * 3_000}}
    )
    assert refused.status_code == 400
    many = {f"N{number}": "v" for number in range(201)}
    refused = await api.post("/projects/demo/shell", {"command": "true", "env": many})
    assert refused.json()["error"]["details"][0]["pointer"] == "/env"


async def test_a_body_over_one_mebibyte_is_413_and_names_the_limit(
    api: Api, server: Server
) -> None:
    before = refusals(server, "body")
    edge = b'{"id": "edge"' + b" " * ((1 << 20) - 14) + b"}"
    headers = {"Content-Type": "application/json"}
    assert len(edge) == 1 << 20
    assert (await api.http.post("/projects", content=edge, headers=headers)).status_code == 201
    refused = await api.http.post("/projects", content=edge + b" ", headers=headers)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "PAYLOAD_TOO_LARGE"
    assert "1048576" in refused.json()["detail"]
    assert refusals(server, "body") == before + 1


@pytest.fixture(scope="module")
def narrow(quick_place: Path) -> Iterator[Server]:
    """A server with room for two held and one more request at a time."""
    settings = {"RDEV_STREAMS_MAX": "2", "RDEV_IN_FLIGHT_MAX": "2"}
    with open_server(quick_place, **settings) as server:
        yield server


@pytest.fixture
async def narrow_api(narrow: Server) -> AsyncIterator[Api]:
    async with open_api(narrow) as api:
        await api.project()
        yield api


async def test_one_stream_too_many_is_503_and_counted(narrow: Server, narrow_api: Api) -> None:
    api = narrow_api
    before = refusals(narrow, "held")
    command = await api.submit("sleep 60")
    async with AsyncExitStack() as stack:
        for _ in range(2):
            stream = await stack.enter_async_context(api.stream(command))
            with trio.fail_after(DEADLINE_S):
                await anext(stream)
        refused = await api.get(f"/commands/{command}/events")
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "SERVICE_UNAVAILABLE"
        waiting = await api.post("/projects/demo/shell?wait=5", {"command": "touch stored"})
        assert waiting.status_code == 503
        assert refusals(narrow, "held") == before + 2
        # What is no stream is still served, and so are the probes.
        assert (await api.get(f"/commands/{command}")).status_code == 200
        assert (await api.get("/ready")).status_code == 200
    with trio.fail_after(DEADLINE_S):
        while (await api.http.head(f"/commands/{command}/events")).status_code == 503:
            await trio.sleep(0.02)
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)
    listed = (await api.get("/projects/demo/commands")).json()["data"]
    assert [shown["id"] for shown in listed] == [command], "a refused request stored a command"


def reading(server: Server) -> float:
    return metric(server, "rdev_http_reading")


async def test_one_body_too_many_on_its_way_ends_the_oldest_and_all_else_is_served(
    narrow: Server, narrow_api: Api
) -> None:
    """Requests whose bodies do not come have the two places for that, and none in work."""
    api = narrow_api
    before = refusals(narrow, "bodies")
    url = api.http.base_url
    assert url.port is not None
    head = (
        f"POST /projects HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        f"Authorization: {api.http.headers['Authorization']}\r\nContent-Length: 20\r\n\r\n"
    )
    async with AsyncExitStack() as stack:

        async def slow() -> trio.SocketStream:
            socket = await stack.enter_async_context(await trio.open_tcp_stream(url.host, url.port))
            await socket.send_all(head.encode())
            return socket

        oldest = await slow()
        await until_async(lambda: reading(narrow) == 1, "it waits for its body")
        await slow()
        await until_async(lambda: reading(narrow) == 2, "both wait for their body")
        await slow()
        with trio.fail_after(DEADLINE_S):
            answer = await oldest.receive_some(65_536)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n".lower() in answer.lower()
        assert refusals(narrow, "bodies") == before + 1
        for path in ("/projects", "/health", "/ready", "/metrics"):
            assert (await api.get(path)).status_code == 200
    await until_async(lambda: reading(narrow) == 0, "their places are free")
    assert (await api.post("/projects", {"id": "later"})).status_code == 201
