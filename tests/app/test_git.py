"""git commands over HTTP, with the real git."""

import itertools

from tests.app.server import Api, Server


async def test_git_runs_without_a_shell_in_the_project(api: Api, server: Server) -> None:
    path = "/projects/demo/git"
    for args in (["init", "-q"], ["add", "-A"]):
        shown = await api.ended(await api.submit_body(path, {"args": args}))
        assert shown["status"] == "succeeded", args
    assert (server.projects / "demo" / ".git").is_dir()
    (server.projects / "demo" / "$(touch owned)").write_text("x")
    command = await api.submit_body(path, {"args": ["status", "--porcelain"]})
    assert (await api.ended(command))["status"] == "succeeded"
    assert b"$(touch owned)" in await api.output(command)
    assert not (server.projects / "demo" / "owned").exists()


async def test_the_status_of_git_is_passed_on(api: Api) -> None:
    command = await api.submit_body("/projects/demo/git", {"args": ["log", "no-such-branch"]})
    shown = await api.ended(command)
    assert (shown["status"], shown["exit_code"]) == ("failed", 128)
    assert b"no-such-branch" in await api.output(command, "stderr")


async def test_git_takes_a_list_only(api: Api) -> None:
    refused = await api.post("/projects/demo/git", {"args": "status; id"})
    assert refused.status_code == 400
    assert refused.json()["error"]["details"][0]["pointer"] == "/args"


async def test_commands_that_share_the_working_tree_take_turns(api: Api) -> None:
    await api.project("turns")
    commands = [
        await api.submit_body("/projects/turns/git", {"args": ["version"]}) for _ in range(4)
    ]
    shown = [await api.ended(command) for command in commands]
    assert {command["status"] for command in shown} == {"succeeded"}
    for before, after in itertools.pairwise(shown):
        assert before["finished_at"] <= after["started_at"]
