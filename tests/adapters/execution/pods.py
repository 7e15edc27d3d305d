"""An executor over execs of a fake API server, whose pods are folders of this machine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from lightkube import KubeConfig

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.execution.executor import Place
from rdev.adapters.execution.kubernetes import KubernetesExecutor, KubernetesTransport
from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.exec import PodExecs, PodTarget
from rdev.adapters.kubernetes.websocket import Silence
from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId
from tests.adapters.execution.observing import PROJECT, SYSTEM_PATH
from tests.fakes.api_server import FakeApiServer, api_server, ready_status, running
from tests.fakes.cuts import CuttingProxy

POD = f"claudebox-{PROJECT}-0"


@dataclass
class Cluster:
    """A fake cluster with one pod, what is between it and the executor, and that executor."""

    api: FakeApiServer
    proxy: CuttingProxy
    executor: KubernetesExecutor
    transport: KubernetesTransport
    reason: LostReason | None = None  # what the cluster knows of the pod's end
    is_away: bool = False  # whether it is known that no pod can be reached


def pod(name: str = POD, project: str = PROJECT) -> dict[str, object]:
    labels = {"rdev.orchard9.ai/project": "true", "rdev.orchard9.ai/project-id": project}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": "project", "image": "busybox"}]},
        "status": ready_status([running("project")]),
    }


@asynccontextmanager
async def cluster(
    projects: Path,
    path: str = SYSTEM_PATH,
    *,
    patience: Patience | None = None,
    silence: Silence | None = None,
    supported: tuple[str, ...] = SUBPROTOCOLS,
    ping_s: float | None = None,
) -> AsyncIterator[Cluster]:
    """The projects' folders are those of `local(projects)`, so that tests find the same files."""
    root = projects.resolve()
    env = {"PATH": path, "HOME": "/nowhere", "LANG": "C.UTF-8"}
    async with api_server({"PATH": path}, ping_s=ping_s) as api, trio.open_nursery() as nursery:
        api.put("pods", pod())
        api.execs.supported = supported
        proxy = CuttingProxy(api.port)
        await nursery.start(proxy.run)
        config = KubeConfig.from_dict(api.kubeconfig(proxy.port)).get()
        assert config is not None
        async with connect(config) as server:
            execs = PodExecs(
                server,
                lambda _: PodTarget(pod=POD, container="project"),
                subprotocols=SUBPROTOCOLS,
                silence=silence,
            )
            transport = KubernetesTransport(execs.open)
            found: list[Cluster] = []

            def place(project: ProjectId) -> Place:
                return Place(home=str(root / project), commands=str(root / ".commands"))

            executor = KubernetesExecutor(
                cluster=lambda: "test",
                namespace="rdev",
                transport=transport,
                reason_of=lambda _project, _are_gone: found[0].reason,
                base_env=env,
                place=place,
                patience=patience,
                is_away=lambda: found[0].is_away,
            )
            found.append(Cluster(api=api, proxy=proxy, executor=executor, transport=transport))
            yield found[0]
        nursery.cancel_scope.cancel()
