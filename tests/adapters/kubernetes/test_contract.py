"""What rdev takes for granted of an API server and a kubelet: on the fake, and on a real cluster.

`RDEV_TEST_KUBECONFIG` names a kubeconfig that may create pods in the namespace `rdev`. Tolerated
between versions: exec v4 alone (before 1.30), the words of messages, how many changes are told.
"""

import os
import shutil
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from lightkube.resources.core_v1 import Pod

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.channels import SUBPROTOCOLS, V4, V5
from rdev.adapters.execution.executor import Place
from rdev.adapters.execution.kubernetes import KubernetesExecutor, KubernetesTransport
from rdev.adapters.execution.transport import TransportError
from rdev.adapters.kubernetes.errors import translated
from rdev.adapters.kubernetes.exec import PodExecs, PodTarget
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Lost, LostReason, Offsets
from rdev.domain.ids import ProjectId
from rdev.domain.pods import health_of
from rdev.domain.projects import ProjectStatus
from tests.adapters.execution.observing import (
    new_command,
    processes_in,
    read_to_end,
    read_until,
    sh,
    until,
)
from tests.adapters.kubernetes.conftest import DEADLINE_S, TestCluster

START = Offsets()


def new_project() -> ProjectId:
    return ProjectId(f"p{uuid.uuid4().hex[:8]}")


@asynccontextmanager
async def watching(cluster: TestCluster) -> AsyncIterator[PodWatch]:
    watch = PodWatch(cluster.api, changed=lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await until(lambda: watch.is_current, "the watch hears")
        yield watch
        nursery.cancel_scope.cancel()


async def ready(cluster: TestCluster, watch: PodWatch, project: ProjectId) -> str:
    name = await cluster.create(project)
    await until(
        lambda: health_of(watch.pod_of(project)).status is ProjectStatus.READY, "it is ready"
    )
    return name


def transport_to(cluster: TestCluster, watch: PodWatch) -> KubernetesTransport:
    return KubernetesTransport(
        PodExecs(cluster.api, watch.target_of, subprotocols=SUBPROTOCOLS).open
    )


async def test_a_pod_is_seen_to_come_to_be_ready_and_to_go(cluster: TestCluster) -> None:
    project = new_project()
    async with watching(cluster) as watch:
        assert watch.pod_of(project) is None
        name = await ready(cluster, watch, project)
        pod = watch.pod_of(project)
        assert pod is not None
        assert (pod.name, pod.container) == (name, "project")
        assert watch.target_of(project) == PodTarget(pod=name, container="project")
        await cluster.delete(name)
        await until(lambda: watch.pod_of(project) is None, "it is gone")
        assert watch.lost_reason(project, are_gone=False) is LostReason.POD_GONE


async def test_a_pod_that_was_there_is_found_by_the_list(cluster: TestCluster) -> None:
    project = new_project()
    name = await cluster.create(project)
    async with watching(cluster) as watch:
        pod = watch.pod_of(project)
        assert pod is not None
        assert pod.name == name


async def test_what_does_not_exist_is_not_found(cluster: TestCluster) -> None:
    with pytest.raises(RdevError) as caught, translated():
        await cluster.api.objects.get(Pod, "no-such-pod")
    assert caught.value.code is ErrorCode.NOT_FOUND


async def test_what_exists_cannot_be_made_again(cluster: TestCluster) -> None:
    name = await cluster.create(new_project())
    again = Pod.from_dict(
        {
            "metadata": {"name": name},
            "spec": {"containers": [{"name": "project", "image": cluster.image}]},
        }
    )
    with pytest.raises(RdevError) as caught, translated():
        await cluster.api.objects.create(again)  # type: ignore[call-overload]
    assert caught.value.code is ErrorCode.CONFLICT


async def test_an_exec_of_no_pod_is_refused(cluster: TestCluster) -> None:
    execs = PodExecs(
        cluster.api,
        lambda _: PodTarget(pod="no-such-pod", container="project"),
        subprotocols=SUBPROTOCOLS,
    )
    with pytest.raises(TransportError, match="404"):
        async with KubernetesTransport(execs.open).run(new_project(), ["true"]):
            pass


async def test_the_newest_protocol_that_both_know_is_spoken(cluster: TestCluster) -> None:
    project = new_project()
    async with watching(cluster) as watch:
        await ready(cluster, watch, project)
        execs = PodExecs(cluster.api, watch.target_of, subprotocols=SUBPROTOCOLS)
        async with execs.open(project, ["true"]) as socket:
            assert socket.subprotocol == (V5 if cluster.has_v5 else V4)


async def test_an_exec_carries_bytes_both_ways(cluster: TestCluster) -> None:
    project, data = new_project(), bytes(range(256)) * 400
    async with watching(cluster) as watch:
        await ready(cluster, watch, project)
        with trio.fail_after(DEADLINE_S):
            async with transport_to(cluster, watch).run(project, ["cat"]) as streams:
                await streams.stdin.send_all(data)
                read = b""
                while len(read) < len(data):
                    read += await streams.stdout.receive_some(65_536)
        assert read == data


async def test_a_program_that_is_not_there_says_so(cluster: TestCluster) -> None:
    project = new_project()
    async with watching(cluster) as watch:
        await ready(cluster, watch, project)
        async with transport_to(cluster, watch).run(project, ["no-such-program"]) as streams:
            with trio.fail_after(DEADLINE_S):
                with pytest.raises(trio.BrokenResourceError, match="no-such"):
                    await streams.stdout.receive_some(100)


async def test_the_stdin_of_an_exec_ends_with_its_connection(cluster: TestCluster) -> None:
    """Else what observes would stay in the pod, one for each connection that was lost."""
    project, mark = new_project(), f"/dev/shm/rdev-{uuid.uuid4().hex}"
    async with watching(cluster) as watch:
        await ready(cluster, watch, project)
        transport = transport_to(cluster, watch)
        script = f"echo x; cat >/dev/null; echo >{mark}"
        async with transport.run(project, ["sh", "-c", script]) as streams:
            assert (await streams.stdout.receive_some(10)).startswith(b"x")
        wait = f"until [ -e {mark} ]; do sleep 0.1; done; rm {mark}; echo ended"
        with trio.fail_after(DEADLINE_S):
            async with transport.run(project, ["sh", "-c", wait]) as streams:
                assert await streams.stdout.receive_some(10) == b"ended\n"


@asynccontextmanager
async def executing(
    cluster: TestCluster, patience: Patience | None = None
) -> AsyncIterator[tuple[KubernetesExecutor, str, ProjectId, str]]:
    """An executor, its folder in the pod, and a project whose pod is ready and prepared."""
    project, place = new_project(), f"/dev/shm/rdev-test-{uuid.uuid4().hex}"
    async with watching(cluster) as watch:
        name = await ready(cluster, watch, project)
        executor = KubernetesExecutor(
            cluster=lambda: "test",
            namespace=cluster.api.namespace,
            transport=transport_to(cluster, watch),
            reason_of=lambda of, are_gone: watch.lost_reason(of, are_gone=are_gone),
            base_env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"},
            place=lambda _: Place(home=f"{place}/home", commands=f"{place}/commands"),
            patience=patience,
        )
        await executor.prepare(project)
        try:
            yield executor, place, project, name
        finally:
            end_processes(cluster, place)
            if cluster.fake is not None:
                shutil.rmtree(place)
            elif watch.pod_of(project) is not None:
                with trio.move_on_after(10, shield=True):  # shielded: leave nothing there
                    argv = ["sh", "-c", f"rm -rf {place}; echo"]
                    async with transport_to(cluster, watch).run(project, argv) as streams:
                        await streams.stdout.receive_some(1)


def end_processes(cluster: TestCluster, place: str) -> None:
    """What the end of a pod does to its processes; of a fake pod they are this machine's."""
    if cluster.fake is not None:
        for pid in processes_in(Path(place)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_a_command_runs_in_a_pod(cluster: TestCluster) -> None:
    async with executing(cluster) as (executor, _, project, _name):
        instance = await executor.instance(project)
        async with executor.attach(
            project,
            new_command(),
            spec=sh("cat; echo two >&2; exit 5", stdin="eins €\n".encode()),
            instance=instance,
            offsets=START,
        ) as attachment:
            seen = await read_to_end(attachment)
        assert (seen.out.decode(), seen.err, seen.exit.exit_code) == ("eins €\n", b"two\n", 5)


@pytest.mark.slow
async def test_a_command_in_a_pod_is_killed(cluster: TestCluster) -> None:
    async with executing(cluster) as (executor, _, project, _name):
        command, instance = new_command(), await executor.instance(project)
        async with executor.attach(
            project,
            command,
            spec=sh("sleep 1000 & echo ready; wait"),
            instance=instance,
            offsets=START,
        ) as attachment:
            await read_until(attachment, b"ready\n")
            assert (await executor.kill(project, command, grace_s=2)).confirmed
            seen = await read_to_end(attachment, Offsets(stdout=6))
        assert seen.exit.why == "cancelled"


async def test_a_megabyte_of_lines_comes_whole(cluster: TestCluster) -> None:
    async with executing(cluster) as (executor, _, project, _name):
        instance = await executor.instance(project)
        async with executor.attach(
            project, new_command(), spec=sh("seq 1 150000"), instance=instance, offsets=START
        ) as attachment:
            seen = await read_to_end(attachment)
        assert seen.out == b"".join(b"%d\n" % number for number in range(1, 150_001))


@pytest.mark.slow
async def test_a_command_whose_pod_is_deleted_is_lost_with_it(cluster: TestCluster) -> None:
    patience = Patience(heartbeat_s=0.5, silence_s=10, unreachable_s=2)
    async with executing(cluster, patience) as (executor, place, project, name):
        instance = await executor.instance(project)
        async with executor.attach(
            project,
            new_command(),
            spec=sh("echo ready; exec sleep 1000"),
            instance=instance,
            offsets=START,
        ) as attachment:
            await read_until(attachment, b"ready\n")
            await cluster.delete(name)
            end_processes(cluster, place)
            seen = await read_to_end(attachment, Offsets(stdout=6))
        assert seen.end == Lost(reason=LostReason.POD_GONE)
