"""Pods of a real cluster that do nothing, as many as no single node runs.

No scheduler takes them; what the kubelet would say of them is said by the administrator. What the
server asks is in the API server's audit log. Both need the cluster of tests/cluster/up.sh.
"""

import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from rdev.adapters.kubernetes.connection import ApiServer, connect, read_config

NAMESPACE = "rdev"
ACCOUNT = "system:serviceaccount:rdev:rdev"
AT_ONCE = 8
READY = {
    "phase": "Running",
    "conditions": [{"type": "Ready", "status": "True"}],
    "containerStatuses": [
        {
            "name": "project",
            "ready": True,
            "restartCount": 0,
            "image": "idle",
            "imageID": "idle",
            "containerID": "containerd://idle",
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }
    ],
}


def admin_config() -> Path | None:
    """The kubeconfig of a cluster whose requests can be counted; None without one."""
    path = os.environ.get("RDEV_TEST_ADMIN_KUBECONFIG")
    if path is None or not (Path(path).parent / "run" / "audit.yaml").exists():
        return None
    return Path(path)


def requests(admin: Path) -> int:
    """How many requests the account of the tests has made; a watch is one."""
    log = admin.parent / "run" / "audit.log"
    lines = log.read_text().splitlines() if log.exists() else []
    asked = (json.loads(line) for line in lines if line.endswith("}"))
    return len({one["auditID"] for one in asked if one["user"]["username"] == ACCOUNT})


@asynccontextmanager
async def idle_pods(admin: Path, count: int) -> AsyncIterator[None]:
    """So many projects that are ready, while the block runs."""
    mark = uuid.uuid4().hex[:6]
    async with connect(read_config(admin), NAMESPACE) as api:
        path = f"/api/v1/namespaces/{NAMESPACE}/pods"
        limiter = trio.CapacityLimiter(AT_ONCE)
        try:
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(_make, api, path, f"idle-{mark}-{number}", limiter)
            yield
        finally:
            # shielded: what was made goes, also where the measurement failed
            with trio.move_on_after(60, shield=True):
                params = {"labelSelector": "rdev-bench=idle"}
                grace = {"gracePeriodSeconds": 0}
                await api.http.request("DELETE", path, params=params, json=grace)


async def _make(api: ApiServer, path: str, name: str, limiter: trio.CapacityLimiter) -> None:
    labels = {
        "rdev.orchard9.ai/project": "true",
        "rdev.orchard9.ai/project-id": name,
        "rdev-bench": "idle",
    }
    body = {
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "schedulerName": "nobody",
            "containers": [{"name": "project", "image": "idle"}],
        },
    }
    async with limiter:
        (await api.http.post(path, json=body)).raise_for_status()
        patched = await api.http.patch(
            f"{path}/{name}/status",
            content=json.dumps({"status": READY}).encode(),
            headers={"Content-Type": "application/merge-patch+json"},
        )
        patched.raise_for_status()
