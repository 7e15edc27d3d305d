"""Secrets that are given to a whole server, and every place where they must not be.

What a command prints is its output and shown as such; what its `argv` says in clear, behind no name
and in no shape of a secret, is shown too. All else of this list is nowhere but where it is needed:
in `commands.spec` until the command has ended, and in the command's own process.
"""

import secrets
from collections.abc import Iterator

import msgspec
import psycopg
import pytest
import trio
from psycopg import sql

from rdev.adapters.postgres.embedded import running_embedded
from rdev.domain.signing import parse_secret
from tests.app.server import DEADLINE_S, Api, Server, open_api, open_server
from tests.fakes.otlp import Collector, open_collector

NAMES = (
    "variable", "stdin", "option", "assignment", "userinfo", "header", "git_url", "wrong_key",
    "wrong_bearer", "cookie", "query", "body", "variable_in_argv", "webhook_path",
)  # fmt: skip
CANARIES = {name: f"canary{secrets.token_hex(12)}" for name in NAMES}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with open_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(quick_place, collector: Collector) -> Iterator[Server]:
    settings = {
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_WEBHOOK_SCHEDULE": "0.1",
        "RDEV_OTLP_ENDPOINT": collector.url,
        "RDEV_OTLP_METRICS_S": "1",
        "RDEV_TRACES_SAMPLE": "1",
    }
    with open_server(quick_place, RDEV_LOG_LEVEL="debug", **settings) as server:
        yield server


@pytest.fixture
async def said(server: Server, collector: Collector) -> dict[str, str]:
    """Everything that the server says anywhere, after all canaries went in."""
    async with open_api(server) as api:
        await api.project()
        said = await _submitted(api)
        said |= await _refused(api)
        said |= await _told(api)
        said |= await _hooked(api)
        await _sealed(api)
        export = await api.get("/audit/export")
        said["audit"] = export.text
    await trio.to_thread.run_sync(collector.await_, lambda: _is_told(collector), "traces came")
    said["traces and metrics"] = b"".join(collector.bodies).decode("latin-1")
    said["log"] = server.log
    said |= _stored(server)
    return said


def _is_told(collector: Collector) -> bool:
    names = {span.name for span in collector.spans}
    return {"process shell", "process git", "POST /keys"} <= names and len(collector.metrics) > 1


async def _submitted(api: Api) -> dict[str, str]:
    c = CANARIES
    script = (
        f"true --password={c['option']} ; DB_PASSWORD='{c['assignment']}' true ; "
        f"true https://me:{c['userinfo']}@host/ ; true -H 'Authorization: Bearer {c['header']}' ; "
        f"true {c['variable_in_argv']}"
    )
    env = {"MY_TOKEN": c["variable"], "OTHER_SECRET": c["variable_in_argv"]}
    shell = await api.submit(script, env=env, stdin=c["stdin"])
    url = f"https://me:{c['git_url']}@127.0.0.1:1/a.git"
    git = await api.submit_body("/projects/demo/git", {"args": ["ls-remote", url]})
    said = {}
    for command in (shell, git):
        said[f"command {command}"] = str(await api.ended(command))
        if command == shell:
            said["events"] = str(await api.events(command))
    said["commands"] = (await api.get("/projects/demo/commands")).text
    return said


async def _refused(api: Api) -> dict[str, str]:
    """Errors of all kinds, each with a canary in what was asked."""
    c = CANARIES
    asked = [
        api.get("/queue", headers={"X-API-Key": c["wrong_key"]}),
        api.get("/queue", headers={"Authorization": f"Bearer {c['wrong_bearer']}"}),
        api.get("/queue", headers={"Cookie": f"session={c['cookie']}"}),
        api.get(f"/queue?token={c['query']}&limit={c['query']}"),
        api.post("/keys", {"name": "x", "scopes": ["projects:read"], "password": c["body"]}),
        api.post("/projects/demo/shell", {"command": "true", "env": {c["body"]: 1}, "x": 1}),
    ]
    return {f"answer {number}": (await one).text for number, one in enumerate(asked)}


async def _told(api: Api) -> dict[str, str]:
    """A key: its text is in one answer and nowhere else."""
    made = await api.post("/keys", {"name": "x", "scopes": ["projects:read"]})
    key = msgspec.convert(made.json()["data"]["key"], str)
    CANARIES["key"] = key
    used = await api.get("/projects", headers={"Authorization": f"Bearer {key}"})
    assert used.status_code == 200
    denied = await api.get("/keys", headers={"X-API-Key": key})
    assert denied.status_code == 403
    id_ = made.json()["data"]["id"]
    turned = await api.post(f"/keys/{id_}/rotate", {})
    CANARIES["rotated key"] = turned.json()["data"]["key"]
    return {
        "keys": (await api.get("/keys")).text,
        "key": (await api.get(f"/keys/{id_}")).text,
        "denial": denied.text,
        "metrics": (await api.get("/metrics")).text,
    }


async def _hooked(api: Api) -> dict[str, str]:
    """A webhook's secrets: each is in one answer and nowhere else, also after attempts."""
    url = f"http://127.0.0.1:1/{CANARIES['webhook_path']}"
    made = await api.post("/webhooks", {"url": url, "events": ["ping"]})
    id_ = made.json()["data"]["id"]
    turned = await api.post(f"/webhooks/{id_}/rotate-secret", {})
    for name, answer in (("webhook secret", made), ("rotated webhook secret", turned)):
        secret = msgspec.convert(answer.json()["data"]["secret"], str)
        CANARIES[name] = secret.removeprefix("whsec_")
        CANARIES[f"{name}'s bytes"] = parse_secret(secret).key.hex()
    await api.post(f"/webhooks/{id_}/test", {})
    with trio.fail_after(DEADLINE_S):
        while not (listed := await _dead(api, id_)):
            await trio.sleep(0.1)
    return {
        "webhook": (await api.get(f"/webhooks/{id_}")).text,
        "webhooks": (await api.get("/webhooks")).text,
        "deliveries": listed,
        "changed webhook": (
            await api.http.patch(f"/webhooks/{id_}", json={"description": "x"})
        ).text,
    }


async def _dead(api: Api, webhook: str) -> str:
    """The only delivery that is dead, in detail; nothing while there is none."""
    found = (await api.get(f"/webhooks/{webhook}/deliveries", params={"status": "dead"})).json()
    if not found["data"]:
        return ""
    return (await api.get(f"/deliveries/{found['data'][0]['id']}")).text


async def _sealed(api: Api) -> None:
    with trio.fail_after(DEADLINE_S):
        while "webhook.changed" not in (await api.get("/audit", params={"limit": "200"})).text:
            await trio.sleep(0.1)


def _stored(server: Server) -> dict[str, str]:
    """Every row of every table, as text (bytes in hex too)."""
    dsn = running_embedded(server.state_dir)
    assert dsn is not None
    with psycopg.connect(dsn) as owner:
        tables = owner.execute(
            "select relname from pg_class where relnamespace = 'public'::regnamespace "
            "and relkind in ('r', 'p')"
        ).fetchall()
        return {
            f"table {name}": str(
                owner.execute(
                    sql.SQL("select t::text from {} t").format(sql.Identifier(name))
                ).fetchall()
            )
            for (name,) in tables
        }


@pytest.mark.slow
async def test_a_secret_is_in_no_answer_log_metric_entry_or_row(said: dict[str, str]):
    assert len(said) > 20
    found = [
        (name, place)
        for name, canary in CANARIES.items()
        for place, text in said.items()
        if canary in text or canary.encode().hex() in text
    ]
    assert [one for one in found if not _is_named_as_such(one)] == []


def _is_named_as_such(found: tuple[str, str]) -> bool:
    """A fault names the field it is about: the names in a body are the client's. Of a webhook's
    URL the endpoint itself tells, to whoever may see it."""
    name, place = found
    if name == "webhook_path":
        return place in ("webhook", "webhooks", "changed webhook", "table webhooks")
    return name == "body" and place == "answer 5"


@pytest.mark.slow
async def test_what_is_shown_of_a_command_is_redacted_and_not_left_out(said: dict[str, str]):
    assert "--password=[redacted]" in said["commands"]
    assert "me:[redacted]@host" in said["commands"]
    assert "[redacted]" in said["audit"]
