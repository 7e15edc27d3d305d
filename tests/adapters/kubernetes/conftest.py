"""Clusters for the tests: the fake always, a real one with `RDEV_TEST_KUBECONFIG`."""

import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from lightkube import KubeConfig, SingleConfig
from lightkube.resources.core_v1 import Pod

from rdev.adapters.kubernetes.connection import ApiServer, connect, read_config
from rdev.domain.ids import ProjectId
from tests.adapters.execution.observing import SYSTEM_PATH, until
from tests.fakes.api_server import FakeApiServer, api_server

DEADLINE_S = 60.0


@dataclass
class TestCluster:
    """What the contract needs of a cluster. Differences between versions that it tolerates are
    fields here."""

    __test__ = False

    api: ApiServer
    image: str
    has_v5: bool
    fake: FakeApiServer | None = None
    made: list[str] = field(default_factory=list)

    async def create(self, project: ProjectId, *argv: str, **spec: Any) -> str:
        """Make a project's pod; its name."""
        name = f"{project}-{uuid.uuid4().hex[:6]}"
        labels = {
            "rdev.orchard9.ai/project": "true",
            "rdev.orchard9.ai/project-id": project,
        }
        container = {
            "name": "project",
            "image": self.image,
            "command": list(argv) or ["sleep", "100000"],
        }
        body = {
            "metadata": {"name": name, "labels": labels},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [container], **spec},
        }
        await self.api.objects.create(Pod.from_dict(body))  # type: ignore[call-overload]
        self.made.append(name)
        return name

    async def delete(self, name: str) -> None:
        """Delete a pod at once."""
        await self.api.objects.delete(Pod, name, grace_period=0)
        self.made.remove(name)


def config_of(fake: FakeApiServer, port: int | None = None) -> SingleConfig:
    found = KubeConfig.from_dict(fake.kubeconfig(port)).get()
    assert found is not None
    return found


@asynccontextmanager
async def fake_cluster() -> AsyncIterator[TestCluster]:
    async with api_server({"PATH": SYSTEM_PATH}) as fake, connect(config_of(fake)) as api:
        yield TestCluster(api=api, image="busybox", has_v5=True, fake=fake)


@asynccontextmanager
async def real_cluster() -> AsyncIterator[TestCluster]:
    path = os.environ["RDEV_TEST_KUBECONFIG"]
    image = os.environ.get("RDEV_TEST_IMAGE", "localhost/rdev/busybox:test")
    async with connect(read_config(Path(path)), "rdev") as api:
        response = await api.http.get("/version")
        minor = int(response.json()["minor"].rstrip("+") or 0)  # an own build may say nothing
        cluster = TestCluster(api=api, image=image, has_v5=minor >= 30)
        try:
            yield cluster
        finally:
            # shielded: a test that fails leaves no pods
            with trio.move_on_after(20, shield=True):
                for name in list(cluster.made):
                    await cluster.delete(name)


@pytest.fixture(params=["fake", "real"])
def where(request: pytest.FixtureRequest) -> str:
    """Not in an async fixture: a skip in one loses its reason."""
    if request.param == "real" and "RDEV_TEST_KUBECONFIG" not in os.environ:
        pytest.skip(os.environ.get("RDEV_TEST_NO_CLUSTER", "RDEV_TEST_KUBECONFIG is not set"))
    return str(request.param)


@pytest.fixture
async def cluster(where: str) -> AsyncIterator[TestCluster]:
    made = fake_cluster() if where == "fake" else real_cluster()
    async with made as cluster:
        yield cluster


@pytest.fixture
async def fake() -> AsyncIterator[FakeApiServer]:
    async with api_server({"PATH": SYSTEM_PATH}) as fake:
        yield fake


Until = Callable[[Callable[[], bool], str], Awaitable[None]]


@pytest.fixture
def eventually() -> Until:
    return until
