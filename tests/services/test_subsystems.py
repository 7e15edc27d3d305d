"""How a set of subsystems starts, fails and ends together."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rdev.services.subsystems import SubsystemEndedError, run_subsystems


class Part:
    """A subsystem that notes what happens to it."""

    def __init__(self, name: str, story: list[str], *, end_s: float = 0.0) -> None:
        self.name = name
        self.end_s = end_s
        self._story = story
        self._stop = trio.Event()
        self.crash = trio.Event()
        self.leave = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._story.append(f"{self.name} starts")
        task_status.started()
        word = "is cut off"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._crash)
                nursery.start_soon(self._leave, nursery.cancel_scope)
                await self._stop.wait()
                await trio.sleep(self.end_s)
                nursery.cancel_scope.cancel()
            word = "ends"
        finally:
            self._story.append(f"{self.name} {word}")

    def stop(self) -> None:
        self._story.append(f"{self.name} stops")
        self._stop.set()

    async def _crash(self) -> None:
        await self.crash.wait()
        raise ValueError(self.name)

    async def _leave(self, scope: trio.CancelScope) -> None:
        await self.leave.wait()
        scope.cancel()


class Broken:
    """A subsystem that cannot start."""

    name = "broken"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("the port is taken")

    def stop(self) -> None:
        """Never reached."""


@pytest.fixture
def story() -> list[str]:
    return []


async def _drained(story: list[str]) -> None:
    story.append("drain")
    await trio.sleep(2)


async def _run(
    parts: Sequence[Part | Broken], stop: trio.Event, story: list[str], grace_s: float = 10
) -> None:
    await run_subsystems(parts, stop=stop, drain=lambda: _drained(story), grace_s=grace_s)


async def test_they_start_in_order_and_stop_together(story: list[str]) -> None:
    parts = [Part("a", story, end_s=3), Part("b", story, end_s=1)]
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, parts, stop, story)
        await wait_all_tasks_blocked()
        assert story == ["a starts", "b starts"]
        began = trio.current_time()
        stop.set()
    assert story[2:] == ["drain", "a stops", "b stops", "b ends", "a ends"]
    assert trio.current_time() - began == pytest.approx(5)


async def test_started_means_that_all_have_started(story: list[str], nursery: trio.Nursery) -> None:
    stop = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await run_subsystems(
            [Part("a", story), Part("b", story)],
            stop=stop,
            drain=lambda: _drained(story),
            grace_s=1,
            task_status=task_status,
        )

    await nursery.start(run)
    assert story == ["a starts", "b starts"]
    stop.set()


async def test_one_that_crashes_takes_the_others_down(story: list[str]) -> None:
    parts = [Part("a", story), Part("b", story)]
    parts[0].crash.set()
    with pytest.raises(ExceptionGroup) as caught:
        await _run(parts, trio.Event(), story)
    assert caught.group_contains(ValueError, match="a")
    assert "b is cut off" in story


async def test_one_that_ends_by_itself_takes_the_others_down(story: list[str]) -> None:
    parts = [Part("a", story), Part("b", story)]
    parts[1].leave.set()
    with pytest.raises(ExceptionGroup) as caught:
        await _run(parts, trio.Event(), story)
    assert caught.group_contains(SubsystemEndedError, match="b ended by itself")
    assert "a is cut off" in story


async def test_one_that_cannot_start_ends_those_that_have(story: list[str]) -> None:
    parts = [Part("a", story), Broken(), Part("c", story)]
    with pytest.raises(ExceptionGroup) as caught:
        await _run(parts, trio.Event(), story)
    assert caught.group_contains(OSError)
    assert story == ["a starts", "a is cut off"]


async def test_one_may_end_between_stop_and_its_own_stop(story: list[str]) -> None:
    part = Part("a", story)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, [part], stop, story)
        await wait_all_tasks_blocked()
        stop.set()
        part.leave.set()
    assert story == ["a starts", "drain", "a ends", "a stops"]


async def test_what_has_not_ended_after_the_grace_is_cancelled(story: list[str]) -> None:
    parts = [Part("slow", story, end_s=1_000), Part("b", story)]
    stop = trio.Event()
    stop.set()
    began = trio.current_time()
    await _run(parts, stop, story, grace_s=7)
    assert trio.current_time() - began == pytest.approx(9)
    assert story[-2:] == ["b ends", "slow is cut off"]
