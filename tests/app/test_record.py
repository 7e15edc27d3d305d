"""Who is named by the record of what clients ask for, against a real server."""

import psycopg
from psycopg.rows import dict_row

from rdev.adapters.postgres.embedded import running_embedded
from tests.app.server import Api, Json, Server

QUERY = """
select a.action, a.actor, a.actor_name, a.ip, a.request_id, a.detail, e.type, e.seq
from audit_entries a
left join events e on e.xid = a.xid and a.target = command_name(e.command_id)
where a.target = %s
order by a.xid, a.id
"""


def recorded(server: Server, command: str) -> list[Json]:
    dsn = running_embedded(server.state_dir)
    assert dsn is not None
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        return connection.execute(QUERY, (command,)).fetchall()


async def test_a_submission_and_a_cancel_name_the_key_the_address_and_the_request(
    api: Api, server: Server
) -> None:
    body = {"name": "deploy bot", "scopes": ["projects:execute"], "project_ids": ["demo"]}
    made = (await api.post("/keys", body)).json()["data"]
    credential = {"Authorization": f"Bearer {made['key']}"}
    submitted = await api.http.post(
        "/projects/demo/shell",
        json={"command": "sleep 60"},
        headers=credential | {"X-Request-ID": "req-of-the-submission"},
    )
    command = submitted.json()["data"]["id"]
    await api.running(command)
    await api.http.delete(
        f"/commands/{command}", headers=credential | {"X-Request-ID": "req-of-the-cancel"}
    )
    await api.ended(command)
    found = recorded(server, command)
    assert [one["action"] for one in found] == [
        "command.submitted",
        "command.started",
        "command.cancel_requested",
        "command.finished",
    ]
    for one, request_id in ((found[0], "req-of-the-submission"), (found[2], "req-of-the-cancel")):
        assert (one["actor"], one["actor_name"]) == (made["id"], "deploy bot")
        assert (one["ip"], one["request_id"]) == ("127.0.0.1", request_id)
    assert found[0]["detail"]["argv"] == ["sh", "-c", "sleep 60"]
    assert [one["type"] for one in found] == [
        "command.queued",
        "command.started",
        None,
        "command.cancelled",
    ]
    holders = {(one["actor"], one["ip"]) for one in (found[1], found[3])}
    assert holders == {("server", None)}


async def test_a_long_command_line_is_shortened_in_its_entry(api: Api, server: Server) -> None:
    command = await api.submit("true " + "x" * 9_000)
    await api.ended(command)
    argv = recorded(server, command)[0]["detail"]["argv"]
    assert argv[-1].endswith("…")
    assert sum(map(len, argv)) <= 4_097
