"""Manifests whose servers run: what the tests put in the place of what the cluster has not.

There is no registry, no network for Services and no database in the cluster. So the image is the
tests' Debian with the sources and packages of whoever runs the tests mounted where the image has
them, and the node forwards the API server and PostgreSQL to pods. The rest is as it is applied.
"""

import copy
import secrets
import sys
import sysconfig
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import trio
import yaml
from psycopg.conninfo import conninfo_to_dict

from rdev.adapters.kubernetes.connection import read_config
from tests.app.server import ROOT, Server
from tests.cluster.real import IMAGES, NAMESPACE, given, kubectl
from tests.deploy.conftest import Object

NODE = "10.213.0.1"  # as pods reach it: tests/cluster/common.sh
API_PORT, DATABASE_PORT = 6443, 5432
PYTHON = (3, 11)  # Debian 12's
MOUNTED = {
    "rdev": (ROOT / "rdev", "/opt/rdev/rdev"),
    "sql": (ROOT / "sql", "/opt/rdev/sql"),
    "packages": (Path(sysconfig.get_path("purelib")), "/opt/packages"),
}
ENVIRONMENT = {
    "PYTHONPATH": "/opt/rdev:/opt/packages",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "KUBERNETES_SERVICE_HOST": NODE,
    "KUBERNETES_SERVICE_PORT": str(API_PORT),
}


def runnable(objects: list[Object]) -> list[Object]:
    """The objects, with pods that can run here."""
    if sys.version_info[:2] != PYTHON:
        pytest.skip("the image's Python is 3.11, and its packages are those of this one")
    changed = copy.deepcopy(objects)
    for one in changed:
        if one["kind"] in ("Deployment", "Job"):
            spec = one["spec"]["template"]["spec"]
            (container,) = spec["containers"]
            container |= {"image": IMAGES["debian"], "command": ["python3", "-P", "-m", "rdev"]}
            container["env"] += [{"name": k, "value": v} for k, v in ENVIRONMENT.items()]
            container.setdefault("volumeMounts", []).extend(
                {"name": name, "mountPath": path, "readOnly": True}
                for name, (_, path) in MOUNTED.items()
            )
            spec.setdefault("volumes", []).extend(
                {"name": name, "hostPath": {"path": str(folder), "type": "Directory"}}
                for name, (folder, _) in MOUNTED.items()
            )
    return changed


def secret(example: Object, dsn: str) -> tuple[Object, str]:
    """The Secret with values that work for this database; the administrator's key."""
    known = conninfo_to_dict(dsn)
    place = f"{NODE}:{DATABASE_PORT}/{quote(str(known['dbname']))}?sslmode=disable"
    key = "test-" + secrets.token_hex(24)
    values = dict.fromkeys(("database-dsn", "migrate-dsn"), f"postgresql://{known['user']}@{place}")
    values |= {"admin-key": key, "secret": secrets.token_hex(32)}
    assert set(values) == set(example["stringData"])
    metadata = {**example["metadata"], "namespace": NAMESPACE}
    return {**example, "metadata": metadata, "stringData": values}, key


@asynccontextmanager
async def forwarded(dsn: str) -> AsyncIterator[None]:
    """The API server and PostgreSQL, on the node."""
    known = conninfo_to_dict(dsn)
    socket = f"{known['host']}/.s.PGSQL.{known.get('port', 5432)}"
    api = urlsplit(read_config(given()).cluster.server)
    async with trio.open_nursery() as nursery:
        for port, opened in (
            (API_PORT, partial(trio.open_tcp_stream, str(api.hostname), api.port or 443)),
            (DATABASE_PORT, partial(trio.open_unix_socket, socket)),
        ):
            serve = partial(_forward, opened)
            await nursery.start(partial(trio.serve_tcp, serve, port, host=NODE))
        yield
        nursery.cancel_scope.cancel()


async def _forward(
    opened: Callable[[], Awaitable[trio.SocketStream]], pod: trio.SocketStream
) -> None:
    async with pod, await opened() as target, trio.open_nursery() as nursery:
        nursery.start_soon(_copy, pod, target, nursery.cancel_scope)
        await _copy(target, pod, nursery.cancel_scope)


async def _copy(
    source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope
) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await target.send_all(data)
    both.cancel()


async def server_of(folder: Path, key: str) -> Server:
    """The server's pod that is ready and stays."""
    await kubectl(
        *("rollout", "status", "-n", NAMESPACE, "deployment/rdev-api"),
        "--timeout=80s",
    )
    said = await kubectl("get", "pods", "-n", NAMESPACE, "-l", "app=rdev-api", "-o", "yaml")
    (pod,) = [
        one for one in yaml.safe_load(said)["items"] if "deletionTimestamp" not in one["metadata"]
    ]
    address = f"http://{pod['status']['podIP']}:8080"
    return Server(state_dir=folder, settings={}, key=key, url=address)


async def end_servers() -> None:
    """Whatever the Deployment and the Job left: the next test counts what the account asks."""
    for app in ("rdev-api", "rdev-migrate"):
        await kubectl(
            *("delete", "pods", "-n", NAMESPACE, "-l", f"app={app}"),
            *("--grace-period=0", "--force", "--ignore-not-found"),
        )
