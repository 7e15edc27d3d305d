"""The floor under the streams: what other servers write is seen within the poll."""

import pytest
import trio
import trio.testing

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId
from rdev.services.stream_poll import BATCH_MAX, POLL_S, StreamPoll

A, B = CommandId("cmd_a"), CommandId("cmd_b")


class Heads:
    """How far the streams of other servers stand; only `heads` is asked."""

    def __init__(self) -> None:
        self.stand_at: dict[CommandId, int] = {}
        self.batches: list[int] = []
        self.error: RdevError | None = None

    async def heads(
        self, commands: tuple[CommandId, ...], *, written_by_others_than: str
    ) -> dict[CommandId, int]:
        await trio.lowlevel.checkpoint()
        assert written_by_others_than == "me"
        self.batches.append(len(commands))
        if self.error is not None:
            raise self.error
        return {one: self.stand_at[one] for one in commands if one in self.stand_at}


class Bench:
    def __init__(self) -> None:
        self.log = Heads()
        self.watched: list[CommandId] = [A, B]
        self.woken: list[CommandId] = []
        self.poll = StreamPoll(
            log=self.log,
            holder="me",
            watched=lambda: self.watched,
            wake_each=self.woken.extend,
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_a_stream_that_moved_is_looked_at_once(bench: Bench) -> None:
    bench.log.stand_at = {A: 3, B: 5}
    await bench.poll.run_once()
    assert bench.woken == [A, B]  # new ones: who knows when their readers looked
    bench.woken.clear()
    await bench.poll.run_once()
    assert bench.woken == []
    bench.log.stand_at[B] = 6
    await bench.poll.run_once()
    assert bench.woken == [B]


async def test_what_is_written_here_is_left_alone(bench: Bench) -> None:
    bench.log.stand_at = {B: 5}
    await bench.poll.run_once()
    assert bench.woken == [B]


async def test_a_stream_that_is_left_and_joined_again_is_new(bench: Bench) -> None:
    bench.log.stand_at = {A: 3}
    await bench.poll.run_once()
    bench.watched = []
    await bench.poll.run_once()
    bench.watched = [A]
    await bench.poll.run_once()
    assert bench.woken == [A, A]


async def test_nothing_watched_costs_no_statement(bench: Bench) -> None:
    bench.watched = []
    await bench.poll.run_once()
    assert bench.log.batches == []


async def test_very_many_streams_are_asked_for_in_parts(bench: Bench) -> None:
    bench.watched = [CommandId(f"cmd_{n}") for n in range(BATCH_MAX + 1)]
    await bench.poll.run_once()
    assert bench.log.batches == [BATCH_MAX, 1]


async def test_it_polls_each_second_also_after_an_outage(
    bench: Bench, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.poll.run)
        bench.log.error = RdevError(ErrorCode.SERVICE_UNAVAILABLE, "gone")
        await trio.sleep(2.5 * POLL_S)
        assert bench.woken == []
        bench.log.error = None
        bench.log.stand_at = {A: 1}
        await trio.sleep(POLL_S)
        assert bench.woken == [A]
        bench.poll.stop()


async def test_another_fault_goes_through(
    bench: Bench, autojump_clock: trio.testing.MockClock
) -> None:
    bench.log.error = RdevError(ErrorCode.INTERNAL_ERROR, "broken")
    with pytest.raises(RdevError, match="broken"):
        await bench.poll.run()
