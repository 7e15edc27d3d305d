"""What breaks on a real cluster, with a command in the middle: bytes exact, states true."""

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.execution.executor import Place
from rdev.adapters.execution.kubernetes import KubernetesExecutor, KubernetesTransport
from rdev.adapters.kubernetes.connection import connect, read_config
from rdev.adapters.kubernetes.exec import PodExecs, PodTarget
from rdev.domain.execution import Exit, Offsets, Piece
from rdev.domain.ids import ProjectId
from tests.adapters.execution.observing import new_command, sh
from tests.app.server import Api, Json, Server, open_api, output_of, seqs_of
from tests.cluster.ledger import Entry, Ledger, quantiles
from tests.cluster.real import NAMESPACE, RealCluster, kubectl, restart, serving

CUTS = 1_000
LINES = 100_000
LINE_BYTES = 1_000
BULK = f"""awk 'BEGIN {{ for (i = 1; i <= {LINES}; i++) printf "%0{LINE_BYTES - 1}d\\n", i }}'"""
SLOW = "n=0; while [ $n -lt 300 ]; do n=$((n+1)); echo $n; echo $n >&2; sleep 0.1; done; exit 3"
SLOW_SEEN = b"".join(b"%d\n" % n for n in range(1, 301))
# What a cut may cost until bytes flow again.
RESUMED_MAX_S = 2.0


def bulk() -> bytes:
    return b"".join(b"%0999d\n" % number for number in range(1, LINES + 1))


def wrong_bytes(seen: bytes, written: bytes) -> int:
    """How many are missing, too many or not the same."""
    same = sum(a == b for a, b in zip(seen, written, strict=False)) if seen != written else 0
    return 0 if seen == written else max(len(seen), len(written)) - same


# --- the socket ---------------------------------------------------------------------------------


@pytest.mark.timeout(1_200)
async def test_a_hundred_megabytes_through_a_thousand_cuts(
    cluster: RealCluster, ledger: Ledger
) -> None:
    """Cut at any byte of TLS; from each cut to the next byte of the journal."""
    project = ProjectId("demo")
    name = await cluster.add_pod(project)
    async with connect(read_config(cluster.kubeconfig), NAMESPACE) as server:
        target = PodTarget(pod=name, container="project")
        execs = PodExecs(server, lambda _: target, subprotocols=SUBPROTOCOLS)
        executor = KubernetesExecutor(
            cluster=lambda: "test",
            namespace=NAMESPACE,
            transport=KubernetesTransport(execs.open),
            reason_of=lambda _project, _are_gone: None,
            base_env={},
            place=lambda _: Place(home="/workspace", commands="/run/rdev"),
        )
        await executor.prepare(project)
        got, resumed_s, end = bytearray(), list[float](), None
        dice, proxy = random.Random(7), cluster.proxy
        size = LINES * LINE_BYTES
        cut_at, cut_time, accepted = 0, 0.0, 0
        async with executor.attach(
            project,
            new_command(),
            spec=sh(BULK),
            instance=await executor.instance(project),
            offsets=Offsets(),
        ) as attachment:
            while isinstance(item := await attachment.receive(), Piece):
                assert item.offset == len(got)
                got += item.data
                if cut_time and proxy.accepted > accepted:  # of an exec that came after the cut
                    resumed_s.append(trio.current_time() - cut_time)
                    cut_time = 0.0
                if not cut_time and len(got) >= cut_at:
                    # As many as are left to make, in what is left to read.
                    step = (size - len(got)) // max(1, CUTS + CUTS // 8 - len(resumed_s))
                    cut_at = len(got) + dice.randrange(step + 1)
                    accepted, cut_time = proxy.accepted, trio.current_time()
                    proxy.cut_all()
            end = item
    wrong = wrong_bytes(bytes(got), bulk())
    ledger.add(
        Entry(
            fault="socket cut, 100 MB through one exec",
            times=len(resumed_s),
            wrong_bytes=wrong,
            outcome=f"cut to next byte {quantiles(resumed_s)}",
        )
    )
    assert isinstance(end, Exit)
    assert (end.exit_code, end.stdout_bytes, wrong) == (0, size, 0)
    assert len(resumed_s) >= CUTS
    assert sorted(resumed_s)[int(len(resumed_s) * 0.99)] <= RESUMED_MAX_S


@pytest.mark.timeout(1_200)
async def test_a_hundred_megabytes_by_a_server_whose_connections_are_cut(
    cluster: RealCluster, server: Server, api: Api, ledger: Ledger
) -> None:
    """Every connection to the API server ends in the middle, those of the watch too."""
    await cluster.add_pod()
    await api.project()
    cluster.proxy.cut_after_bytes = LINES * LINE_BYTES // CUTS
    command = await api.submit(BULK, timeout_s=1_200)
    events = []
    async with api.stream(command) as stream:
        async for event in stream:
            events.append(event)
    cluster.proxy.cut_after_bytes = None
    ended = await api.ended(command)
    seen = output_of(events)
    wrong = wrong_bytes(seen, bulk())
    ledger.add(
        Entry(
            fault="connection cut, 100 MB out by SSE",
            times=cluster.proxy.cuts,
            wrong_bytes=wrong,
            outcome=str(ended["status"]),
        )
    )
    assert wrong == 0
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    assert cluster.proxy.cuts >= CUTS * 0.9
    assert seqs_of(events) == list(range(1, len(seqs_of(events)) + 1))


# --- the cluster's parts ------------------------------------------------------------------------


async def _through(
    api: Api, ledger: Ledger, fault: str, do: Callable[[], Awaitable[None]], times: int
) -> None:
    """A command that writes all the time while something happens; it must not notice."""
    command = await api.submit(SLOW)
    events = []
    with trio.fail_after(180):
        async with api.stream(command) as stream, trio.open_nursery() as nursery:
            async for event in stream:
                events.append(event)
                if event.data.get("line") == "20" and event.data["stream"] == "stdout":
                    for _ in range(times):
                        nursery.start_soon(do)
    ended = await api.ended(command)
    wrong = sum(
        wrong_bytes(output_of(events, stream), SLOW_SEEN) for stream in ("stdout", "stderr")
    )
    ledger.add(
        Entry(
            fault=fault,
            times=times,
            wrong_bytes=wrong,
            false_successes=int(ended["status"] == "succeeded"),
            outcome=str(ended["status"]),
        )
    )
    assert wrong == 0
    assert (ended["status"], ended["exit_code"], ended["attempt"]) == ("failed", 3, 1)


@pytest.mark.parametrize("part", ["kube-apiserver", "kubelet"])
@pytest.mark.timeout(300)
async def test_a_command_does_not_notice_a_restart(
    cluster: RealCluster, api: Api, ledger: Ledger, part: str
) -> None:
    await cluster.add_pod()
    await api.project()
    await _through(api, ledger, f"{part} killed and started", lambda: restart(part), 1)
    assert (await api.run("echo again"))["status"] == "succeeded"


# --- the pod ------------------------------------------------------------------------------------


async def _begun(api: Api, script: str) -> str:
    """A command that has said something."""
    command = await api.submit(script)
    async with api.stream(command) as events:
        async for event in events:
            if event.name == "output":
                return command
    raise AssertionError("it ended without a word")


async def _lost(api: Api, ledger: Ledger, command: str, fault: str, reason: str) -> Json:
    with trio.fail_after(180):
        while (ended := await api.command(command))["status"] == "running":
            await trio.sleep(0.2)
    ledger.add(
        Entry(
            fault=fault,
            false_successes=int(ended["status"] == "succeeded"),
            outcome=f"{ended['status']}, {ended['reason']}",
        )
    )
    pods = await kubectl("get", "pods", "-n", NAMESPACE, "-o", "jsonpath={.items[*].status}")
    assert (ended["status"], ended["reason"]) == ("lost", reason), pods
    assert await api.output(command) == b"begun\n"
    return ended


@pytest.mark.timeout(300)
async def test_a_command_is_lost_with_its_pod(
    cluster: RealCluster, api: Api, ledger: Ledger
) -> None:
    name = await cluster.add_pod()
    await api.project()
    command = await _begun(api, "echo begun; sleep 1000")
    await cluster.delete(name)
    await _lost(api, ledger, command, "pod deleted", "pod_gone")


@pytest.mark.timeout(300)
async def test_a_command_is_lost_when_its_pod_is_made_anew(
    cluster: RealCluster, api: Api, ledger: Ledger
) -> None:
    """Another pod of the project is there at once: nothing of the command may run in it."""
    name = await cluster.add_pod()
    await api.project()
    command = await _begun(api, "echo begun; sleep 1000")
    await cluster.delete(name)
    again = await cluster.add_pod()
    await _lost(api, ledger, command, "pod replaced", "pod_gone")
    assert not any("sleep 1000" in line for line in await cluster.processes(again))
    assert (await api.run("echo again"))["status"] == "succeeded"


MEMORY = {"resources": {"limits": {"memory": "64Mi"}, "requests": {"memory": "16Mi"}}}


@pytest.mark.timeout(300)
async def test_a_command_that_is_killed_for_its_memory_has_failed(
    cluster: RealCluster, api: Api, ledger: Ledger
) -> None:
    """The kernel takes the greedy process; what supervises it lives and tells."""
    await cluster.add_pod(**MEMORY)
    await api.project()
    ended = await api.run("exec awk 'BEGIN { s = \"x\"; while (1) s = s s }'")
    ledger.add(
        Entry(
            fault="command OOM-killed",
            false_successes=int(ended["status"] == "succeeded"),
            outcome=f"{ended['status']}, signal {ended.get('signal')}",
        )
    )
    assert (ended["status"], ended["signal"]) == ("failed", 9)


GREEDY = "s=x; while :; do s=$s$s; done"
WAITS = "until [ -e /workspace/now ]; do sleep 0.1 & wait $!; done; rm /workspace/now; " + GREEDY


@pytest.mark.timeout(300)
async def test_a_container_that_is_killed_for_its_memory_is_the_reason(
    cluster: RealCluster, api: Api, ledger: Ledger
) -> None:
    """Its process 1 is the greedy one: all that ran in it goes, and it is started again."""
    await cluster.add_pod(**MEMORY, command=["/bin/sh", "-c", WAITS])
    await api.project()
    command = await _begun(api, "echo begun; touch now; sleep 1000")
    await _lost(api, ledger, command, "container OOM-killed", "oom_killed")


@pytest.mark.timeout(300)
async def test_a_command_whose_pod_is_evicted_is_lost_with_that_reason(
    cluster: RealCluster, api: Api, ledger: Ledger
) -> None:
    limit = {"limits": {"ephemeral-storage": "8Mi"}, "requests": {"ephemeral-storage": "1Mi"}}
    await cluster.add_pod(resources=limit)
    await api.project()
    script = "echo begun; dd if=/dev/zero of=/workspace/big bs=1M count=64 2>/dev/null; sleep 1000"
    command = await _begun(api, script)
    await _lost(api, ledger, command, "pod evicted", "evicted")


# --- the server ---------------------------------------------------------------------------------


@pytest.mark.timeout(300)
async def test_another_server_takes_over_and_nothing_is_lost(
    quick_place: Path, cluster: RealCluster, migrated_dsn: str, ledger: Ledger
) -> None:
    shared = {"RDEV_DATABASE_DSN": migrated_dsn, "RDEV_LEASE_S": "2", "RDEV_DRAIN_DELAY_S": "0"}
    await cluster.add_pod()
    async with (
        serving(quick_place, cluster.settings, **shared) as one,
        serving(quick_place, cluster.settings, **shared) as two,
    ):
        async with open_api(one) as api:
            await api.project()
            commands = [await _begun(api, SLOW) for _ in range(3)]
        await trio.to_thread.run_sync(one.kill)
        async with open_api(two) as api:
            seen = [await api.events(command) for command in commands]
            ends = [await api.ended(command) for command in commands]
    wrong = sum(
        wrong_bytes(output_of(events, stream), SLOW_SEEN)
        for events in seen
        for stream in ("stdout", "stderr")
    )
    ledger.add(
        Entry(
            fault="server killed, another took over",
            commands=len(commands),
            wrong_bytes=wrong,
            false_successes=sum(end["status"] == "succeeded" for end in ends),
            outcome=", ".join(str(end["status"]) for end in ends),
        )
    )
    assert wrong == 0
    assert {(e["status"], e["exit_code"], e["attempt"]) for e in ends} == {("failed", 3, 1)}


@pytest.mark.timeout(300)
async def test_a_cancel_is_done_when_the_way_is_cut_meanwhile(
    cluster: RealCluster, api: Api, ledger: Ledger
) -> None:
    name = await cluster.add_pod()
    await api.project()
    command = await _begun(
        api, "(trap '' TERM; setsid nohup sleep 7777 &) ; echo begun; sleep 7777"
    )
    cluster.proxy.is_refusing = True
    cluster.proxy.cut_all()
    assert (await api.http.delete(f"/commands/{command}")).is_success
    await trio.sleep(1)
    cluster.proxy.is_refusing = False
    with trio.fail_after(120):
        while (ended := await api.command(command))["status"] == "running":
            await trio.sleep(0.1)
    await cluster.until_gone(name, "7777")
    ledger.add(Entry(fault="cancelled while cut off", outcome=str(ended["status"])))
    assert ended["status"] == "cancelled"
    assert NAMESPACE in await kubectl("get", "pods", "-A")
