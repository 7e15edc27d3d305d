"""The whole road on a real API server and kubelet: a server, its clients, pods."""

import hashlib

import pytest

from tests.app.server import Api, Server, output_of, seqs_of
from tests.cluster.real import RealCluster

# What gets away from a shell that is killed: new sessions, orphans, those who ignore a hang-up.
ESCAPES = {
    "setsid": "setsid sleep 7777 &",
    "double fork": "( ( sleep 7777 & ) & )",
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


@pytest.mark.parametrize("image", ["busybox", "debian"])
@pytest.mark.parametrize("how", ESCAPES)
async def test_a_cancel_ends_what_tried_to_escape(
    cluster: RealCluster, api: Api, image: str, how: str
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
    assert (await api.ended(command))["status"] == "cancelled"
    await cluster.until_gone(name, "7777")


@pytest.mark.parametrize("image", ["busybox", "debian"])
async def test_a_timeout_ends_what_tried_to_escape(
    cluster: RealCluster, api: Api, image: str
) -> None:
    name = await cluster.add_pod("demo", image=image)
    await api.project()
    ended = await api.run(f"{' '.join(ESCAPES.values())} echo ready; sleep 7777", timeout_s=1)
    assert (ended["status"], ended["exit_code"]) == ("timed_out", None)
    await cluster.until_gone(name, "7777")


async def test_an_image_that_lacks_a_tool_says_which_once(
    cluster: RealCluster, server: Server, api: Api
) -> None:
    """The shell is there; what the supervisor stands on is not."""
    name = await cluster.add_pod("demo")
    await cluster.api.http.get("/version")
    lacks = "for tool in setsid tail; do rm -f $(command -v $tool) /bin/$tool; done"
    from tests.cluster.real import NAMESPACE, kubectl

    await kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", lacks)
    await api.project()
    command = await api.submit("echo never")
    ended = await api.ended(command)
    assert ended["status"] == "failed"
    print(ended, server.log[-3000:])
