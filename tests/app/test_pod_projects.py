"""Projects that rdev makes in a cluster: a real server, a fake API server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from rdev.services.project_teller import STOOD_S
from tests.app.pods import FakeCluster, fake_cluster, serving
from tests.app.server import Api, Server, open_api, rdev, until_async
from tests.fakes.api_server import Fault

CLAIMS = "persistentvolumeclaims"
TEMPLATE = """
kind: Pod
metadata:
  annotations: {{rdev.orchard9.ai/home: {0}/home, rdev.orchard9.ai/commands: {0}/commands}}
spec:
  containers: [{{name: project, image: busybox}}]
---
kind: PersistentVolumeClaim
spec: {{resources: {{requests: {{storage: 1Gi}}}}}}
"""

pytestmark = pytest.mark.slow


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def server(quick_place: Path, cluster: FakeCluster, tmp_path: Path) -> AsyncIterator[Server]:
    template = tmp_path / "template.yaml"
    template.write_text(TEMPLATE.format(tmp_path / "made"))
    async with serving(quick_place, cluster, RDEV_PROJECT_TEMPLATE=str(template)) as server:
        yield server


async def status_of(api: Api, project: str) -> tuple[str, str | None]:
    got = await api.get(f"/projects/{project}")
    if got.status_code == 404:
        return "gone", None
    data = got.json()["data"]
    return data["status"], data["reason"]


async def stands(api: Api, project: str, status: str) -> None:
    """Wait until it does."""
    with trio.fail_after(60):
        while (await status_of(api, project))[0] != status:
            await trio.sleep(0.05)


async def test_a_project_is_made_runs_stops_starts_and_goes(
    server: Server, cluster: FakeCluster
) -> None:
    fake = cluster.api
    async with open_api(server) as api:
        made = await api.post("/projects", {"id": "fresh", "image": "debian:12"})
        assert made.status_code == 201, made.text
        assert made.json()["data"]["status"] in ("pending", "ready")
        assert "project-fresh" in fake.names("pods")
        await stands(api, "fresh", "ready")
        assert (
            await api.post("/projects", {"id": "fresh", "image": "debian:12"})
        ).status_code == 200
        assert (await api.post("/projects", {"id": "fresh"})).status_code == 409
        assert (await api.run("true", project="fresh"))["status"] == "succeeded"

        running = await api.submit("sleep 1000", project="fresh")
        await api.running(running)
        refused = await api.http.post("/projects/fresh/stop")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "CONFLICT")
        assert (await api.http.post("/projects/fresh/stop?force=true")).status_code == 202
        assert (await api.ended(running))["status"] == "cancelled"
        await until_async(lambda: "project-fresh" not in fake.names("pods"), "its pod is gone")
        await stands(api, "fresh", "stopped")
        assert fake.names(CLAIMS) == ["project-fresh"]

        waiting = await api.submit("true", project="fresh")
        assert (await api.http.post("/projects/fresh/start")).status_code == 202
        assert (await api.ended(waiting))["status"] == "succeeded"

        running = await api.submit("sleep 1000", project="fresh")
        await api.running(running)
        assert (await api.http.delete("/projects/fresh")).status_code == 409
        behind = [await api.submit("true", project="fresh") for _ in range(6)]
        deleted = await api.http.delete("/projects/fresh?force=true")
        assert (deleted.status_code, deleted.json()["data"]["reason"]) == (202, "deleting")
        ended = [await api.ended(one) for one in (running, *behind)]
        assert {one["status"] for one in ended} <= {"cancelled", "succeeded"}
        await stands(api, "fresh", "gone")
        assert (fake.names(CLAIMS), fake.names("pods")) == ([], ["claudebox-demo-0"])
        assert (await api.post("/projects/fresh/shell", {"command": "true"})).status_code == 404


async def test_a_pod_that_is_there_is_a_project_that_can_only_be_deleted(
    server: Server, cluster: FakeCluster
) -> None:
    async with open_api(server) as api:
        await stands(api, "demo", "ready")
        for verb in ("start", "stop"):
            assert (await api.http.post(f"/projects/demo/{verb}")).status_code == 409
        cluster.add_pod("later")
        await stands(api, "later", "ready")
        cluster.api.drop("pods", "claudebox-later-0")
        await stands(api, "later", "stopped")
        assert await status_of(api, "later") == ("stopped", "pod_gone")
        assert (await api.http.delete("/projects/demo")).status_code == 202
        await stands(api, "demo", "gone")
        assert cluster.api.names("pods") == []


async def test_what_the_cluster_refuses_leaves_nothing_and_what_it_cannot_do_is_done_later(
    server: Server, cluster: FakeCluster
) -> None:
    fake = cluster.api
    async with open_api(server) as api:
        # Whoever asks: the keeper looks at the new row at the same time.
        invalid = Fault(status=422, method="POST", message="spec: Invalid value", times=1_000)
        fake.faults.append(invalid)
        refused = await api.http.post(
            "/projects", json={"id": "bad"}, headers={"Idempotency-Key": "once"}
        )
        assert (refused.status_code, "Invalid value" in refused.text) == (400, True)
        await stands(api, "bad", "gone")
        assert fake.names(CLAIMS) == []
        fake.faults.clear()
        again = await api.http.post(
            "/projects", json={"id": "bad"}, headers={"Idempotency-Key": "once"}
        )
        assert again.status_code == 201

        fake.faults.append(Fault(status=500, method="POST", times=1_000))
        late = await api.post("/projects", {"id": "late"})
        assert (late.status_code, "Retry-After" in late.headers) == (503, True)
        assert late.headers["Content-Type"].startswith("application/problem+json")
        fake.faults.clear()
        await stands(api, "late", "ready")
        assert (await api.post("/projects", {"id": "late"})).status_code == 200


async def told_of(api: Api, project: str) -> list[tuple[str, str | None]]:
    """What was told of a project that nobody asked for: status and reason, the oldest first."""
    got = await api.get(f"/audit?action=project.status&project={project}")
    told = [entry["detail"] for entry in got.json()["data"]]
    return [(one["status"], one.get("reason")) for one in reversed(told)]


async def until_told(api: Api, project: str, wanted: list[tuple[str, str | None]]) -> None:
    told: list[tuple[str, str | None]] = []
    with trio.move_on_after(12):
        while (told := await told_of(api, project)) != wanted:
            await trio.sleep(0.1)
    assert told == wanted


async def test_what_becomes_of_a_pod_by_itself_is_told_once_by_two_servers(
    quick_place: Path, migrated_dsn: str, cluster: FakeCluster
) -> None:
    fake = cluster.api
    database = {"RDEV_DATABASE_DSN": migrated_dsn}
    async with (
        serving(quick_place, cluster, **database) as server,
        serving(quick_place, cluster, **database),
        open_api(server) as api,
    ):
        wanted: list[tuple[str, str | None]] = [("ready", None)]
        await until_told(api, "demo", wanted)
        name = "claudebox-demo-0"
        ready = fake.get("pods", name)["status"]
        for _ in range(3):
            failed = {"phase": "Failed", "reason": "Evicted", "conditions": []}
            fake.patch_status(name, **failed)
            wanted.append(("failed", "evicted"))
            await until_told(api, "demo", wanted)
            fake.patch_status(name, **{"reason": "", **ready})
            wanted.append(("ready", None))
            await until_told(api, "demo", wanted)
        fake.drop("pods", name)
        wanted.append(("stopped", "pod_gone"))
        await until_told(api, "demo", wanted)
        await trio.sleep(STOOD_S + 1)  # whoever has waited to tell it has had the time
        assert await told_of(api, "demo") == wanted


async def test_a_project_that_is_made_is_ready_once_for_each_time_it_is_started(
    server: Server, cluster: FakeCluster
) -> None:
    async with open_api(server) as api:
        assert (await api.post("/projects", {"id": "fresh"})).status_code == 201
        await until_told(api, "fresh", [("ready", None)])
        assert (await api.http.post("/projects/fresh/stop")).status_code == 202
        await until_async(lambda: "project-fresh" not in cluster.api.names("pods"), "stopped")
        assert (await api.http.post("/projects/fresh/start")).status_code == 202
        await until_told(api, "fresh", [("ready", None)] * 2)


async def test_the_env_of_a_project_is_in_its_commands_and_nowhere_to_be_read(
    server: Server, cluster: FakeCluster
) -> None:
    secret = "hunter2-of-the-project"
    env = {"API_TOKEN": secret, "PLACE": "project", "GIT_SSH_COMMAND": "touch owned"}
    async with open_api(server) as api:
        made = await api.post("/projects", {"id": "fresh", "env": env})
        assert made.status_code == 201
        await stands(api, "fresh", "ready")
        script = f'echo "$API_TOKEN $PLACE"; : {secret}'
        said = {}
        for own in ("project", "command"):
            body = {"command": script} | ({} if own == "project" else {"env": {"PLACE": own}})
            command = await api.submit_body("/projects/fresh/shell", body)
            shown = await api.ended(command)
            assert shown["status"] == "succeeded"
            assert secret not in str(shown)
            said[own] = await api.output(command)
        assert said == {own: f"{secret} {own}\n".encode() for own in said}
        for path in ("/projects", "/projects/fresh", "/projects/fresh/commands", "/audit"):
            got = await api.get(path)
            assert got.status_code == 200, path
            assert secret not in got.text, path
        assert secret not in made.text + server.log


async def test_the_command_line_makes_starts_stops_and_deletes(
    server: Server, cluster: FakeCluster
) -> None:
    async def run(*argv: str) -> str:
        done = await trio.to_thread.run_sync(
            lambda: rdev("projects", *argv, environment=server.client_environment)
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    made = await run("create", "cli", "--image", "debian:12", "--env", "A=b", "--memory", "1Gi")
    assert made.startswith("cli\t")
    (container,) = cluster.api.get("pods", "project-cli")["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "1Gi"
    async with open_api(server) as api:
        await stands(api, "cli", "ready")
        assert "stopped" in await run("stop", "cli")
        assert "cli\t" in await run("start", "cli")
        await stands(api, "cli", "ready")
        assert "deleting" in await run("delete", "cli", "--force")
        await stands(api, "cli", "gone")
