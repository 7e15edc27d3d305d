"""The appender: bounds, order, repeats, and who is told what."""

from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rdev.domain.commands import Claimed, Lease, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import LostReason, Stream
from rdev.domain.stream import Chunk, Source, final_lines
from rdev.ports.output import Append, AppendResult, NewChunk
from rdev.services import appender as module
from rdev.services.appender import (
    BATCH_MAX_BYTES,
    PENDING_MAX_BYTES,
    Appender,
    LeaseLostError,
    Writer,
)
from tests.fakes.output import FakeOutput
from tests.fakes.store import ACTOR
from tests.services.scripted import Server, backoff, make_project, submit

KIB_64 = 65_536
GUILTY_BYTES = 2**31


def chunk(size_bytes: int = 10, raw_bytes: int = 5) -> NewChunk:
    """One event of so many bytes."""
    payload = b"{" + b"x" * (size_bytes - 2) + b"}"
    return NewChunk(source=Source.STDOUT, events=1, raw_bytes=raw_bytes, payload=payload)


class ObservedLog(FakeOutput):
    """Remembers the batches, and can hold them up."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.state)
        self.batches: list[list[Append]] = []
        self.gate = trio.Event()
        self.gate.set()

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        self.batches.append(list(batch))
        await self.gate.wait()
        return await super().append(batch)

    @property
    def sizes(self) -> list[int]:
        return [sum(append.size_bytes for append in batch) for batch in self.batches]


class Bench:
    """An appender over an observed log."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.log = ObservedLog(server)
        self.published: list[Chunk] = []
        self.appender = Appender(log=self.log, publish=self.published.append, backoff=backoff)

    async def running(self, count: int = 1) -> list[Claimed]:
        """Running commands, each in a project of its own."""
        for number in range(count):
            await make_project(self.server, f"project-{number}")
            await submit(self.server, "quick", project=f"project-{number}")
        return await self.server.claim()

    async def writer(self) -> Writer:
        [claimed] = await self.running()
        return self.appender.open(claimed)


@pytest.fixture
async def bench(server: Server) -> Bench:
    return Bench(server)


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(600):
        while not condition():
            await trio.sleep(0.001)


async def _finish(writer: Writer) -> None:
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    payload = final_lines(outcome, attempt=1, truncated=False, stdout_bytes=0, stderr_bytes=0)
    last = NewChunk(source=Source.LIFE, events=2, raw_bytes=0, payload=payload)
    writer.finish(outcome, last)
    await writer.finished()


async def test_output_is_appended_without_waiting_for_a_timer(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    began = trio.current_time()
    await writer.write(Stream.STDOUT, chunk())
    await wait_all_tasks_blocked()
    assert trio.current_time() == began
    assert [one.last_seq for one in bench.published] == [3]
    assert writer.pending_bytes == 0


async def test_what_comes_while_a_batch_is_in_flight_goes_in_the_next(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    bench.log.gate = trio.Event()
    await writer.write(Stream.STDOUT, chunk())
    await wait_all_tasks_blocked()
    for _ in range(3):
        await writer.write(Stream.STDOUT, chunk())
    bench.log.gate.set()
    await _until(lambda: writer.pending_bytes == 0)
    assert [len(batch[0].chunks) for batch in bench.log.batches] == [1, 3]
    assert [one.first_seq for one in bench.published] == [3, 4, 5, 6]


async def test_nothing_is_published_before_it_is_committed(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    bench.log.gate = trio.Event()
    await writer.write(Stream.STDOUT, chunk())
    await wait_all_tasks_blocked()
    assert bench.log.batches
    assert bench.published == []
    bench.log.gate.set()
    await wait_all_tasks_blocked()
    stored = bench.server.state.chunks[writer.lease.command]
    assert bench.published == stored[2:]


async def test_a_writer_waits_while_256_kib_are_pending(
    bench: Bench, nursery: trio.Nursery
) -> None:
    writer = await bench.writer()
    for _ in range(PENDING_MAX_BYTES // KIB_64):
        await writer.write(Stream.STDOUT, chunk(KIB_64))
    written: list[bool] = []

    async def one_more() -> None:
        await writer.write(Stream.STDOUT, chunk(KIB_64))
        written.append(True)

    nursery.start_soon(one_more)
    await wait_all_tasks_blocked()
    assert not written
    assert writer.pending_bytes == PENDING_MAX_BYTES
    assert bench.appender.statistics().pending_bytes == PENDING_MAX_BYTES
    nursery.start_soon(bench.appender.run)
    await _until(lambda: writer.pending_bytes == 0)
    assert written


async def test_a_writer_cancelled_while_it_waits_hands_over_nothing(bench: Bench) -> None:
    writer = await bench.writer()
    for _ in range(PENDING_MAX_BYTES // KIB_64):
        await writer.write(Stream.STDOUT, chunk(KIB_64))
    end = writer.end
    with trio.move_on_after(1):
        await writer.write(Stream.STDOUT, chunk(KIB_64))
    assert (writer.pending_bytes, writer.end) == (PENDING_MAX_BYTES, end)


async def test_a_batch_of_several_commands_is_bounded(bench: Bench) -> None:
    claimed = await bench.running(9)
    for one in claimed:
        writer = bench.appender.open(one)
        for _ in range(2):
            await writer.write(Stream.STDOUT, chunk(KIB_64 - 1))
    while bench.appender.statistics().pending_bytes > 0:
        await bench.appender.run_once()
    assert max(bench.log.sizes) <= BATCH_MAX_BYTES
    assert [len(batch) for batch in bench.log.batches] == [2, 2, 2, 2, 1]
    assert {append.lease for batch in bench.log.batches for append in batch} == {
        one.lease for one in claimed
    }


async def test_the_pending_output_of_one_command_goes_as_one_append(bench: Bench) -> None:
    writer = await bench.writer()
    for _ in range(5):
        if writer.pending_bytes < PENDING_MAX_BYTES:
            await writer.write(Stream.STDOUT, chunk(KIB_64 + 100))
    await bench.appender.run_once()
    assert len(bench.log.batches) == 1
    assert bench.log.sizes[0] > BATCH_MAX_BYTES
    assert writer.pending_bytes == 0


async def test_a_busy_command_does_not_starve_the_others(bench: Bench) -> None:
    first, second = await bench.running(2)
    busy, calm = bench.appender.open(first), bench.appender.open(second)
    await busy.write(Stream.STDOUT, chunk(PENDING_MAX_BYTES))
    await calm.write(Stream.STDOUT, chunk())
    await bench.appender.run_once()
    await busy.write(Stream.STDOUT, chunk(PENDING_MAX_BYTES))
    await bench.appender.run_once()
    assert calm.pending_bytes == 0


async def test_a_lost_reply_neither_loses_nor_doubles(bench: Bench, nursery: trio.Nursery) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    for _ in range(20):
        bench.server.state.lost_replies = 2
        await writer.write(Stream.STDOUT, chunk())
        await writer.write(Stream.STDERR, chunk())
        await _until(lambda: writer.pending_bytes == 0)
    stored = bench.server.state.chunks[writer.lease.command][2:]
    assert [one.first_seq for one in stored] == list(range(3, 43))
    assert bench.published == stored


async def test_a_database_that_is_gone_is_waited_for(bench: Bench, nursery: trio.Nursery) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    bench.server.state.unavailable = True
    await writer.write(Stream.STDOUT, chunk())
    await trio.sleep(60)
    assert writer.pending_bytes == 10
    assert len(bench.log.batches) < 40
    bench.server.state.unavailable = False
    await _until(lambda: writer.pending_bytes == 0)
    assert [one.last_seq for one in bench.published] == [3]


async def test_a_locked_command_comes_again_and_holds_up_nobody(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    first, second = await bench.running(2)
    locked, free = bench.appender.open(first), bench.appender.open(second)
    with bench.server.state.hold(first.lease.command):
        await locked.write(Stream.STDOUT, chunk())
        await free.write(Stream.STDOUT, chunk())
        await _until(lambda: free.pending_bytes == 0)
        await trio.sleep(1)
        assert locked.pending_bytes == 10
    await _until(lambda: locked.pending_bytes == 0)


async def test_a_stale_writer_is_told_that_its_lease_is_lost(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    [claimed] = await bench.running()
    writer = bench.appender.open(claimed)
    await bench.server.store.release([claimed.lease])
    await bench.server.claim()
    await writer.write(Stream.STDOUT, chunk())
    await wait_all_tasks_blocked()
    with pytest.raises(LeaseLostError):
        await writer.write(Stream.STDOUT, chunk())
    with pytest.raises(LeaseLostError):
        await _finish(writer)
    assert bench.appender.statistics().stale == 1
    assert bench.published == []


async def test_a_waiting_writer_is_woken_when_its_lease_is_lost(
    bench: Bench, nursery: trio.Nursery
) -> None:
    [claimed] = await bench.running()
    writer = bench.appender.open(claimed)
    await bench.server.store.release([claimed.lease])
    await bench.server.claim()
    nursery.start_soon(bench.appender.run)
    with pytest.raises(LeaseLostError):
        await _finish(writer)


async def test_a_batch_is_halved_until_the_guilty_one_is_alone(
    bench: Bench, nursery: trio.Nursery
) -> None:
    claimed = await bench.running(5)
    writers = [bench.appender.open(one) for one in claimed]
    for number, writer in enumerate(writers):
        guilty = number == 3
        await writer.write(Stream.STDOUT, chunk(raw_bytes=GUILTY_BYTES if guilty else 5))
    nursery.start_soon(bench.appender.run)
    await _until(lambda: not any(writer.pending_bytes for writer in writers))
    assert len(bench.published) == 4
    with pytest.raises(RdevError) as caught:
        await writers[3].write(Stream.STDOUT, chunk())
    assert caught.value.code is ErrorCode.INTERNAL_ERROR
    for writer in writers[:3]:
        await writer.write(Stream.STDOUT, chunk())
    await _until(lambda: len(bench.published) == 7)


async def test_a_finish_returns_when_the_end_is_published(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    await writer.write(Stream.STDOUT, chunk())
    bench.server.state.lost_replies = 1
    await _finish(writer)
    assert bench.published[-1].is_final
    assert bench.server.state.rows[writer.lease.command].command.status is Status.SUCCEEDED


async def test_the_new_writer_of_a_command_is_not_lost_behind_the_old_one(
    bench: Bench, nursery: trio.Nursery
) -> None:
    """After a take-over of our own a command has two writers for a while."""
    nursery.start_soon(bench.appender.run)
    [claimed] = await bench.running()
    old = bench.appender.open(claimed)
    await bench.server.store.release([claimed.lease])
    [taken] = await bench.server.claim()
    new = bench.appender.open(taken)
    bench.log.gate = trio.Event()
    await old.write(Stream.STDOUT, chunk())
    await wait_all_tasks_blocked()
    await new.write(Stream.STDOUT, chunk())
    bench.log.gate.set()
    await _until(lambda: new.pending_bytes == 0)
    with pytest.raises(LeaseLostError):
        await old.write(Stream.STDOUT, chunk())
    for batch in bench.log.batches:
        assert len({append.lease.command for append in batch}) == len(batch)


async def test_two_writers_of_a_command_do_not_share_a_batch(bench: Bench) -> None:
    [claimed] = await bench.running()
    old = bench.appender.open(claimed)
    await bench.server.store.release([claimed.lease])
    [taken] = await bench.server.claim()
    new = bench.appender.open(taken)
    await old.write(Stream.STDOUT, chunk())
    await new.write(Stream.STDOUT, chunk())
    assert await bench.appender.run_once() == 1
    assert await bench.appender.run_once() == 1
    assert (old.pending_bytes, new.pending_bytes) == (0, 0)


async def test_output_over_the_cap_is_trimmed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD_BYTES", 100)
    monkeypatch.setattr(module, "TAIL_BYTES", 100)
    monkeypatch.setattr(module, "TRIM_STRIDE_BYTES", 50)
    writer = await bench.writer()
    assert not writer.truncated
    for _ in range(100):
        await writer.write(Stream.STDOUT, chunk(raw_bytes=10))
        await bench.appender.run_once()
    stored = bench.server.state.chunks[writer.lease.command]
    kept_bytes = sum(one.raw_bytes for one in stored if not one.is_gap)
    assert 200 <= kept_bytes <= 250
    assert writer.truncated
    command = bench.server.state.rows[writer.lease.command].command
    assert command.dropped_bytes == 1_000 - kept_bytes


async def test_a_trim_that_fails_comes_again_after_a_stride(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of very many small chunks may be too slow to trim: that must not hold up everybody."""
    monkeypatch.setattr(module, "HEAD_BYTES", 100)
    monkeypatch.setattr(module, "TAIL_BYTES", 100)
    monkeypatch.setattr(module, "TRIM_STRIDE_BYTES", 50)
    tries: list[int] = []

    async def too_slow(lease: Lease, source: Source, *, head_bytes: int, tail_bytes: int) -> int:
        tries.append(bench.server.state.rows[lease.command].command.stdout_bytes)
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database did not answer in time")

    monkeypatch.setattr(bench.log, "trim", too_slow)
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    for _ in range(50):
        await writer.write(Stream.STDOUT, chunk(raw_bytes=10))
        await _until(lambda: writer.pending_bytes == 0)
    assert tries == [260, 310, 360, 410, 460]


async def test_a_writer_after_a_take_over_knows_that_output_was_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    [claimed] = await bench.running()
    writer = bench.appender.open(claimed)
    for _ in range(10):
        await writer.write(Stream.STDOUT, chunk(raw_bytes=10))
        await bench.appender.run_once()
    await bench.log.trim(claimed.lease, Source.STDOUT, head_bytes=10, tail_bytes=10)
    await bench.server.store.release([claimed.lease])
    [taken] = await bench.server.claim()
    assert bench.appender.open(taken).truncated


# Another attempt


async def test_a_refusal_to_queue_again_takes_nothing_of_the_output(
    bench: Bench, nursery: trio.Nursery
) -> None:
    """It was in the same append as the last output; the command is finished then."""
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    command = writer.lease.command
    bench.log.gate = trio.Event()
    await writer.write(Stream.STDOUT, chunk())
    await wait_all_tasks_blocked()
    await writer.write(Stream.STDOUT, chunk())
    await bench.server.store.request_cancel(command, ACTOR)
    again = NewChunk(source=Source.LIFE, events=1, raw_bytes=0, payload=b"s{}")
    done: list[bool] = []

    async def end() -> None:
        done.append(await writer.queue_again(again, reason=LostReason.SUPERVISOR_GONE))
        await _finish(writer)

    nursery.start_soon(end)
    await wait_all_tasks_blocked()
    bench.log.gate.set()
    await bench.server.ended(command)
    assert done == [False]
    assert [len(batch[0].chunks) for batch in bench.log.batches[:2]] == [1, 2]
    assert bench.published == bench.server.state.chunks[command][2:]
    assert [one.raw_bytes for one in bench.published] == [5, 5, 0]
    assert writer.pending_bytes == 0


async def test_queueing_again_is_committed_and_published(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    await writer.write(Stream.STDOUT, chunk())
    again = NewChunk(source=Source.LIFE, events=1, raw_bytes=0, payload=b"s{}")
    assert await writer.queue_again(again, reason=LostReason.SUPERVISOR_GONE)
    row = bench.server.state.rows[writer.lease.command]
    assert row.command.status is Status.QUEUED
    assert bench.published[-1].payload == b"s{}"
    assert bench.appender.statistics().pending_bytes == 0


async def test_a_writer_whose_lease_is_lost_queues_nothing_again(
    bench: Bench, nursery: trio.Nursery
) -> None:
    nursery.start_soon(bench.appender.run)
    writer = await bench.writer()
    await bench.server.store.release([writer.lease])
    await bench.server.claim()
    again = NewChunk(source=Source.LIFE, events=1, raw_bytes=0, payload=b"s{}")
    with pytest.raises(LeaseLostError):
        await writer.queue_again(again, reason=LostReason.SUPERVISOR_GONE)
