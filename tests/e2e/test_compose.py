"""The shipped compose file, driven from outside: keys, commands, streams, webhooks, restarts."""

import json
import os

import pytest
import trio
from standardwebhooks import Webhook

from tests.app.server import Api, Event, Json, output_of, probe, seqs_of, until
from tests.e2e.stack import DEADLINE_S, REASONS, URL, Stack

# 40 lines a second for as long as a test may take: it is there to be watched, and then ended.
TICKING = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line-$i; sleep 0.025; done"


async def make_key(api: Api, **fields: object) -> Json:
    made = await api.post("/keys", {"name": "e2e", "scopes": ["projects:read"], **fields})
    assert made.status_code == 201, made.text
    data: Json = made.json()["data"]
    return data


async def status_with(api: Api, key: object) -> int:
    answer = await api.http.get("/projects", headers={"Authorization": f"Bearer {key}"})
    return answer.status_code


async def some_of(api: Api, command: str, *, lines: int, after: int | None = None) -> list[Event]:
    """The events until so many lines came, or the stream ended; then the connection is cut."""
    found: list[Event] = []
    with trio.fail_after(DEADLINE_S):
        async with api.stream(command, last_id=after) as events:
            async for event in events:
                found.append(event)
                if len([one for one in found if one.name == "output"]) >= lines:
                    break
    return found


def test_it_ran_or_the_reason_is_a_known_one() -> None:
    reason = os.environ.get("RDEV_TEST_NO_ENGINE")
    assert reason is None or reason in REASONS


def test_migrations_ran_before_the_server_and_ended_well(stack: Stack) -> None:
    state = stack.state("migrate")["State"]
    assert isinstance(state, dict)
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    stack.compose("run", "--rm", "--no-deps", "migrate", "migrate", "verify")


async def test_a_key_is_made_used_and_revoked(api: Api) -> None:
    made = await make_key(api)
    assert await status_with(api, made["key"]) == 200
    refused = await api.http.post(
        "/projects/demo/shell",
        json={"command": "true"},
        headers={"Authorization": f"Bearer {made['key']}"},
    )
    assert refused.status_code == 403
    gone = await api.http.delete(f"/keys/{made['id']}")
    assert gone.status_code in (200, 204), gone.text
    assert await status_with(api, made["key"]) == 401
    assert await status_with(api, "rdev_sk_nothing") == 401


async def test_commands_tell_their_bytes_and_their_exit_codes(api: Api) -> None:
    good = await api.run("printf 'a\\nb'; echo oops >&2; id -u; exit 0")
    bad = await api.run("exit 7")

    assert (good["status"], good["exit_code"]) == ("succeeded", 0)
    assert await api.output(str(good["id"])) == b"a\nb10001\n"
    assert await api.output(str(good["id"]), "stderr") == b"oops\n"
    assert (bad["status"], bad["exit_code"]) == ("failed", 7)


async def test_git_runs_in_the_container(api: Api) -> None:
    """Where the base has it: that of base.sh does, Python's own does not."""
    if (await api.run("command -v git"))["status"] != "succeeded":
        pytest.skip("the base has no git")
    done = await api.run("git init -q repo && git -C repo status --porcelain=v2 --branch")
    assert done["status"] == "succeeded", done
    assert b"# branch.oid (initial)" in await api.output(str(done["id"]))


async def test_a_stream_that_is_cut_goes_on_where_it_was(api: Api) -> None:
    command = await api.submit(
        "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo $i; sleep 0.01; done"
    )
    first = await some_of(api, command, lines=20)
    rest = await api.events(command, last_id=seqs_of(first)[-1])

    assert output_of(first + rest) == b"".join(b"%d\n" % n for n in range(1, 201))
    assert rest[-1].name == "complete"
    seqs = seqs_of(first + rest)
    assert seqs == sorted(set(seqs))


async def test_a_webhook_arrives_signed(api: Api, stack: Stack) -> None:
    wanted = {"url": "http://receiver:9000/hooks", "events": ["command.completed"]}
    made = await api.post("/webhooks", wanted)
    assert made.status_code == 201, made.text
    hook: Json = made.json()["data"]
    command = await api.run("echo for the hook")
    found: list[Json] = []

    def arrived() -> bool:
        found[:] = [one for one in stack.received() if str(command["id"]) in str(one["body"])]
        return bool(found)

    await trio.to_thread.run_sync(lambda: until(arrived, "the webhook arrives"))
    headers = found[0]["headers"]
    assert isinstance(headers, dict)
    event = Webhook(str(hook["secret"])).verify(str(found[0]["body"]), headers)
    assert event["type"] == "command.completed"
    await api.http.delete(f"/webhooks/{hook['id']}")


async def test_a_restart_keeps_everything_and_a_stream_tells_how_it_ended(
    api: Api, stack: Stack
) -> None:
    done = await api.run("echo kept; echo $RANDOM > here")
    command = await api.submit(TICKING)
    first = await some_of(api, command, lines=10)

    await trio.to_thread.run_sync(lambda: stack.compose("restart", "--timeout=45", "rdev"))
    await trio.to_thread.run_sync(lambda: until(_is_ready, "it is ready again"))

    rest = await api.events(command, last_id=seqs_of(first)[-1])
    ended = await api.command(command)
    # The container took its processes along: no success is invented, no byte lost or doubled.
    assert (ended["status"], ended["reason"]) == ("lost", "supervisor_gone"), ended
    assert rest[-1].name == "complete"
    lines = output_of(first + rest).decode().splitlines()
    assert lines == [f"line-{n}" for n in range(1, len(lines) + 1)]
    assert await api.output(str(done["id"])) == b"kept\n"
    assert (await api.run("cat here"))["status"] == "succeeded"


async def test_a_killed_server_comes_back_with_its_commands_told(api: Api, stack: Stack) -> None:
    command = await api.submit(TICKING)
    first = await some_of(api, command, lines=10)
    await trio.to_thread.run_sync(lambda: stack.compose("kill", "rdev"))
    await trio.to_thread.run_sync(stack.up)

    rest = await api.events(command, last_id=seqs_of(first)[-1])
    assert (await api.command(command))["status"] == "lost"
    lines = output_of(first + rest).decode().splitlines()
    assert lines == [f"line-{n}" for n in range(1, len(lines) + 1)]


@pytest.mark.parametrize("how", [("restart",), ("restart", "--timeout=0")], ids=["stop", "kill"])
async def test_a_database_that_restarts_loses_no_command(
    api: Api, stack: Stack, how: tuple[str, ...]
) -> None:
    script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; sleep 0.02; done"
    command = await api.submit(script)
    await api.running(command)
    await trio.to_thread.run_sync(lambda: stack.compose(*how, "database"))
    await trio.to_thread.run_sync(lambda: until(_is_ready, "it is ready again"))

    ended = await api.ended(command)
    assert (ended["status"], ended["exit_code"]) == ("succeeded", 0)
    assert await api.output(command) == b"".join(b"%d\n" % n for n in range(1, 301))


async def test_what_was_made_outlives_containers_that_are_made_anew(api: Api, stack: Stack) -> None:
    key = await make_key(api)
    hook = (
        await api.post("/webhooks", {"url": "http://receiver:9000/x", "events": ["ping"]})
    ).json()
    done = await api.run("echo kept > file; seq 1000")
    before = await api.output(str(done["id"]))
    old = stack.state("rdev")["Id"]

    await trio.to_thread.run_sync(stack.down)
    assert probe(URL + "/health") is None
    await trio.to_thread.run_sync(stack.up)

    assert stack.state("rdev")["Id"] != old
    assert await status_with(api, key["key"]) == 200
    assert (await api.get(f"/webhooks/{hook['data']['id']}")).status_code == 200
    assert await api.output(str(done["id"])) == before
    assert (await api.command(str(done["id"])))["status"] == "succeeded"
    again = await api.run("cat file")
    assert await api.output(str(again["id"])) == b"kept\n"
    await api.http.delete(f"/webhooks/{hook['data']['id']}")


def test_the_server_stops_cleanly_within_its_grace(stack: Stack) -> None:
    stack.compose("stop", "rdev")
    state = stack.state("rdev")["State"]
    assert isinstance(state, dict)
    logs = stack.log("rdev")
    stack.up()

    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert "Traceback" not in logs
    assert [line for line in logs.splitlines() if '"level":"error"' in line] == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/metrics"])
async def test_it_answers_whoever_looks_after_it(api: Api, path: str) -> None:
    assert (await api.get(path)).status_code == 200


def _is_ready() -> bool:
    return probe(URL + "/ready") == 200


def test_secrets_of_the_stack_are_in_no_log(stack: Stack) -> None:
    logs = stack.compose("logs").stdout
    assert stack.key not in logs
    assert stack.password not in logs
    assert json.dumps(stack.password) not in logs
