"""The whole road on a real API server and kubelet: a server, its clients, pods."""

import hashlib

import pytest

from tests.app.server import Api, Json, Server, output_of, seqs_of
from tests.cluster.ledger import Entry, Ledger
from tests.cluster.real import NAMESPACE, RealCluster, kubectl

# What gets away from a shell that is killed: new sessions, orphans, those who ignore a hang-up.
ESCAPES = {
    "setsid": "setsid sleep 7777 &",
    "double fork": "( ( sleep 7777 & ) & );",
    "nohup": "nohup sleep 7777 >/dev/null 2>&1 &",
    "all of them, deaf": "( trap '' TERM HUP; setsid nohup sh -c 'sleep 7777; :' & ) &",
}


@pytest.mark.parametrize("image", ["busybox", "debian"])
async def test_a_command_runs_and_is_seen_line_by_line(
    cluster: RealCluster, api: Api, image: str
) -> None:
    await cluster.add_pod("demo", image=image)
    await api.project()
    command = await api.submit("pwd; seq 1 20000; echo over >&2; exit 3")
    events = await api.events(command)
    ended = await api.ended(command)
    home, *lines = output_of(events).decode().splitlines()
    assert home == "/workspace"
    assert lines == [str(number) for number in range(1, 20_001)]
    assert output_of(events, "stderr") == b"over\n"
    assert seqs_of(events) == list(range(1, len(seqs_of(events)) + 1))
    assert (ended["status"], ended["exit_code"]) == ("failed", 3)


@pytest.mark.parametrize("image", ["busybox", "debian"])
async def test_bytes_of_any_kind_come_as_they_were_written(
    cluster: RealCluster, api: Api, image: str
) -> None:
    await cluster.add_pod("demo", image=image)
    await api.project()
    script = "head -c 3000000 /dev/urandom >a; cat a; cat a >&2; sha256sum <a >b; cat b >c"
    command = await api.submit(script)
    assert (await api.ended(command))["status"] == "succeeded"
    out, err = await api.output(command), await api.output(command, "stderr")
    told = await api.output(await _run(api, "cat b"))
    assert out == err
    assert hashlib.sha256(out).hexdigest().encode() == told.split()[0]


async def _run(api: Api, script: str) -> str:
    command = await api.submit(script)
    assert (await api.ended(command))["status"] == "succeeded"
    return command


def _escaped(ledger: Ledger, fault: str, ended: Json) -> None:
    ledger.add(
        Entry(
            fault=fault,
            false_successes=int(ended["status"] == "succeeded"),
            outcome=f"{ended['status']}, no process left",
        )
    )


@pytest.mark.parametrize("image", ["busybox", "debian"])
@pytest.mark.parametrize("how", ESCAPES)
async def test_a_cancel_ends_what_tried_to_escape(
    cluster: RealCluster, api: Api, ledger: Ledger, image: str, how: str
) -> None:
    name = await cluster.add_pod("demo", image=image)
    await api.project()
    command = await api.submit(f"{ESCAPES[how]} echo ready; sleep 7777")
    async with api.stream(command) as events:
        async for event in events:
            if event.name == "output":
                break
    assert any("7777" in line for line in await cluster.processes(name))
    assert (await api.http.delete(f"/commands/{command}")).is_success
    ended = await api.ended(command)
    await cluster.until_gone(name, "7777")
    _escaped(ledger, f"cancelled, {image}: {how}", ended)
    assert ended["status"] == "cancelled"


@pytest.mark.parametrize("image", ["busybox", "debian"])
async def test_a_timeout_ends_what_tried_to_escape(
    cluster: RealCluster, api: Api, ledger: Ledger, image: str
) -> None:
    name = await cluster.add_pod("demo", image=image)
    await api.project()
    ended = await api.run(f"{' '.join(ESCAPES.values())} echo ready; sleep 7777", timeout_s=1)
    await cluster.until_gone(name, "7777")
    _escaped(ledger, f"timed out, {image}: all of them", ended)
    assert (ended["status"], ended["exit_code"]) == ("timed_out", None)


async def test_an_image_that_lacks_a_tool_is_told_which(
    cluster: RealCluster, server: Server, api: Api
) -> None:
    """The shell is there; something that the supervisor stands on is not."""
    name = await cluster.add_pod("demo", image="debian")
    await kubectl("exec", "-n", NAMESPACE, name, "--", "rm", "/usr/bin/setsid")
    told = await api.post("/projects", {"id": "demo"})
    assert told.status_code == 503
    assert told.json()["error"]["message"] == "project cannot run commands: missing setsid"
    assert server.log.count("missing setsid") <= 1


async def test_an_image_without_a_shell_is_told_so(
    cluster: RealCluster, server: Server, api: Api
) -> None:
    name = await cluster.add_pod("demo", command=["/bin/busybox", "sleep", "100000"])
    await kubectl("exec", "-n", NAMESPACE, name, "--", "rm", "/bin/sh")
    told = await api.post("/projects", {"id": "demo"})
    assert told.status_code == 503
    assert '"sh": executable file not found' in told.json()["error"]["message"]
    assert server.log.count("executable file not found") <= 1
