"""claude commands with a fake command line that prints recorded lines; one with the real one."""

import json
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.app.server import (
    DEADLINE_S,
    FAKE_CLAUDE,
    Api,
    Event,
    Json,
    Server,
    open_api,
    open_server,
    seqs_of,
)

PATH = "/projects/demo/claude"


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    command = f"{sys.executable} {FAKE_CLAUDE}"
    with open_server(quick_place, RDEV_CLAUDE_COMMAND=command) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    async with open_api(server) as api:
        await api.project()
        yield api


async def run(api: Api, prompt: str, **fields: object) -> tuple[Json, list[Event]]:
    command = await api.submit_body(PATH, {"prompt": prompt, **fields})
    return await api.ended(command), await api.events(command)


def agents_of(events: list[Event]) -> list[Json]:
    return [event.data for event in events if event.name == "agent"]


def lines_of(events: list[Event]) -> list[str]:
    return [str(event.data["line"]) for event in events if event.name == "output"]


async def test_every_line_of_the_agent_is_an_output_and_an_agent_event(api: Api) -> None:
    shown, events = await run(api, "say hello")
    assert shown["status"] == "succeeded"
    named = [event.name for event in events[3:-2]]
    assert named == ["output", "agent"] * (len(named) // 2)
    assert [json.loads(line) for line in lines_of(events)] == agents_of(events)
    assert seqs_of(events) == list(range(1, len(events)))
    assert agents_of(events)[-1]["type"] == "result"


async def test_session_and_usage_are_recorded(api: Api) -> None:
    session = "11111111-2222-4333-8444-555555555555"
    shown, events = await run(api, "say hello", session_id=session)
    assert shown["session_id"] == session
    result = agents_of(events)[-1]
    assert shown["usage"]["usage"] == result["usage"]
    assert shown["usage"]["total_cost_usd"] == result["total_cost_usd"]
    assert "say hello" in shown["argv"]


async def test_an_agent_that_says_is_error_has_failed(api: Api) -> None:
    shown, events = await run(api, "logged-out")
    assert (shown["status"], shown["exit_code"]) == ("failed", 1)
    assert agents_of(events)[-1]["is_error"] is True


async def test_an_unknown_session_has_failed(api: Api) -> None:
    shown, _ = await run(api, "resume-unknown", resume="11111111-2222-4333-8444-555555555555")
    assert shown["status"] == "failed"


async def test_what_is_no_json_is_output_only(api: Api) -> None:
    shown, events = await run(api, "garbage")
    assert shown["status"] == "succeeded"
    lines = [event for event in events if event.name == "output"]
    assert len(lines) == len(agents_of(events)) + 4
    assert {"type": "brand_new_thing", "x": 1} in agents_of(events)
    assert {"type": "carriage"} in agents_of(events)


async def test_a_line_too_long_for_an_event_is_named_and_measured(api: Api) -> None:
    _, events = await run(api, "big-line")
    cut = [event for event in agents_of(events) if event.get("truncated")]
    assert [(event["type"], event["bytes"] > 400_000) for event in cut] == [("user", True)]


@pytest.mark.parametrize("text", ['"\\u0000"', '"' + "s" * 201 + '"', "7", "null", '"\\ud83d"'])
async def test_whatever_the_agent_says_of_itself_the_command_ends(
    odd_server: Server, text: str
) -> None:
    line = f'{{"type":"result","is_error":false,"session_id":{text},"usage":{{"x":{text}}}}}'
    async with open_api(odd_server) as api:
        await api.project()
        (odd_server.projects / "demo" / "said").write_text(line + "\n")
        shown, events = await run(api, "x")
    assert shown["status"] == "succeeded"
    assert agents_of(events)[0]["type"] == "result"


@pytest.fixture(scope="module")
def odd_server(quick_place: Path) -> Iterator[Server]:
    """A server whose agent prints a file of the project and takes no notice of its arguments."""
    with open_server(quick_place, RDEV_CLAUDE_COMMAND="sh -c 'cat said'") as server:
        yield server


async def test_a_prompt_is_one_argument_whatever_is_in_it(api: Api) -> None:
    prompt = "--version; $(touch owned) `id` 'quotes' \"more\" \n ünïcode"
    shown, _ = await run(api, prompt)
    assert shown["status"] == "succeeded"
    assert prompt in shown["argv"]


async def test_a_bad_claude_request_names_every_fault(api: Api) -> None:
    body = {
        "prompt": "  ", "session_id": "x", "max_turns": 0, "permission_mode": "yolo",
        "allowed_tools": ["Edit", "--evil"], "mcp_config": {}, "stdin": "x",
    }  # fmt: skip
    refused = await api.post(PATH, body)
    assert refused.status_code == 400
    pointers = {fault["pointer"] for fault in refused.json()["error"]["details"]}
    assert pointers == {
        "/prompt", "/session_id", "/max_turns", "/permission_mode", "/allowed_tools/1",
        "/mcp_config", "/stdin",
    }  # fmt: skip


async def test_an_agent_that_is_not_installed_fails_with_127(quick_place: Path) -> None:
    with open_server(quick_place, RDEV_CLAUDE_COMMAND="no-such-agent --flag") as server:
        async with open_api(server) as api:
            await api.project()
            shown, _ = await run(api, "x")
            assert (shown["status"], shown["exit_code"]) in (("failed", 127), ("failed", 126))


async def test_a_take_over_in_mid_run_keeps_the_agents_events_complete(quick_place: Path) -> None:
    command_line = f"{sys.executable} {FAKE_CLAUDE}"
    with open_server(quick_place, RDEV_CLAUDE_COMMAND=command_line) as server:
        async with open_api(server) as api:
            await api.project()
            whole = agents_of((await run(api, "say hello"))[1])
            command = await api.submit_body(PATH, {"prompt": "slow please"})
            with trio.fail_after(DEADLINE_S):
                async with api.stream(command) as events:
                    async for event in events:
                        if event.name == "agent":
                            break
        server.kill()
        server.start()
        async with open_api(server) as api:
            shown = await api.ended(command)
            events = await api.events(command)
    assert shown["status"] == "succeeded"
    assert seqs_of(events) == list(range(1, len(events)))
    assert [event["type"] for event in agents_of(events)] == [event["type"] for event in whole]
    assert [json.loads(line) for line in lines_of(events)] == agents_of(events)
    assert shown["session_id"]
    assert shown["usage"]


@pytest.mark.full
async def test_an_agent_that_hangs_after_its_result_is_ended(api: Api) -> None:
    command = await api.submit_body(PATH, {"prompt": "hang-after-result"})
    with trio.fail_after(60):
        while (shown := await api.command(command))["status"] in ("queued", "running"):
            await trio.sleep(0.2)
    assert shown["kill"]["confirmed"] is True
    assert shown["status"] != "cancelled"
    assert shown["usage"]


@pytest.mark.skipif(shutil.which("claude") is None, reason="the real claude is not installed")
async def test_the_real_agent_logged_out_fails_with_its_own_words(
    quick_place: Path, tmp_path: Path
) -> None:
    real = shutil.which("claude")
    node = shutil.which("node") or real
    folders = f"{Path(str(node)).parent}:/usr/bin:/bin"
    line = f"env HOME={tmp_path} PATH={folders} {real}"
    with open_server(quick_place, RDEV_CLAUDE_COMMAND=line) as server:
        async with open_api(server) as api:
            await api.project()
            command = await api.submit_body(PATH, {"prompt": "say hello"})
            with trio.fail_after(100):
                while (shown := await api.command(command))["status"] in ("queued", "running"):
                    await trio.sleep(0.2)
            assert shown["status"] == "failed"
            assert any(event.get("is_error") for event in agents_of(await api.events(command)))
