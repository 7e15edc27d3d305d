"""The exporter against collectors that take, refuse, hang, stutter and vanish: nobody waits."""

import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from rdev.adapters.telemetry import otlp
from rdev.adapters.telemetry.otlp import OtlpExporter, Outbox
from rdev.adapters.telemetry.tracing import OtelTracing
from rdev.ports.tracing import ExportStatistics
from tests.fakes.otlp import Collector, open_collector

DEADLINE_S = 30.0
QUICK_S = 0.02


@pytest.fixture
def collector() -> Iterator[Collector]:
    with open_collector() as collector:
        yield collector


class Rig:
    """An exporter, and who has something to tell."""

    def __init__(self, url: str, *, timeout_s: float = DEADLINE_S, every_s: float = 3_600) -> None:
        self.outbox = Outbox(gather_s=QUICK_S)
        resource = {"service.name": "rdev", "service.instance.id": "one"}
        self._tracing = OtelTracing(outbox=self.outbox, resource=resource, sample=1.0)
        self.exporter = OtlpExporter(
            collector=otlp.Collector(url=url + "/", headers={"x-a": "b"}, timeout_s=timeout_s),
            outbox=self.outbox,
            metrics=self._metrics,
            metrics_every_s=every_s,
            pause_s=QUICK_S,
            flush_s=0.5,
        )

    async def _metrics(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return b""

    def tell(self, count: int, name: str = "GET") -> None:
        """So many spans end now."""
        for number in range(count):
            self._tracing.request(name, "http", f"/{number}", "10.0.0.1", None).end()

    def statistics(self) -> ExportStatistics:
        return self.exporter.statistics()

    async def until(self, condition: Callable[[ExportStatistics], bool]) -> ExportStatistics:
        with trio.fail_after(DEADLINE_S):
            while not condition(self.statistics()):
                await trio.sleep(0.01)
        return self.statistics()


async def test_every_span_arrives_once_in_batches(collector: Collector) -> None:
    rig = Rig(collector.url)
    async with rig.exporter.running():
        rig.tell(1_300)
        found = await rig.until(lambda now: now.exported == 1_300)

    assert (found.dropped, found.failed, found.waiting) == (0, 0, 0)
    paths = [str(span.facts["url.path"]) for span in collector.spans]
    assert paths == [f"/{number}" for number in range(1_300)]
    assert len({span.span_id for span in collector.spans}) == 1_300
    assert 3 <= sum(len(body) > 0 for body in collector.bodies) <= 4
    (headers,) = {(h["content-type"], h["x-a"]) for h in collector.headers}
    assert headers == ("application/x-protobuf", "b")


async def test_what_is_left_at_the_end_is_sent(collector: Collector) -> None:
    rig = Rig(collector.url)
    async with rig.exporter.running():
        await trio.lowlevel.checkpoint()
        rig.tell(3)

    assert rig.statistics() == ExportStatistics(exported=3, metrics=1)
    assert len(collector.spans) == 3


async def test_metrics_are_told_now_and_then(collector: Collector) -> None:
    rig = Rig(collector.url, every_s=0.02)
    async with rig.exporter.running():
        await rig.until(lambda now: now.metrics >= 3)


async def test_a_collector_that_is_busy_is_asked_again_when_it_says(collector: Collector) -> None:
    collector.status, collector.answer_headers = 503, {"Retry-After": "0"}
    rig = Rig(collector.url)
    async with rig.exporter.running():
        rig.tell(2)
        await rig.until(lambda now: now.failed >= 2)
        assert rig.statistics().waiting == 2
        collector.status = 200
        found = await rig.until(lambda now: now.exported == 2)

    assert found.dropped == 0
    assert len(collector.spans) == 2


async def test_a_collector_that_stays_busy_costs_the_batch(collector: Collector) -> None:
    collector.status = 429
    rig = Rig(collector.url)
    async with rig.exporter.running():
        rig.tell(2)
        found = await rig.until(lambda now: now.dropped == 2)

    assert found.failed == otlp.TRIES_MAX


@pytest.mark.parametrize("status", [301, 400, 401, 500])
async def test_what_is_refused_for_good_is_dropped_at_once(
    collector: Collector, status: int
) -> None:
    collector.status = status
    collector.answer_headers = {"Location": collector.url + "/elsewhere"}
    rig = Rig(collector.url)
    async with rig.exporter.running():
        rig.tell(2)
        found = await rig.until(lambda now: now.dropped == 2)
        assert found.failed == 1
        collector.status = 200
        rig.tell(1)
        await rig.until(lambda now: now.exported == 1)


async def test_spans_that_a_collector_did_not_take_are_counted_as_dropped(
    collector: Collector,
) -> None:
    collector.answer = otlp.ExportTraceServiceResponse(
        partial_success={"rejected_spans": 2, "error_message": "too old"}
    ).SerializeToString()
    rig = Rig(collector.url)
    async with rig.exporter.running():
        rig.tell(5)
        found = await rig.until(lambda now: now.exported > 0)

    assert (found.exported, found.dropped, found.failed) == (3, 2, 0)


async def test_an_answer_that_is_long_nonsense_is_an_answer(
    collector: Collector,
) -> None:
    collector.answer = b"\xff" * 10_000_000
    rig = Rig(collector.url)
    async with rig.exporter.running():
        rig.tell(1)
        found = await rig.until(lambda now: now.exported == 1)

    assert found.dropped == 0


async def test_nobody_there_costs_drops_and_two_lines_in_the_log(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rdev.otlp")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        rig = Rig(f"http://127.0.0.1:{taken.getsockname()[1]}")
        async with rig.exporter.running():
            rig.tell(2)
            await rig.until(lambda now: now.dropped == 2)
            rig.tell(2)
            await rig.until(lambda now: now.dropped == 4)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["OTLP export fails"]
    assert caplog.records[0].__dict__["why"] == "ConnectError"


@asynccontextmanager
async def serving(answer: bytes | None) -> AsyncIterator[str]:
    """Takes connections, says this to each, or (None) reads and says nothing."""

    async def handle(stream: trio.SocketStream) -> None:
        if answer is not None:
            await stream.receive_some(65_536)
            await stream.send_all(answer)
            return
        async for _ in stream:
            pass

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", b""]
)
async def test_a_collector_that_speaks_no_http_is_one_that_fails(answer: bytes) -> None:
    async with serving(answer) as url:
        rig = Rig(url)
        async with rig.exporter.running():
            rig.tell(1)
            found = await rig.until(lambda now: now.dropped == 1)

    assert found.failed >= otlp.TRIES_MAX


async def test_a_black_hole_holds_up_nobody_and_what_waits_is_bounded() -> None:
    async with serving(None) as url:
        rig = Rig(url, timeout_s=DEADLINE_S)
        async with rig.exporter.running():
            rig.tell(1)
            await rig.until(lambda now: len(rig.outbox) == 0)
            # No checkpoint: telling does not even let anybody else run.
            rig.tell(otlp.QUEUE_MAX + 100)
            assert len(rig.outbox) == otlp.QUEUE_MAX
            assert rig.statistics().dropped == 100
            began_s = trio.current_time()
        # Its own bound is 0.5 s; the collector's would be 30.
        assert trio.current_time() - began_s < DEADLINE_S / 2
    oldest = rig.outbox.take()[0]
    assert oldest.attributes is not None
    assert oldest.attributes["url.path"] == "/100", "the oldest went"


async def test_a_collector_that_is_slow_for_ever_is_given_up_each_time() -> None:
    async with serving(None) as url:
        rig = Rig(url, timeout_s=0.05)
        async with rig.exporter.running():
            rig.tell(1)
            found = await rig.until(lambda now: now.dropped == 1)

    assert found.failed >= otlp.TRIES_MAX


async def test_who_is_cancelled_does_not_wait_for_the_rest(collector: Collector) -> None:
    rig = Rig(collector.url)
    with trio.CancelScope() as scope:
        async with rig.exporter.running():
            rig.tell(1)
            scope.cancel()
            await trio.lowlevel.checkpoint()

    assert scope.cancelled_caught
    assert collector.spans == []


async def test_a_defect_in_the_exporter_fails_no_stop(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(spans: object) -> None:
        raise ValueError("cannot be encoded")

    rig = Rig(collector.url)
    monkeypatch.setattr(otlp, "encode_spans", broken)
    async with rig.exporter.running():
        rig.tell(1)
    assert "what is left cannot be exported" in caplog.text


async def test_a_defect_in_the_exporter_ends_nothing_but_its_batch(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(spans: object) -> None:
        raise ValueError("cannot be encoded")

    rig = Rig(collector.url, every_s=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(otlp, "encode_spans", broken)
        patch.setattr(rig.exporter, "_metrics", broken)
        async with rig.exporter.running():
            rig.tell(2)
            await rig.until(lambda now: now.dropped == 2)
            with trio.fail_after(DEADLINE_S):
                while "metrics cannot be exported" not in caplog.text:
                    await trio.sleep(0.01)
            patch.undo()
            rig.tell(1)
            await rig.until(lambda now: now.exported == 1 and now.metrics > 0)
