"""Short versions of tests/cluster/test_faults.py: a server whose way to its pods is cut."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.adapters.execution.observing import processes_in
from tests.app.pods import FakeCluster, fake_cluster, serving
from tests.app.server import Server, open_api, output_of, seqs_of, until_async


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def server(quick_place: Path, cluster: FakeCluster) -> AsyncIterator[Server]:
    async with serving(quick_place, cluster) as server:
        yield server


@pytest.mark.slow
async def test_output_is_whole_though_every_connection_is_cut(
    server: Server, cluster: FakeCluster
) -> None:
    async with open_api(server) as api:
        await api.project()
        cluster.proxy.cut_after_bytes = 40_000
        command = await api.submit("seq 1 100000")
        events = await api.events(command)
        cluster.proxy.cut_after_bytes = None
        ended = await api.ended(command)
    assert output_of(events) == b"".join(b"%d\n" % number for number in range(1, 100_001))
    assert seqs_of(events) == list(range(1, len(seqs_of(events)) + 1))
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    assert cluster.proxy.cuts >= 10


@pytest.mark.slow
async def test_a_cancel_that_cannot_be_sent_is_done_when_the_way_is_back(
    server: Server, cluster: FakeCluster
) -> None:
    async with open_api(server) as api:
        await api.project()
        command = await api.submit("(trap '' TERM; setsid sleep 1000 &) ; echo ready; sleep 1000")
        async with api.stream(command) as events:
            async for event in events:
                if event.name == "output":
                    break
        cluster.proxy.is_refusing = True
        cluster.proxy.cut_all()
        seen = cluster.proxy.accepted
        assert (await api.http.delete(f"/commands/{command}")).is_success
        await until_async(lambda: cluster.proxy.accepted > seen + 2, "it is tried")
        cluster.proxy.is_refusing = False
        ended = await api.ended(command)
    assert ended["status"] == "cancelled"
    await until_async(lambda: not processes_in(cluster.folder / "demo"), "nothing is left")
