"""A real cluster for the tests: pods in it, a way to it that can be cut, servers that use it.

Made by tests/cluster/up.sh or given by `RDEV_TEST_KUBECONFIG`; what needs more rights than rdev has
goes through kubectl with `RDEV_TEST_ADMIN_KUBECONFIG`.
"""

import json
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
import yaml
from lightkube.resources.core_v1 import Pod

from rdev.adapters.kubernetes.connection import ApiServer, connect, read_config
from tests.app.server import Api, Server, open_state
from tests.fakes.cuts import CuttingProxy

SCRIPTS = Path(__file__).parent
NAMESPACE = "rdev"
# For what takes seconds on an idle machine: only what hangs meets it.
DEADLINE_S = 90.0
IMAGES = {name: f"localhost/rdev/{name}:test" for name in ("busybox", "debian")}
# Reaps, and ends when it is told to: as deploy/k8s/project/pod.yaml has it.
PROCESS_1 = "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"

Object = dict[str, Any]


def given() -> Path:
    """The kubeconfig of the tests' cluster; skips with the reason where there is none."""
    path = os.environ.get("RDEV_TEST_KUBECONFIG")
    if path is None:
        pytest.skip(os.environ.get("RDEV_TEST_NO_CLUSTER", "RDEV_TEST_KUBECONFIG is not set"))
    return Path(path)


def admin() -> Path:
    """The kubeconfig of whoever may do everything; skips where there is none."""
    given()
    path = os.environ.get("RDEV_TEST_ADMIN_KUBECONFIG")
    if path is None:
        pytest.skip("RDEV_TEST_ADMIN_KUBECONFIG is not set")
    return Path(path)


async def kubectl(*argv: str, stdin: bytes = b"", check: bool = True) -> str:
    """Run it as the administrator; what it prints, both streams."""
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(
            ["kubectl", "--kubeconfig", str(admin()), *argv],
            stdin=stdin,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    said = done.stdout.decode(errors="replace")
    assert not check or done.returncode == 0, f"kubectl {' '.join(argv)}: {said}"
    return said


async def restart(part: str) -> None:
    """End a part of the tests' own cluster and start it again: `kube-apiserver` or `kubelet`."""
    if not (admin().parent / "run" / "pids").is_dir():
        pytest.skip("not a cluster of tests/cluster/up.sh")
    environment = os.environ | {"RDEV_CLUSTER_DIR": str(admin().parent)}
    await trio.run_process(
        [str(SCRIPTS / "restart.sh"), part], env=environment, capture_stderr=True
    )


@dataclass
class RealCluster:
    """The API server, what is between it and the servers under test, and the pods of one test."""

    api: ApiServer
    proxy: CuttingProxy
    folder: Path
    made: list[str] = field(default_factory=list)

    @property
    def kubeconfig(self) -> Path:
        """Of the account of the tests, by way of the proxy."""
        return self.through(given(), self.proxy)

    @property
    def settings(self) -> dict[str, str]:
        """Of a server whose projects are here."""
        return {
            "RDEV_EXECUTOR": "kubernetes",
            "RDEV_KUBECONFIG": str(self.kubeconfig),
            "RDEV_NAMESPACE": NAMESPACE,
        }

    def through(self, kubeconfig: Path, proxy: CuttingProxy) -> Path:
        """The same kubeconfig with the proxy's address."""
        config = yaml.safe_load(kubeconfig.read_text())
        for one in config["clusters"]:
            one["cluster"]["server"] = f"https://127.0.0.1:{proxy.port}"
        file = self.folder / f"kubeconfig-{proxy.port}"
        file.write_text(json.dumps(config))
        return file

    async def add_pod(
        self, project: str = "demo", *, image: str = "busybox", ready: bool = True, **container: Any
    ) -> str:
        """A project's pod, once it is ready; its name."""
        name = f"{project}-{uuid.uuid4().hex[:6]}"
        body = pod(name, project, image=IMAGES.get(image, image), **container)
        await self.api.objects.create(Pod.from_dict(body))  # type: ignore[call-overload]
        self.made.append(name)
        if ready:
            await self.until_ready(name)
        return name

    async def until_ready(self, name: str) -> None:
        with trio.fail_after(DEADLINE_S):
            while not await self._is_ready(name):
                await trio.sleep(0.1)

    async def _is_ready(self, name: str) -> bool:
        # Not by lightkube's models: they refuse statuses that are half there.
        got = await self.api.http.get(f"/api/v1/namespaces/{NAMESPACE}/pods/{name}")
        conditions = got.json().get("status", {}).get("conditions", [])
        return any((c["type"], c["status"]) == ("Ready", "True") for c in conditions)

    async def delete(self, name: str) -> None:
        """Delete a pod at once."""
        self.made.remove(name)
        await self.api.http.delete(
            f"/api/v1/namespaces/{NAMESPACE}/pods/{name}", params={"gracePeriodSeconds": "0"}
        )

    async def processes(self, name: str) -> list[str]:
        """The command lines of the processes in a pod, without those that look. One that ends
        meanwhile is none."""
        script = 'for p in /proc/[0-9]*; do tr "\\0" " " <$p/cmdline 2>/dev/null && echo; done; :'
        said = await kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", script)
        return [line for line in said.splitlines() if line and "/proc/[0-9]" not in line]

    async def until_gone(self, name: str, mark: str) -> None:
        """Until no process of the pod has the mark in its command line."""
        with trio.fail_after(DEADLINE_S):
            while any(mark in line for line in await self.processes(name)):
                await trio.sleep(0.1)


def pod(name: str, project: str, *, image: str, **container: Any) -> Object:
    """A project's pod as deploy/k8s/project/pod.yaml has it, without claims and limits."""
    volumes = {"workspace": "/workspace", "commands": "/run/rdev"}
    container.setdefault("command", ["/bin/sh", "-c", PROCESS_1])
    spec = container.pop("spec", {})
    return {
        "metadata": {
            "name": name,
            "labels": {
                "rdev.orchard9.ai/project": "true",
                "rdev.orchard9.ai/project-id": project,
            },
        },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "volumes": [{"name": volume, "emptyDir": {}} for volume in volumes],
            "containers": [
                {
                    "name": "project",
                    "image": image,
                    "volumeMounts": [
                        {"name": volume, "mountPath": path} for volume, path in volumes.items()
                    ],
                    **container,
                }
            ],
            **spec,
        },
    }


@asynccontextmanager
async def real_cluster(folder: Path) -> AsyncIterator[RealCluster]:
    """The cluster without a pod; what was made in it is deleted."""
    config = read_config(given())
    port = urlsplit(config.cluster.server).port or 443
    async with connect(config, NAMESPACE) as api, trio.open_nursery() as nursery:
        proxy = CuttingProxy(port)
        await nursery.start(proxy.run)
        cluster = RealCluster(api=api, proxy=proxy, folder=folder)
        try:
            yield cluster
        finally:
            # shielded: a test that fails leaves no pods
            with trio.move_on_after(30, shield=True):
                for name in list(cluster.made):
                    await cluster.delete(name)
        nursery.cancel_scope.cancel()


async def stands(api: Api, project: str, status: str) -> None:
    """Wait until the project has this status; `gone` where it is not there."""
    seen = ""
    with trio.move_on_after(DEADLINE_S):
        while seen != status:
            await trio.sleep(0.1)
            got = await api.get(f"/projects/{project}")
            seen = "gone" if got.status_code == 404 else got.json()["data"]["status"]
    assert seen == status, await kubectl("describe", "pods", "-n", NAMESPACE)


@asynccontextmanager
async def serving(
    place: Path, settings: Mapping[str, str], *, ready: bool = True, **more: str
) -> AsyncIterator[Server]:
    """A server in a process of its own; the event loop goes on while it starts and ends."""
    opened = open_state(place, **settings, **more)
    server = opened.__enter__()
    try:
        await trio.to_thread.run_sync(lambda: server.start(ready=ready))
        yield server
    except BaseException as error:
        # shielded: nothing of it may be left
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(opened.__exit__, type(error), error, None)
        raise
    await trio.to_thread.run_sync(opened.__exit__, None, None, None)
