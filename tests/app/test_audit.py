"""The audit log over HTTP, on a real server: what was done is there, in a chain that verifies."""

import json
from itertools import pairwise
from pathlib import Path

import msgspec
import psycopg
import pytest
import trio

from rdev.adapters.postgres.embedded import running_embedded
from tests.app.server import DEADLINE_S, Api, Json, Server, rdev, until_async

MANY = 100_000
# Some 50 MB of lines; what is held of them at a time is a thousand.
EXPORT_BYTES_MAX = 24 << 20


async def entries(api: Api, wanted: int = 1, **parameters: str) -> list[Json]:
    """Every entry that the filter lets through, newest first, once there are as many."""
    with trio.fail_after(DEADLINE_S):
        while True:
            found: list[Json] = []
            cursor = None
            while True:
                more = {} if cursor is None else {"cursor": cursor}
                answer = await api.get("/audit", params={**parameters, **more, "limit": "200"})
                assert answer.status_code == 200, answer.text
                body = answer.json()
                found += msgspec.convert(body["data"], list[Json])
                cursor = body["meta"].get("next_cursor")
                if cursor is None:
                    break
            if len(found) >= wanted:
                return found
            await trio.sleep(0.1)


async def test_a_command_leaves_its_entries(api: Api):
    command = await api.submit("echo hello")
    await api.ended(command)
    found = [e for e in await entries(api, 3, project="demo") if e["target"] == command]
    while len(found) < 3:
        found = [e for e in await entries(api, 3, project="demo") if e["target"] == command]
    assert found[-1]["action"] == "command.submitted"
    assert found[-1]["actor"] == {"id": "key_admin", "name": "bootstrap"}
    assert [e["outcome"] for e in found] == ["ok"] * len(found)


async def test_the_log_verifies(api: Api):
    await api.run("true")
    await entries(api, 3)
    verdict = (await api.get("/audit/verify")).json()["data"]
    assert verdict["valid"] is True
    assert verdict["checked"] >= 3
    assert verdict["fault"] is None


async def test_entries_are_a_chain(api: Api):
    await api.run("true")
    found = await entries(api, 3)
    for newer, older in pairwise(found):
        assert newer["seq"] == int(str(older["seq"])) + 1
        assert newer["prev_hash"] == older["hash"]


async def test_the_export_holds_all_in_order(api: Api):
    await api.run("true")
    shown = await entries(api, 3)
    export = await api.get("/audit/export")
    assert export.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in export.text.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= len(shown)
    rest = await api.get("/audit/export", params={"after": str(len(lines) - 1)})
    assert json.loads(rest.text.splitlines()[0]) == lines[-1]


async def test_pages_follow_one_another(api: Api):
    await api.run("true")
    await entries(api, 3)
    first = (await api.get("/audit", params={"limit": "2"})).json()
    cursor = first["meta"]["next_cursor"]
    second = (await api.get("/audit", params={"limit": "2", "cursor": cursor})).json()
    seqs = [e["seq"] for e in first["data"] + second["data"]]
    assert seqs == list(range(seqs[0], seqs[0] - 4, -1))[: len(seqs)]


async def test_times_limit_what_is_shown(api: Api):
    await api.run("true")
    (newest, *_) = await entries(api, 3)
    at = str(newest["at"])
    before = (await api.get("/audit", params={"until": "2020-01-01T00:00:00Z"})).json()
    assert before["data"] == []
    assert "next_cursor" not in before["meta"]
    assert await entries(api, 1, since=at)
    later = (await api.get("/audit", params={"since": "2999-01-01T00:00:00Z"})).json()
    assert later["data"] == []
    wrong = await api.get("/audit", params={"since": "yesterday"})
    assert wrong.status_code == 400


async def test_a_filter_that_can_match_nothing_is_told_or_finds_nothing(api: Api):
    for text in ("a\0b", "x" * 500):
        assert (await api.get("/audit", params={"actor": text})).status_code == 400
    for text in ("nobody", "é" * 20, "'; drop table audit_entries; --", "\ufffd"):
        answer = await api.get("/audit", params={"action": text})
        assert (answer.status_code, answer.json()["data"]) == (200, [])


async def test_a_denial_is_an_entry_and_the_rest_is_a_count(api: Api):
    for _ in range(5):
        refused = await api.get("/queue", headers={"Authorization": "Bearer nobody"})
        assert refused.status_code == 401
    found = await entries(api, 1, action="access.denied")
    mine = [e for e in found if e["target"] == "GET /queue"]
    assert len(mine) == 1
    assert (mine[0]["outcome"], mine[0]["actor"]) == ("denied", {"id": "anonymous", "name": ""})
    assert mine[0]["detail"] == {"reason": "UNAUTHORIZED"}


async def test_a_key_of_a_project_sees_its_entries_alone(api: Api):
    await api.project("other")
    await api.ended(await api.submit("true"))
    await api.ended(await api.submit("true", project="other"))
    body = {"name": "auditor", "scopes": ["audit:read"], "project_ids": ["other"]}
    made = await api.post("/keys", body)
    key = {"Authorization": f"Bearer {made.json()['data']['key']}"}
    with trio.fail_after(DEADLINE_S):
        while not (found := (await api.get("/audit", headers=key)).json()["data"]):
            await trio.sleep(0.1)
    assert {e["project"] for e in found} == {"other"}
    assert (await api.get("/audit", headers=key, params={"project": "demo"})).json()["data"] == []
    export = (await api.get("/audit/export", headers=key)).text.splitlines()
    assert {json.loads(line)["project"] for line in export} == {"other"}


async def test_without_the_scope_nothing_is_shown(api: Api):
    made = await api.post("/keys", {"name": "reader", "scopes": ["projects:read"]})
    key = {"Authorization": f"Bearer {made.json()['data']['key']}"}
    for path in ("/audit", "/audit/export", "/audit/verify"):
        assert (await api.get(path, headers=key)).status_code == 403


def checkpoints_of(server: Server) -> Path:
    return server.state_dir / "audit-checkpoints"


async def test_the_command_line_verifies_the_log_and_its_checkpoints(server: Server, api: Api):
    await api.run("true")
    await entries(api, 3)
    with trio.fail_after(DEADLINE_S):
        while not checkpoints_of(server).exists():
            await trio.sleep(0.1)
    verify = ["audit", "verify", "--checkpoints", str(checkpoints_of(server))]
    done = await trio.to_thread.run_sync(lambda: rdev(*verify, environment=server.environment))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"entries verified" in done.stdout
    assert b"checkpoints agree" in done.stdout
    asked = ["audit", "verify", "--url", server.url]
    done = await trio.to_thread.run_sync(
        lambda: rdev(*asked, environment=server.client_environment)
    )
    assert done.returncode == 0, done.stderr
    assert b"entries verified" in done.stdout


async def test_the_command_line_names_a_checkpoint_that_was_forged(
    server: Server, api: Api, tmp_path: Path
):
    await api.run("true")
    await entries(api, 3)
    forged = tmp_path / "checkpoints"
    with trio.fail_after(DEADLINE_S):
        while not checkpoints_of(server).exists():
            await trio.sleep(0.1)
    line = json.loads(checkpoints_of(server).read_text().splitlines()[0])
    forged.write_text(json.dumps(line | {"hash": "00" * 32}) + "\n")
    verify = ["audit", "verify", "--checkpoints", str(forged)]
    done = await trio.to_thread.run_sync(lambda: rdev(*verify, environment=server.environment))
    assert done.returncode == 1
    assert b"checkpoint_forged" in done.stderr


async def test_the_server_serves_in_the_role_that_cannot_change_the_log(server: Server, api: Api):
    dsn = running_embedded(server.state_dir)
    assert dsn is not None
    with psycopg.connect(dsn) as owner:
        found = owner.execute(
            "select count(*) from pg_stat_activity where application_name like 'rdev%%' "
            "and datname = current_database()"
        ).fetchone()
        assert found is not None
        assert found[0] > 0
        row = owner.execute(
            "select has_table_privilege('rdev_app', 'audit_entries', 'update'), "
            "has_table_privilege('rdev_app', 'audit_entries', 'delete'), "
            "has_table_privilege('rdev_app', 'audit_entries', 'insert')"
        ).fetchone()
    assert row == (False, False, True)


@pytest.mark.slow
async def test_an_export_of_a_hundred_thousand_entries_takes_no_memory(server: Server, api: Api):
    dsn = running_embedded(server.state_dir)
    assert dsn is not None
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(
            """
            insert into audit_entries (actor, actor_name, action, target, project, detail)
            select 'key_1', 'bulk', 'command.submitted', 'cmd_' || n, 'bulk',
                   jsonb_build_object('argv', repeat('x', 200))
            from generate_series(1, %s::integer) n
            """,
            (MANY,),
        )

        def unsealed() -> int:
            row = owner.execute(
                "select (select count(*) from audit_entries) - (select count(*) from audit_seals)"
            ).fetchone()
            assert row is not None
            return int(row[0])

        await until_async(lambda: not unsealed(), "all is sealed")
    before = server.rss_bytes()
    lines = 0
    async with api.http.stream("GET", "/audit/export", params={"project": "bulk"}) as answer:
        async for chunk in answer.aiter_bytes():
            lines += chunk.count(b"\n")
    assert lines == MANY
    assert server.rss_bytes(peak=True) - before < EXPORT_BYTES_MAX
