"""What a client is told when it is refused: problems, envelopes, ids."""

import re

import pytest

from tests.app.server import Api, Server

REQUEST_ID = re.compile(r"req-[0-9a-f]{32}")
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def test_a_refusal_is_a_problem_and_the_original_envelope(api: Api) -> None:
    refused = await api.post("/projects/demo/shell", {"nope": 1})
    assert refused.status_code == 400
    assert refused.headers["Content-Type"] == "application/problem+json"
    body = refused.json()
    assert body["status"] == 400
    assert body["instance"] == "/projects/demo/shell"
    assert {"type", "title", "detail"} <= body.keys()
    assert body["error"]["code"] == "BAD_REQUEST"
    assert body["error"]["message"] == body["detail"]
    assert body["error"]["details"] == [
        {"pointer": "/command", "message": "is required"},
        {"pointer": "/nope", "message": "is not a known field"},
    ]
    assert body["meta"]["request_id"] == refused.headers["X-Request-Id"]
    assert STAMP.fullmatch(body["meta"]["timestamp"])


async def test_a_success_is_data_and_meta(api: Api) -> None:
    answer = await api.get("/projects")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json().keys() == {"data", "meta"}
    assert answer.json()["meta"]["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize("offered", ["my-request.1_A", "x" * 64])
async def test_a_sane_request_id_is_taken(api: Api, offered: str) -> None:
    for path in ("/projects", "/nowhere", "/health"):
        answer = await api.get(path, headers={"X-Request-Id": offered})
        assert answer.headers["X-Request-Id"] == offered


@pytest.mark.parametrize("offered", ["x" * 65, "with space", "", "a/b", "é"])
async def test_another_request_id_is_replaced(api: Api, offered: str) -> None:
    answer = await api.get("/projects", headers={"X-Request-Id": offered.encode()})
    assert REQUEST_ID.fullmatch(answer.headers["X-Request-Id"])


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer wrong"}])
async def test_without_a_key_nothing_is_told(server: Server, api: Api, headers: dict) -> None:
    for path in ("/projects", "/projects/demo", "/commands/cmd_" + "0" * 32):
        request = api.http.build_request("GET", path)
        del request.headers["Authorization"]
        request.headers.update(headers)
        refused = await api.http.send(request)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        assert refused.json()["error"]["code"] == "UNAUTHORIZED"


async def test_both_ways_to_give_a_key_work(server: Server, api: Api) -> None:
    request = api.http.build_request("GET", "/projects")
    del request.headers["Authorization"]
    request.headers["X-API-Key"] = server.key
    assert (await api.http.send(request)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/projects", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("DELETE", "/projects/demo/shell", {"OPTIONS", "POST"}),
        ("POST", "/commands/cmd_" + "0" * 32, {"DELETE", "GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_a_wrong_method_is_405_and_names_the_right_ones(
    api: Api, method: str, path: str, allowed: set[str]
) -> None:
    refused = await api.http.request(method, path)
    assert refused.status_code == 405
    assert set(refused.headers["Allow"].split(", ")) == allowed
    assert refused.headers["Content-Type"] == "application/problem+json"


async def test_head_is_a_get_without_a_body(api: Api) -> None:
    for path in ("/projects", "/projects/demo", "/health"):
        get, head = await api.get(path), await api.http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")


@pytest.mark.parametrize("path", ["/", "/nowhere", "/projects/demo/nothing", "/commands"])
async def test_an_unknown_path_is_404(api: Api, path: str) -> None:
    missing = await api.get(path)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "NOT_FOUND"


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_another_content_type_is_415(api: Api, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    refused = await api.http.post("/projects", content=b'{"id": "typed"}', headers=headers)
    assert refused.status_code == 415
    assert refused.json()["error"]["code"] == "UNSUPPORTED_MEDIA_TYPE"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"id": "a", "id": "b"}', b'{"id": NaN}',
        b'{"id": "\\ud83d"}', b"[" * 100_000, b'{"id": "x"}x', b'{"n": 1' + b"0" * 5_000 + b"}",
    ],
)  # fmt: skip
async def test_a_body_that_is_no_object_of_json_is_400(api: Api, body: bytes) -> None:
    refused = await api.http.post(
        "/projects", content=body, headers={"Content-Type": "application/json"}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "BAD_REQUEST"


async def test_a_lone_surrogate_anywhere_is_a_fault_of_its_field(api: Api) -> None:
    for body, pointer in (
        (b'{"command": "\\ud83d"}', "/command"),
        (b'{"command": "x", "env": {"A": "\\ud83d"}}', "/env/A"),
        (b'{"command": "x", "stdin": "\\udc00"}', "/stdin"),
        (b'{"command": "x", "cwd": "a\\u0000b"}', "/cwd"),
    ):
        refused = await api.http.post(
            "/projects/demo/shell", content=body, headers={"Content-Type": "application/json"}
        )
        assert refused.status_code == 400, body
        # A half pair is no JSON text at all for the strict reader, or the field's own fault.
        first = refused.json()["error"]["details"][0]
        assert first["pointer"] in (pointer, "")
