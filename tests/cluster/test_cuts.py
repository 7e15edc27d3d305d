"""A hundred megabytes out of a pod, cut a thousand times: every byte, and each soon."""

import hashlib
import random
import time
from dataclasses import dataclass, field
from typing import Any

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
from tests.app.server import Api, Event, Server, output_of, seqs_of
from tests.cluster.ledger import Entry, Ledger, quantiles, wrong_bytes
from tests.cluster.real import NAMESPACE, RealCluster
from tests.fakes.cuts import CuttingProxy

CUTS = 1_000
LINES = 100_000
LINE_BYTES = 1_000
BULK = f"""awk 'BEGIN {{ for (i = 1; i <= {LINES}; i++) printf "%0{LINE_BYTES - 1}d\\n", i }}'"""
# What a cut may cost until bytes flow again.
RESUMED_MAX_S = 2.0
# Each line says when it was written. A hundred megabytes at the least, and until all cuts are made;
# what was written stays in a file, to compare. Seconds since the epoch have 10 digits.
STAMPED = f"""exec bash -c '
    fill=$(printf %{LINE_BYTES - 28}s); n=0
    until [ $n -ge {LINES} ] && [ -e enough ]; do
        for _ in {{1..10}}; do
            printf "%08d %s %s\\n" $((++n)) $EPOCHREALTIME "$fill"
        done
        sleep 0.02
    done | tee copy'"""


def bulk() -> bytes:
    return b"".join(b"%0999d\n" % number for number in range(1, LINES + 1))


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


@dataclass(slots=True)
class _Reader:
    """What came out of a server: how much, its digest, and when the last line was written."""

    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    next_seq: int = 1
    is_in_order: bool = True
    written: float = 0.0
    came: trio.Event = field(default_factory=trio.Event)

    def take(self, event: Event) -> None:
        if event.seq is not None:
            self.is_in_order &= event.seq == self.next_seq
            self.next_seq = event.seq + 1
        if event.name == "output" and event.data["stream"] == "stdout":
            self.size += len(event.content)
            self.digest.update(event.content)
            self.written = float(event.content[9:26])
            self.came.set()
            self.came = trio.Event()

    async def until_written_after(self, when: float) -> None:
        while self.written <= when:
            await self.came.wait()


async def _cut(proxy: CuttingProxy, reader: _Reader) -> list[float]:
    """Cut all connections, each time when bytes flow, until it is often and much enough; seconds
    from each cut to a line that was written after it."""
    dice, resumed_s = random.Random(7), list[float]()
    await reader.until_written_after(0)
    while len(resumed_s) < CUTS or reader.size < LINES * LINE_BYTES:
        await trio.sleep(dice.random() / 10)
        cut_at = time.time()
        proxy.cut_all()
        with trio.fail_after(60):
            await reader.until_written_after(cut_at)
        resumed_s.append(time.time() - cut_at)
    return resumed_s


@pytest.mark.timeout(1_800)
async def test_a_line_is_seen_soon_after_each_of_a_thousand_cuts(
    cluster: RealCluster, server: Server, api: Api, ledger: Ledger
) -> None:
    """From the cut to a line that the command wrote after it, at a client of the server."""
    await cluster.add_pod(image="debian")
    await api.project()
    command = await api.submit(STAMPED, timeout_s=1_800)
    reader, resumed_s = _Reader(), list[float]()
    async with trio.open_nursery() as nursery:

        async def cut() -> None:
            resumed_s.extend(await _cut(cluster.proxy, reader))
            assert (await api.run("touch enough"))["status"] == "succeeded"

        nursery.start_soon(cut)
        async with api.stream(command) as stream:
            async for event in stream:
                reader.take(event)
    ended = await api.ended(command)
    kept = await api.run("wc -c <copy; sha256sum <copy")
    size, digest = (await api.output(str(kept["id"]))).split()[:2]
    is_exact = (reader.size, reader.digest.hexdigest()) == (int(size), digest.decode())
    ledger.add(
        Entry(
            fault=f"all connections cut, {reader.size / 1e6:.0f} MB out by SSE",
            times=len(resumed_s),
            wrong_bytes=0 if is_exact else max(1, abs(reader.size - int(size))),
            outcome=f"{ended['status']}, cut to a line written after it {quantiles(resumed_s)}",
        )
    )
    assert is_exact
    assert reader.size >= LINES * LINE_BYTES
    assert reader.is_in_order
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    assert len(resumed_s) >= CUTS
    assert sorted(resumed_s)[int(len(resumed_s) * 0.99)] <= RESUMED_MAX_S
