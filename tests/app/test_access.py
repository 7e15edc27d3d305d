"""Who may do what: every route × every scope × wrong project × expired × revoked × foreign address,
against a real server. `pytest -s -k table` prints what was found."""

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import trio

from rdev.adapters.http.access import ACCESS, Access, Where
from rdev.domain.keys import Scope
from tests.app.server import DEADLINE_S, Api, Json, Server, open_api, open_server

OWN, FOREIGN = "own", "foreign"
# Nobody listens there.
HOOK = "http://127.0.0.1:9/"

# A body that each route would take; refused or not must not depend on it.
BODIES: Mapping[tuple[str, str], Json] = {
    ("POST", "/projects"): {"id": OWN},
    ("POST", "/projects/{project}/shell"): {"command": "true"},
    ("POST", "/projects/{project}/git"): {"args": ["status"]},
    ("POST", "/projects/{project}/claude"): {"prompt": "say hello"},
    # Of what a holder of `keys:write` holds: nobody grants more.
    ("POST", "/keys"): {"name": "n", "scopes": ["keys:write"], "project_ids": [OWN]},
    # Of what happens to commands only who may read those is told.
    ("POST", "/webhooks"): {"url": HOOK, "events": ["ping"], "project_ids": [OWN]},
    ("PATCH", "/webhooks/{webhook}"): {"description": "d"},
    ("POST", "/webhooks/{webhook}/redeliver"): {"since": "2026-01-15T10:30:00Z"},
}


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """Trusts whoever calls it to be a proxy, so that a test can come from anywhere."""
    unlimited = dict.fromkeys(
        ("RDEV_RATE_LIMIT_ADDRESS", "RDEV_RATE_LIMIT_FAILURES", "RDEV_RATE_LIMIT_STARTS"), "off"
    )
    loopback = dict.fromkeys(("RDEV_TRUSTED_PROXIES", "RDEV_WEBHOOK_ALLOW_NETS"), "127.0.0.0/8,::1")
    with open_server(quick_place, **loopback, **unlimited, RDEV_CLAUDE_COMMAND="true") as server:
        yield server


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Two projects with an ended command each."""

    api: Api
    commands: Mapping[str, str]

    async def key(self, **fields: object) -> tuple[str, str]:
        """Make a key; its id and its text."""
        made = await self.api.post("/keys", {"name": "k", **fields})
        assert made.status_code == 201, made.text
        data = made.json()["data"]
        return data["id"], data["key"]

    async def hook(self, project: str) -> tuple[str, str]:
        """Make an endpoint of the project and ping it; its id and the delivery's."""
        body = {"url": HOOK, "events": ["ping"], "project_ids": [project]}
        hook = (await self.api.post("/webhooks", body)).json()["data"]["id"]
        ping = await self.api.post(f"/webhooks/{hook}/test", {})
        return hook, ping.json()["data"]["delivery_id"]

    async def ask(
        self, route: tuple[str, str], key: str, *, project: str = OWN, ip: str = "192.0.2.1"
    ) -> httpx2.Response:
        """One request of a route with a key. `{key}` is a fresh one of the project's."""
        method, path = route
        ward = hook = delivery = ""
        if "{webhook}" in path or "{delivery}" in path:
            hook, delivery = await self.hook(project)
        if "{key}" in path:
            # Nobody rotates a key that outlives their own.
            ward, _ = await self.key(scopes=["keys:write"], project_ids=[project], expires_in=3_600)
        path = path.format(
            project=project,
            command=self.commands[project],
            key=ward,
            webhook=hook,
            delivery=delivery,
        )
        if path.endswith("/events") and route[1] == "/projects/{project}/events":
            path += f"?stream_id={self.commands[project]}"
        body = BODIES.get(route)
        if route == ("POST", "/projects"):
            body = {"id": project}
        if route == ("POST", "/stream-tokens"):
            body = {"stream_id": self.commands[project]}
        headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": ip}
        async with self.api.http.stream(method, path, json=body, headers=headers) as answer:
            # A feed that is open has no end.
            if not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
                await answer.aread()
        if route == ("DELETE", "/projects/{project}") and answer.status_code < 400:
            await self.api.project(project)
        return answer


@pytest.fixture
async def stage(server: Server) -> AsyncIterator[Stage]:
    async with open_api(server) as api:
        commands = {}
        for project in (OWN, FOREIGN):
            await api.project(project)
            commands[project] = str((await api.run("true", project=project))["id"])
        yield Stage(api=api, commands=commands)


def code_of(answer: httpx2.Response) -> str:
    return "ok" if answer.status_code < 400 else answer.json()["error"]["code"]


def expected(access: Access, scope: Scope) -> str:
    return "ok" if scope is Scope.ADMIN or scope in access.scopes else "FORBIDDEN"


WRONG_PROJECT = {
    Where.NOWHERE: "ok",
    Where.SEEN: "ok",
    Where.PATH: "FORBIDDEN",
    Where.BODY: "FORBIDDEN",
    Where.COMMAND: "NOT_FOUND",
    Where.COMMAND_IN_BODY: "NOT_FOUND",
}
WARDS = ("key", "webhook", "delivery")
# What a key of another project says nothing about.
WARD_ROUTES = frozenset(
    route for route in ACCESS if any(f"{{{ward}}}" in route[1] for ward in WARDS)
)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_table_of_all_routes_and_scopes_holds(stage: Stage) -> None:
    """Each cell is asked for; so are a wrong project, a foreign address and two keys that ended."""
    keys = {
        scope: (await stage.key(scopes=[scope], project_ids=[OWN]))[1]
        for scope in Scope
        if scope is not Scope.ADMIN
    }
    keys[Scope.ADMIN] = (await stage.key(scopes=["admin"], project_ids=[OWN]))[1]
    _, bound = await stage.key(scopes=["admin"], allowed_ips=["198.51.100.0/24"])
    id_, revoked = await stage.key(scopes=["admin"])
    assert (await stage.api.http.delete(f"/keys/{id_}")).status_code == 200
    _, expired = await stage.key(scopes=["admin"], expires_in=1)
    await trio.sleep(1.1)  # the key's end is the database's clock
    ended = {"revoked": revoked, "expired": expired, "address": bound, "none": "no key at all"}
    lines = [" ".join(["route".ljust(36), *(scope.ljust(17) for scope in Scope), "wrong project"])]
    faults = []
    for route, access in ACCESS.items():
        row = []
        for scope in Scope:
            found = code_of(await stage.ask(route, keys[scope]))
            row.append(found)
            wanted = expected(access, scope)
            faults += [] if found == wanted else [(route, scope, found, wanted)]
        foreign = code_of(await stage.ask(route, keys[Scope.ADMIN], project=FOREIGN))
        wanted = "NOT_FOUND" if route in WARD_ROUTES else WRONG_PROJECT[access.project]
        faults += [] if foreign == wanted else [(route, "wrong project", foreign, wanted)]
        for why, key in ended.items():
            found = code_of(await stage.ask(route, key))
            wanted = {
                "revoked": "KEY_REVOKED",
                "expired": "KEY_EXPIRED",
                "address": "IP_NOT_ALLOWED",
                "none": "UNAUTHORIZED",
            }[why]
            faults += [] if found == wanted else [(route, why, found, wanted)]
        row_text = " ".join(cell.ljust(17) for cell in row)
        lines.append(f"{' '.join(route).ljust(36)} {row_text} {foreign}")
    print("\n" + "\n".join(lines))
    assert faults == []


async def test_every_route_of_the_server_is_declared_and_every_declaration_is_a_route(
    stage: Stage,
) -> None:
    """A declared route without a handler would be a row that nothing holds."""
    for method, path in ACCESS:
        asked = path.format(
            project=OWN, command=stage.commands[OWN], **dict.fromkeys(WARDS, "key_" + "0" * 32)
        )
        answer = await stage.api.http.request("OPTIONS", asked)
        assert method in answer.headers["Allow"], (method, path)


async def test_lists_show_what_the_key_may_see(stage: Stage, server: Server) -> None:
    _, key = await stage.key(scopes=["projects:read", "keys:read"], project_ids=[OWN])
    other, _ = await stage.key(scopes=["projects:read"], project_ids=[FOREIGN])
    headers = {"Authorization": f"Bearer {key}"}

    async def data(path: str) -> list[Json]:
        answer = await stage.api.http.get(path, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    assert [project["id"] for project in await data("/projects")] == [OWN]
    for project in (OWN, FOREIGN):
        for number in range(6):
            await stage.api.submit(f"sleep 60 # {number}", project=project)
    # The count is at most a second old.
    with trio.fail_after(DEADLINE_S):
        while (queue := await queue_of(stage, headers))["queued"] != 2 or queue["running"] != 4:
            await trio.sleep(0.1)
    assert queue["projects_total"] == 1
    assert [project["id"] for project in queue["projects"]] == [OWN]
    assert other not in [row["id"] for row in await data("/keys?limit=200")]
    for project, status in itertools.product((OWN, FOREIGN), ("running", "queued")):
        listed = await stage.api.get(f"/projects/{project}/commands?status={status}")
        for command in listed.json()["data"]:
            await stage.api.http.delete(f"/commands/{command['id']}")
    for project in (OWN, FOREIGN):
        listed = await stage.api.get(f"/projects/{project}/commands?limit=6")
        for command in listed.json()["data"]:
            await stage.api.ended(command["id"])


async def queue_of(stage: Stage, headers: Mapping[str, str]) -> dict:
    answer = await stage.api.http.get("/queue", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def test_a_refusal_names_the_scope_that_is_missing(stage: Stage) -> None:
    _, key = await stage.key(scopes=["projects:read"], project_ids=[OWN])
    answer = await stage.ask(("POST", "/projects/{project}/shell"), key)
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert (error["code"], error["info"]) == ("FORBIDDEN", {"scope": "projects:execute"})
    assert "projects:execute" in error["message"]


async def test_another_projects_command_is_404_and_another_project_403(stage: Stage) -> None:
    _, key = await stage.key(scopes=["projects:read", "projects:execute"], project_ids=[OWN])
    for method, path, status in [
        ("GET", "/commands/{command}", 404),
        ("DELETE", "/commands/{command}", 404),
        ("GET", "/commands/{command}/output", 404),
        ("GET", "/commands/{command}/events", 404),
        ("GET", "/projects/{project}/commands", 403),
        ("POST", "/projects/{project}/shell", 403),
    ]:
        answer = await stage.ask((method, path), key, project=FOREIGN)
        assert answer.status_code == status, (method, path, answer.text)
    # A command of another project under one's own is none, as for any key.
    events = f"/projects/{OWN}/events?stream_id={stage.commands[FOREIGN]}"
    answer = await stage.api.http.get(events, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 404


async def test_what_a_key_did_bears_its_id(stage: Stage) -> None:
    id_, key = await stage.key(scopes=["projects:execute"], project_ids=[OWN])
    answer = await stage.ask(("POST", "/projects/{project}/shell"), key)
    command = await stage.api.ended(answer.json()["data"]["id"])
    assert command["key_id"] == id_


async def test_idempotency_keys_are_each_keys_own(stage: Stage) -> None:
    ids = set()
    for _ in range(2):
        _, key = await stage.key(scopes=["projects:execute"], project_ids=[OWN])
        for _ in range(2):
            answer = await stage.api.http.post(
                f"/projects/{OWN}/shell",
                json={"command": "true"},
                headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "the same"},
            )
            assert answer.status_code == 201
            ids.add(answer.json()["data"]["id"])
    assert len(ids) == 2


async def test_an_untrusted_story_about_the_client_is_refused(stage: Stage) -> None:
    answer = await stage.api.get(
        "/projects", headers={"X-Forwarded-For": "9.9.9.9", "Forwarded": "for=6.6.6.6"}
    )
    assert answer.status_code == 400
