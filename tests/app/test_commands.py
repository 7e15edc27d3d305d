"""Submitting, reading and cancelling commands over HTTP, against a real server."""

import psycopg
import pytest
import trio

from rdev.adapters.postgres.embedded import running_embedded
from rdev.domain.pages import PAGE_BYTES
from tests.app.server import DEADLINE_S, Api, Json, Server

ACCEPTED = {
    "id", "project", "kind", "status", "priority", "queue_position", "stream_url", "created_at",
}  # fmt: skip
COMMAND = {
    "id", "project", "kind", "status", "priority", "attempt", "exit_code", "signal", "reason",
    "created_at", "started_at", "finished_at", "duration_ms", "queue_wait_ms", "stdout_bytes",
    "stderr_bytes", "dropped_bytes", "truncated", "argv", "key_id", "session_id", "usage", "kill",
}  # fmt: skip


def pointers(refused: Json) -> set[str]:
    return {fault["pointer"] for fault in refused["error"]["details"]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("shell", {"command": "true"}),
        ("git", {"args": ["status"]}),
        ("claude", {"prompt": "hello"}),
    ],
)
async def test_a_submission_is_201_with_the_fields_of_the_contract(
    api: Api, kind: str, body: Json
) -> None:
    made = await api.post(f"/projects/demo/{kind}", body)
    assert made.status_code == 201
    data = made.json()["data"]
    assert data.keys() == ACCEPTED
    assert made.headers["Location"] == f"/commands/{data['id']}"
    assert (data["kind"], data["project"], data["status"]) == (kind, "demo", "queued")
    assert data["priority"] == "normal"
    assert data["queue_position"] >= 1
    assert (await api.get(data["stream_url"])).status_code in (200, 204)
    assert (await api.get(made.headers["Location"])).status_code == 200
    await api.ended(data["id"])


async def test_a_command_that_ended_says_everything_of_the_contract(api: Api) -> None:
    shown = await api.run("printf out; printf error >&2; exit 3")
    assert shown.keys() >= COMMAND
    assert (shown["status"], shown["exit_code"], shown["signal"]) == ("failed", 3, None)
    assert (shown["stdout_bytes"], shown["stderr_bytes"]) == (3, 5)
    assert (shown["attempt"], shown["truncated"], shown["dropped_bytes"]) == (1, False, 0)
    assert shown["argv"] == ["sh", "-c", "printf out; printf error >&2; exit 3"]
    assert shown["created_at"] <= shown["started_at"] <= shown["finished_at"]
    assert shown["created_at"].endswith("Z")
    assert len(shown["created_at"]) == len("2026-01-15T10:30:00.123Z")
    assert isinstance(shown["duration_ms"], int)
    assert shown["queue_wait_ms"] >= 0


async def test_a_command_that_a_signal_ended_says_which(api: Api) -> None:
    shown = await api.run("kill -9 $$")
    assert (shown["status"], shown["exit_code"], shown["signal"]) == ("failed", None, 9)


async def test_wait_holds_the_answer_until_the_end(api: Api) -> None:
    made = await api.post(
        "/projects/demo/shell?wait=30", {"command": "echo out; echo error >&2; exit 4"}
    )
    assert made.status_code == 201
    data = made.json()["data"]
    assert data["status"] == "failed"
    assert data["exit_code"] == 4
    assert data["duration_ms"] >= 0
    assert (data["stdout_tail"], data["stderr_tail"]) == ("out\n", "error\n")


async def test_wait_ends_after_its_seconds_with_the_command_running(api: Api) -> None:
    made = await api.post("/projects/demo/shell?wait=0.5", {"command": "echo begun; sleep 60"})
    assert made.status_code == 201
    data = made.json()["data"]
    assert (data["status"], data["exit_code"], data["duration_ms"]) == ("running", None, None)
    assert data["stdout_tail"] == "begun\n"
    await api.http.delete(f"/commands/{data['id']}")
    await api.ended(data["id"])


@pytest.mark.parametrize("wait", ["-1", "61", "x", "nan", "inf", "1_0", "٣", "1e1"])
async def test_a_bad_wait_is_400_and_stores_nothing(api: Api, wait: str) -> None:
    await api.project("waiting")
    refused = await api.post(f"/projects/waiting/shell?wait={wait}", {"command": "true"})
    assert refused.status_code == 400
    assert "wait" in refused.json()["detail"]
    assert (await api.get("/projects/waiting/commands")).json()["data"] == []


async def test_the_list_is_newest_first_filtered_and_in_pages(api: Api) -> None:
    await api.project("listing")
    path = "/projects/listing"
    made = []
    for number in range(5):
        made.append(await api.submit(f"exit {number % 2}", project="listing"))
        await api.ended(made[-1])
    made.append(await api.submit_body(f"{path}/git", {"args": ["status"]}))
    await api.ended(made[-1])

    async def listed(query: str) -> list[str]:
        response = await api.get(f"{path}/commands?{query}")
        assert response.status_code == 200
        return [command["id"] for command in response.json()["data"]]

    newest_first = made[::-1]
    assert await listed("") == newest_first
    assert await listed("kind=git") == made[5:]
    assert await listed("status=failed&kind=shell") == [made[3], made[1]]
    seen, cursor = [], ""
    while cursor is not None:
        page = (await api.get(f"{path}/commands?limit=4{cursor}")).json()
        seen += [command["id"] for command in page["data"]]
        following = page["meta"].get("next_cursor")
        cursor = None if following is None else f"&cursor={following}"
    assert seen == newest_first


async def test_a_page_of_large_commands_is_bounded_in_bytes(api: Api) -> None:
    await api.project("large")
    row_bytes = 131_000
    made = [await api.submit("true".ljust(row_bytes), project="large") for _ in range(20)]

    seen, cursor = [], ""
    while cursor is not None:
        answer = await api.get(f"/projects/large/commands?limit=200{cursor}")
        page = answer.json()
        assert len(page["data"]) >= 1
        assert len(answer.content) < PAGE_BYTES + row_bytes + 2_000
        seen += [command["id"] for command in page["data"]]
        following = page["meta"].get("next_cursor")
        cursor = None if following is None else f"&cursor={following}"

    assert seen == made[::-1]
    for command in made:
        await api.ended(command)


@pytest.mark.parametrize("query", ["status=nope", "kind=nope", "cursor=nope", "limit=0"])
async def test_a_bad_filter_is_400(api: Api, query: str) -> None:
    assert (await api.get(f"/projects/demo/commands?{query}")).status_code == 400


@pytest.mark.parametrize("command", ["cmd_" + "0" * 32, "nope", "%00", "cmd_" + "F" * 32])
@pytest.mark.parametrize("path", ["", "/events", "/output"])
async def test_an_unknown_command_is_404(api: Api, command: str, path: str) -> None:
    missing = await api.get(f"/commands/{command}{path}")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "NOT_FOUND"


async def test_cancelling_an_unknown_command_is_404(api: Api) -> None:
    assert (await api.http.delete("/commands/cmd_" + "0" * 32)).status_code == 404


async def test_a_queued_command_is_cancelled_at_once_with_its_last_events(api: Api) -> None:
    await api.project("full")
    busy = [await api.submit("sleep 60", project="full") for _ in range(4)]
    for command in busy:
        await api.running(command)
    queued = await api.submit("echo never", project="full")
    assert (await api.command(queued))["queue_position"] == 1
    async with api.stream(queued) as events, trio.open_nursery() as nursery:

        async def cancel() -> None:
            cancelled = await api.http.delete(f"/commands/{queued}")
            assert cancelled.status_code == 202
            data = cancelled.json()["data"]
            assert (data["status"], data["reason"]) == ("cancelled", "cancelled")

        seen = []
        with trio.fail_after(DEADLINE_S):
            async for event in events:
                seen.append(event)
                if event.seq == 1:
                    nursery.start_soon(cancel)
    named = [(event.name, event.seq, event.data["status"]) for event in seen[1:]]
    assert named == [
        ("status", 1, "queued"), ("status", 2, "cancelled"), ("complete", 3, "cancelled"),
    ]  # fmt: skip
    assert seen[-1].data["exit_code"] is None
    for command in busy:
        await api.http.delete(f"/commands/{command}")
    for command in busy:
        await api.ended(command)


async def test_a_running_command_is_cancelled_with_all_it_started(api: Api, server: Server) -> None:
    command = await api.submit("sleep 987654 & sleep 987654 & echo $!; wait")
    await until_output(api, command)
    cancelled = await api.http.delete(f"/commands/{command}")
    assert cancelled.status_code == 202
    shown = await api.ended(command)
    assert (shown["status"], shown["reason"]) == ("cancelled", "cancelled")
    assert shown["kill"] == {"confirmed": True, "survivors": []}
    assert not [argv for argv in server.processes().values() if "987654" in argv]


async def test_a_command_that_ignores_term_is_killed(api: Api) -> None:
    command = await api.submit("trap '' TERM; echo ready; while :; do sleep 1; done")
    await until_output(api, command)
    await api.http.delete(f"/commands/{command}")
    shown = await api.ended(command)
    assert (shown["status"], shown["signal"]) == ("cancelled", 9)
    assert shown["kill"]["confirmed"] is True


async def test_cancelling_an_ended_command_changes_nothing(api: Api) -> None:
    command = await api.submit("exit 3")
    before = await api.ended(command)
    cancelled = await api.http.delete(f"/commands/{command}")
    assert cancelled.status_code == 202
    assert await api.command(command) == before


async def test_environment_folder_and_stdin_are_the_clients(api: Api, server: Server) -> None:
    folder = server.projects / "demo" / "deep" / "er"
    folder.mkdir(parents=True, exist_ok=True)
    value = "spaces, 'quotes', \"more\", $HOME `id` \\ \n and ünïcode"
    command = await api.submit(
        'printf %s "$VALUE"; echo; pwd; cat', env={"VALUE": value}, cwd="deep/er", stdin="a\0b\n"
    )
    await api.ended(command)
    expected = f"{value}\n{folder.resolve()}\na\0b\n"
    assert (await api.output(command)).decode() == expected


async def test_a_command_starts_in_the_projects_folder_with_an_empty_stdin(
    api: Api, server: Server
) -> None:
    command = await api.submit("pwd; cat; echo end")
    await api.ended(command)
    assert await api.output(command) == f"{server.projects / 'demo'}\nend\n".encode()


@pytest.mark.parametrize("cwd", ["/", "..", "a/../..", "/etc"])
async def test_a_folder_outside_of_the_project_is_refused(api: Api, cwd: str) -> None:
    refused = await api.post("/projects/demo/shell", {"command": "true", "cwd": cwd})
    assert refused.status_code == 400
    assert pointers(refused.json()) == {"/cwd"}


async def test_a_folder_that_is_not_there_fails_the_command(api: Api) -> None:
    shown = await api.run("true", cwd="not/there")
    assert (shown["status"], shown["exit_code"]) == ("failed", 126)


@pytest.mark.parametrize("name", ["", "A=B", "MY-VAR", "1ST", "UID", "PPID", "RDEV_KEY", "Ä"])
async def test_an_environment_name_that_cannot_be_set_is_refused(api: Api, name: str) -> None:
    refused = await api.post("/projects/demo/shell", {"command": "true", "env": {name: "x"}})
    assert refused.status_code == 400
    assert pointers(refused.json()) == {f"/env/{name}"}


async def test_a_command_over_its_time_is_ended(api: Api) -> None:
    shown = await api.run("echo begun; sleep 60", timeout_s=1)
    assert (shown["status"], shown["reason"]) == ("timed_out", "timeout")
    assert shown["kill"]["confirmed"] is True
    assert shown["stdout_bytes"] == 6


async def test_commands_run_by_priority_then_by_age(api: Api, server: Server) -> None:
    await api.project("order")
    gate = server.state_dir / "gate"
    # One place of the lane's four: they start one after the other.
    scripts = ["sleep 60"] * 3 + [f"while [ ! -e {gate} ]; do sleep 0.05; done"]
    busy = [await api.submit(script, project="order") for script in scripts]
    for command in busy:
        await api.running(command)
    queued = [
        await api.submit("sleep 0.01", project="order", priority=priority)
        for priority in ("low", "normal", "high", "low", "normal", "high")
    ]
    positions = [(await api.command(command))["queue_position"] for command in queued]
    assert positions == [5, 3, 1, 6, 4, 2]
    gate.touch()
    starts = [(await api.ended(command))["started_at"] for command in queued]
    by_start = sorted(range(6), key=lambda index: (starts[index], queued[index]))
    assert [("low", "normal", "high")[index % 3] for index in by_start] == [
        "high", "high", "normal", "normal", "low", "low",
    ]  # fmt: skip
    for command in busy[:3]:
        await api.http.delete(f"/commands/{command}")
    for command in busy:
        await api.ended(command)


async def test_a_command_that_waited_too_long_expires(api: Api) -> None:
    await api.project("expiring")
    busy = [await api.submit("sleep 60", project="expiring") for _ in range(4)]
    for command in busy:
        await api.running(command)
    queued = await api.submit("echo never", project="expiring", expires_in_s=1)
    shown = await api.ended(queued)
    assert (shown["status"], shown["started_at"]) == ("expired", None)
    events = await api.events(queued)
    assert [event.name for event in events] == ["connected", "status", "status", "complete"]
    assert events[-1].data["status"] == "expired"
    for command in busy:
        await api.http.delete(f"/commands/{command}")
    for command in busy:
        await api.ended(command)


async def test_all_faults_of_a_body_are_told_together(api: Api) -> None:
    body = {"command": 7, "timeout_s": 0, "priority": "urgent", "env": {"A": 1}, "nope": True}
    refused = await api.post("/projects/demo/shell", body)
    assert refused.status_code == 400
    expected = {"/command", "/timeout_s", "/priority", "/env/A", "/nope"}
    assert pointers(refused.json()) == expected


@pytest.mark.parametrize("kind", ["shell", "git", "claude"])
async def test_an_empty_body_names_what_is_missing(api: Api, kind: str) -> None:
    refused = await api.post(f"/projects/demo/{kind}", {})
    assert refused.status_code == 400
    assert len(pointers(refused.json())) == 1


async def test_secrets_of_a_command_leave_the_database_with_it(api: Api, server: Server) -> None:
    """Environment and stdin are cleared when the command ends."""
    command = await api.submit("true", env={"TOKEN": "canary-of-env"}, stdin="canary-of-stdin")
    await api.ended(command)
    dsn = running_embedded(server.state_dir)
    assert dsn is not None
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select to_jsonb(c)::text, c.spec from commands c").fetchall()
    assert not [row for row in rows if "canary-of" in row[0]]
    assert {row[1] for row in rows if command.removeprefix("cmd_") in row[0].replace("-", "")} == {
        None
    }


async def test_what_the_server_knows_is_never_in_a_commands_environment(
    api: Api, server: Server
) -> None:
    command = await api.submit("env; cat /proc/$$/environ | tr '\\0' '\\n'")
    await api.ended(command)
    seen = (await api.output(command)).decode()
    assert server.key not in seen
    names = {line.partition("=")[0] for line in seen.splitlines()}
    assert names <= {"PATH", "HOME", "LANG", "PWD", "RDEV_COMMAND_ID", "_", "SHLVL", "OLDPWD"}
    assert f"RDEV_COMMAND_ID={command}" in seen


async def until_output(api: Api, command: str) -> None:
    with trio.fail_after(DEADLINE_S):
        while (await api.command(command))["stdout_bytes"] == 0:
            await trio.sleep(0.02)
