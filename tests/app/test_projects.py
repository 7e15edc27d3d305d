"""Projects over HTTP, against a real server."""

import pytest

from tests.app.server import Api, Server


async def test_a_new_project_is_201_with_its_location_and_its_folder(
    api: Api, server: Server
) -> None:
    made = await api.post("/projects", {"id": "fresh"})
    assert made.status_code == 201
    assert made.headers["Location"] == "/projects/fresh"
    data = made.json()["data"]
    assert data["id"] == "fresh"
    assert data["status"] == "ready"
    assert data["executor"] == "local"
    assert data["commands"] == {"queued": 0, "running": 0}
    assert {"name", "pod", "image", "labels", "annotations", "last_seen"} <= data.keys()
    assert (server.projects / "fresh").is_dir()


async def test_the_same_project_again_is_200(api: Api) -> None:
    assert (await api.post("/projects", {"id": "again"})).status_code == 201
    again = await api.post("/projects", {"id": "again"})
    assert again.status_code == 200
    assert again.json()["data"]["id"] == "again"


async def test_a_repeat_with_its_idempotency_key_is_201_again(api: Api, server: Server) -> None:
    headers = {"Idempotency-Key": "make keyed"}
    made = await api.post("/projects", {"id": "keyed"}, headers=headers)
    assert (made.status_code, made.headers.get("Idempotent-Replayed")) == (201, None)
    again = await api.post("/projects", {"id": "keyed"}, headers=headers)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert again.headers["Location"] == "/projects/keyed"
    assert again.json()["data"] == made.json()["data"]
    other = await api.post("/projects", {"id": "not-keyed"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert not (server.projects / "not-keyed").exists()
    assert (await api.get("/projects/not-keyed")).status_code == 404


@pytest.mark.parametrize("name", ["", "UPPER", "-dash", "dash-", "a" * 41, "a/b", "a.b", None, 7])
async def test_a_bad_id_is_refused_with_its_pointer(api: Api, name: object) -> None:
    refused = await api.post("/projects", {"id": name})
    assert refused.status_code == 400
    assert [fault["pointer"] for fault in refused.json()["error"]["details"]] == ["/id"]


async def test_an_id_of_40_characters_is_taken(api: Api) -> None:
    assert (await api.post("/projects", {"id": "a" * 40})).status_code == 201


async def test_what_only_pods_have_is_refused_field_by_field(api: Api) -> None:
    refused = await api.post(
        "/projects", {"id": "podlike", "image": "x", "git_url": "y", "nope": 1}
    )
    assert refused.status_code == 400
    pointers = {fault["pointer"] for fault in refused.json()["error"]["details"]}
    assert pointers == {"/image", "/git_url", "/nope"}
    assert (await api.get("/projects/podlike")).status_code == 404


async def test_the_list_comes_in_pages_without_a_hole_or_a_double(api: Api) -> None:
    names = [f"page-{number}" for number in range(5)]
    for name in names:
        await api.project(name)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        parameters = {"limit": "2"} | ({} if cursor is None else {"cursor": cursor})
        page = (await api.get("/projects", params=parameters)).json()
        assert len(page["data"]) <= 2
        seen += [project["id"] for project in page["data"]]
        cursor = page["meta"].get("next_cursor")
        if cursor is None:
            break
    assert seen == sorted(set(seen))
    assert set(names) <= set(seen)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "cursor=%00",
        "cursor=NO",
        "cursor=" + "a" * 99,
        "limit=" + "0" * 19 + "1" * 5_000,
    ],
)
async def test_a_bad_limit_or_cursor_is_400(api: Api, query: str) -> None:
    assert (await api.get(f"/projects?{query}")).status_code == 400


@pytest.mark.parametrize("name", ["nowhere", "NOT-AN-ID", "%00", "a" * 300, "%F0%9F%98%80"])
async def test_an_unknown_project_is_404(api: Api, name: str) -> None:
    missing = await api.get(f"/projects/{name}")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "NOT_FOUND"


async def test_commands_of_an_unknown_project_are_404(api: Api) -> None:
    submitted = await api.post("/projects/nowhere/shell", {"command": "true"})
    assert submitted.status_code == 404
    assert (await api.get("/projects/nowhere/commands")).status_code == 404


async def test_a_project_counts_its_commands(api: Api) -> None:
    await api.project("counting")
    commands = [await api.submit("sleep 60", project="counting") for _ in range(6)]
    for command in commands[:4]:
        await api.running(command)
    counts = (await api.get("/projects/counting")).json()["data"]["commands"]
    assert counts == {"queued": 2, "running": 4}
    for command in reversed(commands):
        await api.http.delete(f"/commands/{command}")
    for command in commands:
        await api.ended(command)
    counts = (await api.get("/projects/counting")).json()["data"]["commands"]
    assert counts == {"queued": 0, "running": 0}
