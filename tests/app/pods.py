"""Servers whose projects are pods of a fake cluster, for the tests of the whole road.

The cluster is this process's: whoever waits for a server must not hold the event loop.
"""

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.adapters.execution.observing import SYSTEM_PATH, processes_in
from tests.app.server import Server, open_state
from tests.fakes.api_server import FakeApiServer, api_server, ready_status, running
from tests.fakes.cuts import CuttingProxy


@dataclass
class FakeCluster:
    """A fake API server, what is between it and the servers, and the folders that are its pods."""

    api: FakeApiServer
    proxy: CuttingProxy
    folder: Path
    kubeconfig: Path = field(init=False)

    def __post_init__(self) -> None:
        self.kubeconfig = self.folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(self.api.kubeconfig(self.proxy.port)))

    @property
    def settings(self) -> dict[str, str]:
        """Of a server whose projects are here."""
        return {"RDEV_EXECUTOR": "kubernetes", "RDEV_KUBECONFIG": str(self.kubeconfig)}

    def add_pod(self, project: str = "demo") -> str:
        """A pod that is ready; its name."""
        name = f"claudebox-{project}-0"
        place = self.folder / project
        labels = {"rdev.orchard9.ai/project": "true", "rdev.orchard9.ai/project-id": project}
        annotations = {
            "rdev.orchard9.ai/home": str(place / "home"),
            "rdev.orchard9.ai/commands": str(place / "commands"),
        }
        body = {
            "metadata": {"name": name, "labels": labels, "annotations": annotations},
            "spec": {"containers": [{"name": "project", "image": "busybox"}]},
            "status": ready_status([running("project")]),
        }
        self.api.put("pods", body)
        return name

    def end_processes(self, project: str = "demo") -> None:
        """What the end of a pod does to its processes."""
        for pid in processes_in(self.folder / project):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def fake_cluster(folder: Path) -> AsyncIterator[FakeCluster]:
    """A cluster with the pod of `demo`."""
    async with api_server({"PATH": SYSTEM_PATH}) as api, trio.open_nursery() as nursery:
        proxy = CuttingProxy(api.port)
        await nursery.start(proxy.run)
        cluster = FakeCluster(api=api, proxy=proxy, folder=folder)
        cluster.add_pod()
        yield cluster
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(
    place: Path, cluster: FakeCluster, *, ready: bool = True, **settings: str
) -> AsyncIterator[Server]:
    """A server of that cluster, which ends before the cluster does."""
    opened = open_state(place, **cluster.settings, **settings)
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
