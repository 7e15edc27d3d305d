"""The whole road with projects in pods: a real server, a fake API server that runs what it is asked
to."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import trio

from tests.adapters.execution.observing import SYSTEM_PATH, processes_in
from tests.app.pods import FakeCluster, fake_cluster, serving
from tests.app.server import Server, open_api, output_of, probe, seqs_of, until_async
from tests.app.test_metrics import documented, families
from tests.fakes.api_server import NAMESPACE, NAMESPACE_UID


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def server(quick_place: Path, cluster: FakeCluster) -> AsyncIterator[Server]:
    async with serving(quick_place, cluster) as server:
        yield server


async def test_a_command_runs_in_a_pod_and_is_seen_line_by_line(server: Server) -> None:
    async with open_api(server) as api:
        await api.project()
        command = await api.submit("pwd; seq 1 2000; echo over >&2; exit 3")
        events = await api.events(command)
        ended = await api.ended(command)
    home, *lines = output_of(events).decode().splitlines()
    assert home.endswith("/demo/home")
    assert lines == [str(number) for number in range(1, 2_001)]
    assert output_of(events, "stderr") == b"over\n"
    assert seqs_of(events) == list(range(1, len(seqs_of(events)) + 1))
    assert (ended["status"], ended["exit_code"]) == ("failed", 3)


async def test_a_command_in_a_pod_is_cancelled_with_all_it_started(
    server: Server, cluster: FakeCluster
) -> None:
    async with open_api(server) as api:
        await api.project()
        command = await api.submit("setsid sleep 1000 & echo ready; wait")
        async with api.stream(command) as events:
            async for event in events:
                if event.name == "output":
                    break
        assert (await api.http.delete(f"/commands/{command}")).is_success
        ended = await api.ended(command)
    assert ended["status"] == "cancelled"
    await until_async(lambda: not processes_in(cluster.folder / "demo"), "nothing is left")


async def test_a_command_of_an_image_without_a_tool_fails_with_its_name(
    server: Server, cluster: FakeCluster, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dd", "env", "grep", "mkdir", "mv", "rm", "setsid", "sleep", "stat", "tail"):
        (tools / name).symlink_to(shutil.which(name, path=SYSTEM_PATH) or "")
    async with open_api(server) as api:
        cluster.add_pod("bare")
        cluster.api.execs.env = {"PATH": str(tools)}
        assert (await api.post("/projects", {"id": "bare"})).status_code == 503
        # One that was fit when it was made, and is another pod now.
        cluster.api.execs.env = {"PATH": SYSTEM_PATH}
        await api.project("bare")
        cluster.api.execs.env = {"PATH": str(tools)}
        command = await api.submit("true", project="bare")
        events = await api.events(command)
        ended = await api.ended(command)
        cluster.api.execs.env = {"PATH": SYSTEM_PATH}
        assert (await api.run("true", project="bare"))["status"] == "succeeded"
    assert (ended["status"], ended["exit_code"]) == ("failed", None)
    assert ended["reason"] == "project_unfit: missing mkfifo"
    assert events[-1].data["reason"] == ended["reason"]


async def test_the_page_and_the_server_name_the_same_metrics(server: Server) -> None:
    exported = await trio.to_thread.run_sync(families, server)
    page = {name: type_ for name, (type_, _) in documented(pods=True).items()}
    assert {name: family.type for name, family in exported.items()} == page


async def test_the_reach_is_the_namespace_of_this_cluster_alone(server: Server) -> None:
    async with open_api(server) as api:
        await api.project()
        project = (await api.get("/projects/demo")).json()["data"]
    assert project["executor"] == "kubernetes"
    assert '"namespace":"rdev"' in server.log
    assert NAMESPACE_UID in server.log


async def test_readiness_says_whether_the_cluster_answers(
    server: Server, cluster: FakeCluster
) -> None:
    async def report() -> dict[str, dict[str, object]]:
        async with httpx2.AsyncClient(trust_env=False) as http:
            checks: dict[str, dict[str, object]] = (await http.get(server.url + "/ready")).json()[
                "checks"
            ]
            return checks

    assert (await report())["kubernetes"]["status"] == "healthy"
    cluster.proxy.is_refusing = True
    cluster.proxy.cut_all()
    with trio.fail_after(30):
        while (await report())["kubernetes"]["status"] != "unhealthy":
            await trio.sleep(0.05)
    assert (await report())["database"]["status"] == "healthy"
    cluster.proxy.is_refusing = False
    with trio.fail_after(60):
        while (await report())["kubernetes"]["status"] != "healthy":
            await trio.sleep(0.05)


@pytest.mark.slow
async def test_a_server_that_starts_without_its_cluster_serves_and_waits_for_it(
    quick_place: Path, cluster: FakeCluster
) -> None:
    cluster.proxy.is_refusing = True
    async with serving(quick_place, cluster, ready=False) as server, open_api(server) as api:
        assert (await api.get("/projects")).status_code == 200
        assert await trio.to_thread.run_sync(probe, server.url + "/ready") == 503
        cluster.proxy.is_refusing = False
        with trio.fail_after(60):
            while await trio.to_thread.run_sync(probe, server.url + "/ready") != 200:
                await trio.sleep(0.05)
        await api.project()
        assert (await api.run("true"))["status"] == "succeeded"


@pytest.mark.slow
async def test_what_waits_while_the_cluster_is_away_is_not_claimed(
    server: Server, cluster: FakeCluster
) -> None:
    async with open_api(server) as api:
        await api.project()
        cluster.proxy.is_refusing = True
        cluster.proxy.cut_all()
        await until_async(lambda: cluster.api.watches_open == 0, "the watch is lost")
        seen = cluster.proxy.accepted
        command = await api.submit("echo late")
        await until_async(lambda: cluster.proxy.accepted > seen + 3, "it tries to hear again")
        assert (await api.command(command))["status"] == "queued"
        cluster.proxy.is_refusing = False
        ended = await api.ended(command)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)


@pytest.mark.slow
async def test_of_commands_whose_pod_is_over_the_cluster_says_why(
    server: Server, cluster: FakeCluster
) -> None:
    """In half a minute, the time that a pod has to come back."""
    commands = {}
    async with open_api(server) as api:
        for project in ("gone", "evicted"):
            cluster.add_pod(project)
            await api.project(project)
            commands[project] = await api.submit("echo ready; sleep 1000", project=project)
        for command in commands.values():
            async with api.stream(command) as events:
                async for event in events:
                    if event.name == "output":
                        break
        cluster.api.drop("pods", "claudebox-gone-0")
        cluster.api.patch_status("claudebox-evicted-0", phase="Failed", reason="Evicted")
        for project in commands:
            cluster.end_processes(project)
        # What observes in a pod ends with it.
        cluster.proxy.cut_all()
        with trio.fail_after(90):
            while len(
                ended := [
                    data
                    for command in commands.values()
                    if (data := await api.command(command))["status"] != "running"
                ]
            ) < len(commands):
                await trio.sleep(0.2)
    assert [(one["status"], one["reason"]) for one in ended] == [
        ("lost", "pod_gone"),
        ("lost", "evicted"),
    ]
    assert not any(one["may_still_run"] for one in ended)


@pytest.mark.slow
async def test_another_server_of_the_cluster_takes_over(
    quick_place: Path, cluster: FakeCluster, migrated_dsn: str, tmp_path: Path
) -> None:
    shared = {"RDEV_DATABASE_DSN": migrated_dsn, "RDEV_LEASE_S": "2", "RDEV_DRAIN_DELAY_S": "0"}
    async with (
        serving(quick_place, cluster, **shared) as one,
        serving(quick_place, cluster, **shared) as two,
    ):
        gate = tmp_path / "gate"
        async with open_api(one) as api:
            await api.project()
            command = await api.submit(f"echo begun; until [ -e {gate} ]; do sleep 0.02; done")
            async with api.stream(command) as events:
                async for event in events:
                    if event.name == "output":
                        break
        await trio.to_thread.run_sync(one.kill)
        gate.touch()
        async with open_api(two) as api:
            events = await api.events(command)
            ended = await api.ended(command)
    assert output_of(events) == b"begun\n"
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    assert cluster.api.requests.count(("GET", f"/api/v1/namespaces/{NAMESPACE}")) >= 2
