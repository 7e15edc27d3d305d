"""The gate of the queue: counts that are shared, limits that one process never passes."""

from collections import Counter

import pytest
import trio

from rdev.domain.commands import Priority
from rdev.domain.depths import Depth, DepthLimits, Depths, ProjectDepth
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.ports.telemetry import Silence
from rdev.services.depths import (
    MAX_AGE_OF_SLOW_S,
    MAX_AGE_S,
    REFUSAL_AGE_S,
    QueueFullError,
    QueueGate,
)

A, B = ProjectId("a"), ProjectId("b")


class Queue:
    """A queue that is counted as slowly as a test wants, and may fail at it."""

    def __init__(self) -> None:
        self.queued: Counter[ProjectId] = Counter()
        self.counts = 0
        self.takes_s = 0.0
        self.error: RdevError | None = None

    async def count(self) -> Depths:
        self.counts += 1
        # The statement's snapshot is of its begin; the reply comes later.
        found = {
            project: ProjectDepth(waiting={Priority.NORMAL: Depth(queued=queued, oldest_wait_s=1)})
            for project, queued in self.queued.items()
        }
        await trio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        return Depths(projects=found)


class Noted(Silence):
    def __init__(self) -> None:
        self.refused: list[str] = []

    def limit_checked(self, limit: str, *, refused: bool) -> None:
        assert refused
        self.refused.append(limit)


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def gate(queue: Queue, noted: Noted) -> QueueGate:
    limits = DepthLimits(project_max=10, server_max=15)
    return QueueGate(queue=queue, limits=limits, telemetry=noted)


async def store(gate: QueueGate, queue: Queue, project: ProjectId, takes_s: float = 0.0) -> bool:
    """Queue a command as the service does; whether it was let in."""
    try:
        async with gate.place(project):
            await trio.sleep(takes_s)
            queue.queued[project] += 1
    except QueueFullError:
        return False
    return True


async def test_a_full_project_is_too_many_requests(
    gate: QueueGate, queue: Queue, noted: Noted
) -> None:
    queue.queued[A] = 10
    with pytest.raises(QueueFullError) as caught:
        async with gate.place(A):
            raise AssertionError
    assert caught.value.code is ErrorCode.TOO_MANY_REQUESTS
    assert caught.value.retry_after_s is not None
    assert noted.refused == ["queue_project"]
    assert await store(gate, queue, B)


async def test_a_full_server_is_unavailable(gate: QueueGate, queue: Queue, noted: Noted) -> None:
    queue.queued.update({A: 8, B: 7})
    with pytest.raises(QueueFullError) as caught:
        async with gate.place(B):
            raise AssertionError
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert caught.value.retry_after_s is not None
    assert noted.refused == ["queue"]


async def test_what_was_accepted_since_the_count_is_added(gate: QueueGate, queue: Queue) -> None:
    let_in = [await store(gate, queue, A) for _ in range(12)]
    assert let_in == [True] * 10 + [False] * 2
    assert queue.counts == 1


async def test_a_refusal_looks_again_but_not_at_once(gate: QueueGate, queue: Queue) -> None:
    queue.queued[A] = 10
    assert not await store(gate, queue, A)
    queue.queued[A] = 9
    await trio.sleep(REFUSAL_AGE_S / 2)
    assert not await store(gate, queue, A)
    assert queue.counts == 1
    await trio.sleep(REFUSAL_AGE_S / 2)
    assert await store(gate, queue, A)
    assert queue.counts == 2


async def test_what_was_accepted_and_runs_already_refuses_nothing(
    gate: QueueGate, queue: Queue
) -> None:
    for _ in range(100):
        assert await store(gate, queue, A)
        queue.queued[A] -= 1
        await trio.sleep(0.015)


async def test_a_place_that_is_given_back_during_a_count_is_free_after_it(
    gate: QueueGate, queue: Queue
) -> None:
    async def give_back() -> None:
        async with gate.place(A) as place:
            await trio.sleep(MAX_AGE_S + 0.1)
            place.give_back()

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(give_back)
        await trio.sleep(MAX_AGE_S)
        queue.takes_s = 0.2
        await gate.depths()
    queue.takes_s = 0.0
    assert [await store(gate, queue, A) for _ in range(10)] == [True] * 10
    assert queue.counts == 2


async def test_those_who_ask_at_once_share_one_count(gate: QueueGate, queue: Queue) -> None:
    queue.takes_s = 0.05
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(gate.depths)
    assert queue.counts == 1


async def test_a_cancelled_count_is_taken_by_the_next(gate: QueueGate, queue: Queue) -> None:
    queue.takes_s = 0.05
    with trio.move_on_after(0.01):
        await gate.depths()
    assert (await gate.depths()).depth.queued == 0
    assert queue.counts == 2


@pytest.mark.parametrize("count_takes_s", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("store_takes_s", [0.0, 0.02, 1.5])
async def test_one_process_never_passes_a_limit(
    gate: QueueGate, queue: Queue, count_takes_s: float, store_takes_s: float
) -> None:
    """Whatever is under way while the count is taken."""
    queue.takes_s = count_takes_s
    most = 0

    async def client(project: ProjectId, number: int) -> None:
        nonlocal most
        await trio.sleep(number * 0.011)
        for _ in range(30):
            await store(gate, queue, project, store_takes_s)
            most = max(most, queue.queued[project])
            assert queue.queued[A] <= 10
            assert queue.queued.total() <= 15
            await trio.sleep(0.1)

    async def take() -> None:
        """Claims make room."""
        while True:
            await trio.sleep(1.3)
            for project in (A, B):
                queue.queued[project] = max(0, queue.queued[project] - 1)

    async with trio.open_nursery() as outer:
        outer.start_soon(take)
        async with trio.open_nursery() as clients:
            for number in range(20):
                clients.start_soon(client, (A, B)[number % 3 == 0], number)
        outer.cancel_scope.cancel()
    assert most >= 8


async def test_a_place_is_given_back_where_nothing_was_stored(
    gate: QueueGate, queue: Queue
) -> None:
    for _ in range(20):
        with pytest.raises(RdevError, match="nothing"):
            async with gate.place(A):
                raise RdevError(ErrorCode.NOT_FOUND, "nothing")
        async with gate.place(A) as place:
            place.give_back()
            place.give_back()
    assert await store(gate, queue, A)


async def test_a_place_is_kept_where_something_may_have_been_stored(
    gate: QueueGate, queue: Queue
) -> None:
    for _ in range(10):
        with pytest.raises(RdevError):
            async with gate.place(A):
                raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "unknown")
    assert not await store(gate, queue, A)
    await trio.sleep(MAX_AGE_S)
    assert await store(gate, queue, A)


async def test_where_the_count_fails_the_last_one_bounds(gate: QueueGate, queue: Queue) -> None:
    queue.queued[A] = 5
    await gate.depths()
    queue.error = RdevError(ErrorCode.SERVICE_UNAVAILABLE, "gone", retry_after_s=1.0)
    await trio.sleep(MAX_AGE_S)
    let_in = [await store(gate, queue, A) for _ in range(7)]
    assert let_in == [True] * 5 + [False] * 2
    assert queue.counts == 2
    with pytest.raises(RdevError) as caught:
        await gate.depths()
    assert (caught.value.message, caught.value.retry_after_s) == ("gone", 1.0)
    assert queue.counts == 2
    queue.error = None
    await trio.sleep(MAX_AGE_S)
    assert (await gate.depths()).depth.queued == 10


async def test_at_most_a_tenth_of_the_time_is_spent_on_counting(
    gate: QueueGate, queue: Queue
) -> None:
    queue.takes_s = 0.5
    until_s = trio.current_time() + 55.0
    while trio.current_time() < until_s:
        await gate.depths()
        await trio.sleep(0.1)
    assert queue.counts * queue.takes_s <= 55 / 10
    queue.takes_s = 30.0
    await trio.sleep(10)
    await gate.depths()
    counts = queue.counts
    await trio.sleep(MAX_AGE_OF_SLOW_S)
    queue.takes_s = 0.0
    await gate.depths()
    assert queue.counts == counts + 1
