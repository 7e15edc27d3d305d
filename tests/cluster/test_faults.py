"""What breaks on a real cluster, with a command in the middle: bytes exact, states true."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests.app.server import Api, Json, open_api, output_of
from tests.cluster.ledger import Entry, Ledger, wrong_bytes
from tests.cluster.real import NAMESPACE, RealCluster, kubectl, restart, serving

SLOW = "n=0; while [ $n -lt 300 ]; do n=$((n+1)); echo $n; echo $n >&2; sleep 0.1; done; exit 3"
SLOW_SEEN = b"".join(b"%d\n" % n for n in range(1, 301))


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
