"""Projects in pods: what rdev adds to an exec, output through execs, sockets that are cut, idling.

On a fake API server in a process of its own, whose pods run what they are asked to on this machine.
With `RDEV_TEST_KUBECONFIG` the round trips and the output are those of that cluster (namespace
`rdev`, image `RDEV_TEST_IMAGE`), and with `RDEV_TEST_ADMIN_KUBECONFIG` idling is too
(bench/idle_pods.py). Cuts stay on the fake: those of a real cluster are in tests/cluster.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from bench import idle_pods
from bench.client import Connection, create, open_connection
from bench.harness import Context, Figure, Measurement, Scenario, percentile
from bench.output_throughput import _sha256_of_lines
from bench.server import Server, open_server, open_state_dir
from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.execution.kubernetes import KubernetesTransport
from rdev.adapters.kubernetes.connection import ApiServer, connect, read_config
from rdev.adapters.kubernetes.exec import PodExecs, PodTarget
from rdev.domain.ids import ProjectId

ROUND_TRIPS = 40
LINES = 60_000
LINE_BYTES = 1_000
CUTS, CUTS_LONG = 40, 1_000
CUT_PAUSE_S = 0.3
IDLE_PODS = 200
IDLE_S, IDLE_LONG_S = 20.0, 120.0
READY_EACH_S = 2.0  # as the manifests have it
DEADLINE_S = 120.0

COMPLETE = b"event: complete"
NUMBERED = re.compile(rb'"line":"(\d+) (\d+)"')
STAMPS = """
import sys, time
n = 0
for _ in range(1000000):
    n += 1
    print(n, time.clock_gettime_ns(time.CLOCK_MONOTONIC), flush=True)
    time.sleep(0.01)
"""
AWK = (
    f'BEGIN {{ p = sprintf("%{LINE_BYTES - 11}s", ""); gsub(/ /, "x", p); '
    f'for (i = 0; i < {LINES}; i++) printf "%010d%s\\n", i, p }}'
)


class Cluster:
    """The fake's process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.kubeconfigs: dict[str, str] = self._read()

    def ask(self, word: str) -> int:
        """The only number of the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()
        (number,) = self._read().values()
        return int(number)

    def _read(self) -> dict[str, str]:
        assert self._process.stdout is not None
        found: dict[str, str] = json.loads(self._process.stdout.readline())
        return found


@contextmanager
def open_cluster(folder: Path, pods: int) -> Iterator[Cluster]:
    """A fake cluster while the block runs."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.pods_process", str(folder), str(pods)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Cluster(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(DEADLINE_S)


def settings_of(kubeconfig: str) -> dict[str, str]:
    return {"RDEV_EXECUTOR": "kubernetes", "RDEV_KUBECONFIG": kubeconfig}


def measure(context: Context) -> Measurement:
    """Every figure; each part has a server of its own."""
    found: dict[str, list[float]] = {}
    with open_state_dir() as place, open_cluster(place / "pods", 0) as cluster:
        real = os.environ.get("RDEV_TEST_KUBECONFIG")
        kubeconfig = real or cluster.kubeconfigs["direct"]
        with open_state_dir() as state, open_server(state, **settings_of(kubeconfig)) as server:
            found |= trio.run(_exec_figures, context, server, kubeconfig, real is not None)
        through_proxy = settings_of(cluster.kubeconfigs["proxy"])
        with open_state_dir() as state, open_server(state, **through_proxy) as server:
            cuts = CUTS_LONG if context.long else CUTS
            found |= {key: [value] for key, value in trio.run(_cuts, server, cluster, cuts).items()}
    found |= {key: [value] for key, value in _idling(context).items()}
    return found


def _idling(context: Context) -> dict[str, float]:
    idle_s = IDLE_LONG_S if context.long else IDLE_S
    admin = idle_pods.admin_config()
    if admin is not None:
        return trio.run(_idle_on_real, admin, os.environ["RDEV_TEST_KUBECONFIG"], idle_s)
    with open_state_dir() as place, open_cluster(place / "pods", IDLE_PODS) as cluster:
        settings = settings_of(cluster.kubeconfigs["direct"])
        with open_state_dir() as state, open_server(state, **settings) as server:
            return trio.run(_idle, server, lambda: cluster.ask("count"), idle_s)


async def _idle_on_real(admin: Path, kubeconfig: str, idle_s: float) -> dict[str, float]:
    async with idle_pods.idle_pods(admin, IDLE_PODS):
        with open_state_dir() as state, open_server(state, **settings_of(kubeconfig)) as server:
            return await _idle(server, lambda: idle_pods.requests(admin), idle_s)


async def _exec_figures(
    context: Context, server: Server, kubeconfig: str, is_real: bool
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    namespace = "rdev" if is_real else None
    async with (
        connect(read_config(Path(kubeconfig)), namespace) as api,
        _pod(api, is_real) as (project, pod),
    ):
        await _create_when_ready(server, project)
        target = PodTarget(pod=pod, container="project")
        execs = PodExecs(api, lambda _: target, subprotocols=SUBPROTOCOLS)
        transport = KubernetesTransport(execs.open)
        await _prepare(server, project)
        for number in range(context.warm_ups + context.repetitions):
            once = await _round_trips(server, transport, project)
            once |= await _output(server, project)
            for name, value in once.items() if number >= context.warm_ups else ():
                samples.setdefault(name, []).append(value)
    return samples


@asynccontextmanager
async def _pod(api: ApiServer, is_real: bool) -> AsyncIterator[tuple[str, str]]:
    """A project and its pod; the fake has one."""
    if not is_real:
        yield "demo", "claudebox-demo-0"
        return
    project = f"bench-{uuid.uuid4().hex[:6]}"
    labels = {"rdev.orchard9.ai/project": "true", "rdev.orchard9.ai/project-id": project}
    image = os.environ.get("RDEV_TEST_IMAGE", "localhost/rdev/busybox:test")
    volumes = {"workspace": "/workspace", "commands": "/run/rdev"}
    container = {
        "name": "project",
        "image": image,
        "command": ["sleep", "100000"],
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in volumes.items()],
    }
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": project, "labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": name, "emptyDir": {}} for name in volumes],
            "containers": [container],
        },
    }
    path = f"/api/v1/namespaces/{api.namespace}/pods"
    (await api.http.post(path, json=body)).raise_for_status()
    try:
        yield project, project
    finally:
        # shielded: what was made goes, also where the measurement failed
        with trio.move_on_after(20, shield=True):
            await api.http.delete(f"{path}/{project}")


async def _create_when_ready(server: Server, project: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_connection(server) as connection:
            while True:
                status, body = await connection.request("POST", "/projects", {"id": project})
                if status in (200, 201):
                    return
                if status != 503:
                    raise RuntimeError(f"POST /projects: {status} {body!r}")
                await trio.sleep(0.2)


async def _prepare(server: Server, project: str) -> None:
    script = f"awk '{AWK}' > lines.txt"
    async with open_connection(server) as poster, open_connection(server) as watcher:
        command = await create(poster, f"/projects/{project}/shell", {"command": script})
        await _collect(watcher, command)


async def _round_trips(
    server: Server, transport: KubernetesTransport, project: str
) -> dict[str, float]:
    """Taken in turn: an exec of nothing by itself, and a command of nothing."""
    exec_ms, complete_ms = [], []
    async with open_connection(server) as poster:
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            async with transport.run(ProjectId(project), ["sh", "-c", "echo"]) as streams:
                while await streams.stdout.receive_some(100):
                    pass
            exec_ms.append((time.perf_counter() - began) * 1e3)
            async with open_connection(server) as watcher:
                began = time.perf_counter()
                body = {"command": "true"}
                command = await create(poster, f"/projects/{project}/shell", body)
                await _collect(watcher, command)
                complete_ms.append((time.perf_counter() - began) * 1e3)
    execs, completes = percentile(exec_ms, 50), percentile(complete_ms, 50)
    return {"exec_p50": execs, "complete_p50": completes, "on_top_of_exec": completes - execs}


async def _output(server: Server, project: str) -> dict[str, float]:
    """Whole lines of 1,000 bytes: from the POST to `complete`, all of them exact."""
    async with open_connection(server) as poster, open_connection(server) as watcher:
        cpu_began_s, began_s = server.cpu_s(), time.perf_counter()
        command = await create(
            poster, f"/projects/{project}/shell", {"command": "exec cat lines.txt"}
        )
        received = await _collect(watcher, command)
        took_s, cpu_s = time.perf_counter() - began_s, server.cpu_s() - cpu_began_s
    lines = (b"%010d%b\n" % (number, b"x" * (LINE_BYTES - 11)) for number in range(LINES))
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    if _sha256_of_lines(received) != digest.hexdigest():
        raise RuntimeError("the stream is not what the command wrote")
    megabytes = LINES * LINE_BYTES / 1e6
    return {"output": megabytes / took_s, "output_cpu": cpu_s * 1e3 / megabytes}


async def _collect(watcher: Connection, command: str) -> list[bytes]:
    """The stream to its `complete`."""
    received: list[bytes] = []
    async with watcher.stream(f"/commands/{command}/events") as body:
        while data := await body.receive():
            received.append(data)
            if COMPLETE in data:
                return received
    raise RuntimeError("the stream ended without complete")


async def _cuts(server: Server, cluster: Cluster, cuts: int) -> dict[str, float]:
    """From a cut of every connection to the arrival of the first line that was written after it."""
    await _create_when_ready(server, "demo")
    seen: list[tuple[int, int, int]] = []  # number, written, received (ns)
    cut_ns: list[int] = []
    async with open_connection(server) as poster, trio.open_nursery() as nursery:
        script = shlex.join(["exec", sys.executable, "-c", STAMPS])
        body = {"command": script, "timeout_s": 3_600}
        command = await create(poster, "/projects/demo/shell", body)
        nursery.start_soon(_watch, server, command, seen)
        for number in range(cuts):
            await _until_seen(seen, cut_ns)
            # Not in step with anything.
            await trio.sleep(CUT_PAUSE_S * (0.5 + (number * 0.618) % 1))
            cut_ns.append(await trio.to_thread.run_sync(cluster.ask, "cut"))
        await _until_seen(seen, cut_ns)
        await poster.request("DELETE", f"/commands/{command}")
    numbers = [number for number, _, _ in seen]
    wrong = sum(1 for at, number in enumerate(numbers, 1) if at != number)
    resumed = [
        next(received for _, written, received in seen if written > at) - at for at in cut_ns
    ]
    return {
        "resumed_p50": percentile(resumed, 50) / 1e9,
        "resumed_p99": percentile(resumed, 99) / 1e9,
        "lines_wrong": float(wrong),
        "cuts": float(cuts),
    }


async def _until_seen(seen: list[tuple[int, int, int]], cut_ns: list[int]) -> None:
    """Until a line that was written after the last cut has come."""
    with trio.fail_after(DEADLINE_S):
        while not seen or (cut_ns and seen[-1][1] <= cut_ns[-1]):
            await trio.sleep(0.005)


async def _watch(server: Server, command: str, seen: list[tuple[int, int, int]]) -> None:
    unread = b""
    async with (
        open_connection(server) as watcher,
        watcher.stream(f"/commands/{command}/events") as body,
    ):
        while data := await body.receive():
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            whole, _, unread = (unread + data).rpartition(b"\n\n")
            seen += [(int(n), int(at), now_ns) for n, at in NUMBERED.findall(whole)]
            if COMPLETE in data:
                return


async def _idle(server: Server, count: Callable[[], int], idle_s: float) -> dict[str, float]:
    """Nothing happens but the probes of a kubelet."""
    async with open_connection(server) as connection:
        await _until_ready(connection, IDLE_PODS)
        await trio.sleep(5.0)  # what the start left to do
        began_s, cpu_began_s = time.monotonic(), server.cpu_s()
        requests = count()
        while time.monotonic() - began_s < idle_s:
            await connection.request("GET", "/ready")
            await trio.sleep(READY_EACH_S)
        took_s = time.monotonic() - began_s
    return {
        "idle_cpu": (server.cpu_s() - cpu_began_s) / took_s * 100,
        "idle_requests": (count() - requests) / took_s * 60,
    }


async def _until_ready(connection: Connection, count: int) -> None:
    with trio.fail_after(DEADLINE_S):
        while True:
            _, body = await connection.request("GET", f"/projects?limit={count}")
            projects = json.loads(body)["data"]
            if sum(one["status"] == "ready" for one in projects) >= count:
                return
            await trio.sleep(0.2)


SCENARIO = Scenario(
    name="kubernetes",
    what="`true` in a pod from POST to `complete`, beside a bare exec; 1,000-byte lines through an "
    "exec to one SSE client; every connection to the API server cut; 200 idle projects.",
    figures=(
        Figure(name="exec_p50", unit="ms"),
        Figure(name="complete_p50", unit="ms"),
        Figure(name="on_top_of_exec", unit="ms", at_most=40),
        Figure(name="output", unit="MB/s", at_least=20),
        Figure(name="output_cpu", unit="ms a MB"),
        Figure(name="resumed_p50", unit="s"),
        Figure(name="resumed_p99", unit="s", at_most=2),
        Figure(name="lines_wrong", unit="", at_most=0),
        Figure(name="idle_cpu", unit="% of a core", at_most=1),
        Figure(name="idle_requests", unit="/min", at_most=5),
    ),
    measure=measure,
)
