"""Projects that a quota of a real cluster refuses: in nobody's way, and made when they may be."""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.app.server import Api, open_api
from tests.cluster.real import (
    DEADLINE_S,
    IMAGES,
    NAMESPACE,
    RealCluster,
    kubectl,
    serving,
    stands,
)

MANY = 12
TEMPLATE = f"""
kind: Pod
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {{runAsUser: 10001, runAsGroup: 10001, fsGroup: 10001}}
  containers:
    - name: project
      image: {IMAGES["busybox"]}
      resources: {{requests: {{cpu: 1m, memory: 8Mi}}, limits: {{memory: 128Mi}}}}
      command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 1; done"]
"""


async def allow(pods: int) -> None:
    """No more pods than so many, from when the cluster has counted them."""
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "few", "namespace": NAMESPACE},
        "spec": {"hard": {"pods": str(pods)}},
    }
    await kubectl("apply", "--validate=false", "-f", "-", stdin=json.dumps(quota).encode())
    counted = ""
    with trio.fail_after(DEADLINE_S):
        while counted != str(pods):
            await trio.sleep(0.1)
            path = "jsonpath={.status.hard.pods}"
            counted = await kubectl("get", "resourcequota", "few", "-n", NAMESPACE, "-o", path)


@asynccontextmanager
async def few_pods() -> AsyncIterator[None]:
    """None but those that are there, for the block."""
    pods = await kubectl("get", "pods", "-n", NAMESPACE, "-o", "name")
    await allow(len(pods.split()))
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):  # shielded: the next test finds it as this one did
            await kubectl("delete", "--ignore-not-found", "resourcequota", "few", "-n", NAMESPACE)


async def refused(api: Api, project: str) -> None:
    got = await api.post("/projects", {"id": project})
    assert (got.status_code, "exceeded quota" in got.text) == (503, True), got.text


async def test_what_a_quota_refuses_is_in_nobodys_way_and_made_when_it_may_be(
    quick_place: Path, cluster: RealCluster, tmp_path: Path
) -> None:
    template = tmp_path / "template.yaml"
    template.write_text(TEMPLATE)
    mark = uuid.uuid4().hex[:6]
    stuck = [f"a-{mark}-{number}" for number in range(MANY)]
    settings = {**cluster.settings, "RDEV_PROJECT_TEMPLATE": str(template)}
    async with serving(quick_place, settings) as server, open_api(server) as api:
        well = f"well-{mark}"
        assert (await api.post("/projects", {"id": well})).status_code == 201
        await stands(api, well, "ready")
        async with few_pods():
            async with trio.open_nursery() as nursery:
                for project in stuck:
                    nursery.start_soon(refused, api, project)
            told = (await api.get(f"/projects/{stuck[0]}")).json()["data"]
            assert (told["status"], told["reason"]) == ("pending", "starting")
            assert "exceeded quota" in told["message"], told
            # What the quota refuses can go at once, and so can what has its pod.
            assert (await api.http.delete(f"/projects/{stuck[1]}")).status_code == 202
            await stands(api, stuck[1], "gone")
            assert (await api.http.delete(f"/projects/{well}")).status_code == 202
            await stands(api, well, "gone")
            await allow(2 * MANY)
            for project in stuck[:1] + stuck[2:]:
                await stands(api, project, "ready")
                assert (await api.run("true", project=project))["status"] == "succeeded"
        for project in stuck[:1] + stuck[2:]:
            assert (await api.http.delete(f"/projects/{project}")).status_code == 202
        for project in stuck:
            await stands(api, project, "gone")
