"""Projects behind breakers: what counts is the way to the place, not what runs there."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from rdev.domain.breaker import BreakerReason, BreakerSettings, BreakerState
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Exit, KillReport, Lost, LostReason, Offsets, Spec
from rdev.domain.ids import AttemptId, CommandId, ProjectId
from rdev.ports.execution import Executor
from rdev.services import guarded_executor
from rdev.services.breaker import BreakerOpenError
from rdev.services.guarded_executor import GuardedExecutor
from tests.fakes.executor import FakeExecutor, FakeRun
from tests.services.scripted import Place
from tests.services.test_breaker import Noted

GOOD, BAD = ProjectId("good"), ProjectId("bad")
SETTINGS = BreakerSettings(calls_min=4)
START = Offsets(stdout=0, stderr=0)


async def fails(run: FakeRun) -> int:
    run.write(b"no\n")
    return 1


async def hangs(run: FakeRun) -> int:
    await trio.sleep_forever()
    return 0


@pytest.fixture
def place(nursery: trio.Nursery) -> FakeExecutor:
    return FakeExecutor(nursery, {"false": fails, "hang": hangs})


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
async def guarded(place: FakeExecutor, noted: Noted) -> GuardedExecutor:
    guarded = GuardedExecutor(place, telemetry=noted, settings=SETTINGS)
    for project in (GOOD, BAD):
        await place.prepare(project)
    return guarded


def spec(program: str) -> Spec:
    return Spec(argv=(program,), env={}, timeout_s=3_600)


async def run(
    executor: Executor, project: ProjectId, number: int, program: str = "false"
) -> Exit | Lost:
    """Attach to a command and read it to its end."""
    attempt = AttemptId(f"cmd_{number}")
    instance = await executor.instance(project)
    async with executor.attach(
        project, attempt, spec=spec(program), instance=instance, offsets=START
    ) as attachment:
        while True:
            item = await attachment.receive()
            if isinstance(item, Exit | Lost):
                return item


async def opened(guarded: GuardedExecutor, place: FakeExecutor) -> None:
    """Four failures to reach BAD."""
    place.unreachable = {BAD}
    for _ in range(4):
        with pytest.raises(RdevError, match="cannot be reached"):
            await guarded.tidy(BAD, [])


async def test_a_project_that_cannot_be_reached_is_left_alone_and_no_other(
    guarded: GuardedExecutor, place: FakeExecutor, noted: Noted
) -> None:
    await opened(guarded, place)

    assert guarded.is_open(BAD)
    assert not guarded.is_open(GOOD)
    assert not guarded.is_open(ProjectId("never-seen"))
    assert guarded.open_projects() == [BAD]
    assert noted.changes == [("exec", BreakerState.OPEN, BreakerReason.FAILURES)]
    assert (guarded.statistics().refused, guarded.statistics().known) == (1, 1)
    assert await guarded.tidy(GOOD, []) == []


async def test_breakers_are_tallied_by_state_and_reason_and_none_is_named(
    guarded: GuardedExecutor, place: FakeExecutor, autojump_clock: MockClock
) -> None:
    await guarded.tidy(GOOD, [])
    await opened(guarded, place)
    assert tallied(guarded) == {"closed nothing": 1, "open failures": 1}

    await trio.sleep(SETTINGS.open_first_s)
    assert tallied(guarded) == {"closed nothing": 1, "half_open due": 1}, "the next call tries it"
    with pytest.raises(RdevError):
        await guarded.tidy(BAD, [])
    assert tallied(guarded) == {"closed nothing": 1, "open trial_failed": 1}

    place.unreachable = set()
    await trio.sleep(2 * SETTINGS.open_first_s)
    for _ in range(SETTINGS.permits):
        await guarded.tidy(BAD, [])
    assert tallied(guarded) == {"closed nothing": 1, "closed recovered": 1}

    await opened(guarded, place)
    assert tallied(guarded) == {"closed nothing": 1, "open failures": 1}


async def test_a_project_that_is_forgotten_is_tallied_no_more(
    guarded: GuardedExecutor,
    place: FakeExecutor,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guarded_executor, "PROJECTS_MAX", 1)
    await opened(guarded, place)
    place.unreachable = set()
    await trio.sleep(SETTINGS.open_first_s)
    for _ in range(SETTINGS.permits):
        await guarded.tidy(BAD, [])
    await guarded.tidy(GOOD, [])
    assert tallied(guarded) == {"closed nothing": 1}


def tallied(guarded: GuardedExecutor) -> dict[str, int]:
    """Without those of which there is none; together they are all that are known."""
    tally = guarded.tally()
    assert len(tally) == 7
    assert sum(tally.values()) == guarded.statistics().known
    return {f"{state} {reason}": count for (state, reason), count in tally.items() if count}


async def test_open_everything_but_a_kill_is_refused_at_once(
    guarded: GuardedExecutor, place: FakeExecutor
) -> None:
    await opened(guarded, place)

    for ask in (
        lambda: guarded.prepare(BAD),
        lambda: guarded.instance(BAD),
        lambda: guarded.tidy(BAD, []),
        lambda: guarded.remove(BAD, []),
        lambda: run(place_of(guarded), BAD, 1),
    ):
        with pytest.raises(BreakerOpenError) as caught:
            await ask()
        assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    with pytest.raises(BreakerOpenError):
        async with guarded.attach(
            BAD, AttemptId("cmd_1"), spec=None, instance="boot-1", offsets=START
        ):
            pytest.fail("it was attached")
    assert place.started == []
    assert await guarded.kill(BAD, AttemptId("cmd_1"), grace_s=1) == KillReport(confirmed=True)


def place_of(guarded: GuardedExecutor) -> Executor:
    return guarded


async def test_it_is_tried_again_and_closes_when_it_is_reached(
    guarded: GuardedExecutor, place: FakeExecutor
) -> None:
    await opened(guarded, place)
    place.unreachable = set()

    await trio.sleep(5)

    assert not guarded.is_open(BAD)
    for _ in range(3):
        await guarded.instance(BAD)
    assert guarded.open_projects() == []
    assert guarded.statistics().refused == 0


async def test_one_claim_a_second_tries_a_project_that_is_due(
    guarded: GuardedExecutor, place: FakeExecutor
) -> None:
    assert guarded.left_alone() == []
    await opened(guarded, place)
    assert guarded.left_alone() == [BAD]
    assert guarded.left_alone() == [BAD]

    await trio.sleep(5)

    assert guarded.left_alone() == []
    assert guarded.left_alone() == [BAD]
    await a_second()
    assert guarded.left_alone() == []
    # It fails again: open, and longer.
    with pytest.raises(RdevError, match="cannot be reached"):
        await guarded.tidy(BAD, [])
    await a_second()
    assert guarded.left_alone() == [BAD]

    await trio.sleep(10)
    place.unreachable = set()
    for _ in range(3):
        await guarded.instance(BAD)
    assert guarded.left_alone() == guarded.left_alone() == []


async def a_second() -> None:
    await trio.sleep(guarded_executor.TRIAL_EVERY_S)


async def test_commands_that_fail_never_count(guarded: GuardedExecutor) -> None:
    for number in range(20):
        end = await run(guarded, GOOD, number)
        assert isinstance(end, Exit)
        assert end.exit_code == 1
    for number in range(20, 40):
        end = await run(guarded, GOOD, number, program="no such program")
        assert isinstance(end, Exit)

    assert not guarded.is_open(GOOD)


async def test_commands_whose_place_was_lost_while_they_ran_count(
    guarded: GuardedExecutor, place: FakeExecutor, nursery: trio.Nursery
) -> None:
    ends: list[Exit | Lost] = []

    async def follow(number: int) -> None:
        ends.append(await run(guarded, GOOD, number, program="hang"))

    for number in range(4):
        nursery.start_soon(follow, number)
    await trio.testing.wait_all_tasks_blocked()
    assert not guarded.is_open(GOOD)
    # The four times `instance` was asked are forgotten meanwhile.
    await trio.sleep(60)
    for number in range(4):
        place.lose(AttemptId(f"cmd_{number}"), LostReason.UNREACHABLE, may_still_run=True)
    await trio.testing.wait_all_tasks_blocked()

    assert len(ends) == 4
    assert guarded.is_open(GOOD)


async def test_one_command_that_was_given_up_stands_for_each_of_its_tries(
    guarded: GuardedExecutor, place: FakeExecutor, nursery: trio.Nursery
) -> None:
    nursery.start_soon(run, guarded, GOOD, 1, "hang")
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(60)
    place.lose(AttemptId("cmd_1"), LostReason.UNREACHABLE, may_still_run=True, tries=4)
    await trio.testing.wait_all_tasks_blocked()

    assert guarded.is_open(GOOD)


async def test_a_command_that_is_lost_in_a_place_that_was_reached_does_not_count(
    guarded: GuardedExecutor, place: FakeExecutor, nursery: trio.Nursery
) -> None:
    for number in range(8):
        nursery.start_soon(run, guarded, GOOD, number, "hang")
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(60)

    place.restart()
    await trio.testing.wait_all_tasks_blocked()

    assert not guarded.is_open(GOOD)


async def test_a_command_that_says_nothing_holds_no_permit(
    guarded: GuardedExecutor, place: FakeExecutor, nursery: trio.Nursery
) -> None:
    await opened(guarded, place)
    place.unreachable = set()
    await trio.sleep(5)

    nursery.start_soon(run, guarded, BAD, 1, "hang")
    await trio.testing.wait_all_tasks_blocked()

    assert not guarded.is_open(BAD)
    for _ in range(2):
        await guarded.instance(BAD)
    await trio.sleep(3_600)
    assert not guarded.is_open(BAD)


async def test_kills_that_do_not_get_there_count(
    guarded: GuardedExecutor, place: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill(project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "project cannot be reached")

    monkeypatch.setattr(place, "kill", kill)
    for _ in range(6):
        with pytest.raises(RdevError, match="cannot be reached"):
            await guarded.kill(BAD, AttemptId("cmd_1"), grace_s=1)

    assert guarded.is_open(BAD)


async def test_an_error_of_the_callers_own_does_not_count(
    guarded: GuardedExecutor, place: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill(project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        raise RdevError(ErrorCode.NOT_FOUND, "no such project")

    monkeypatch.setattr(place, "kill", kill)
    for _ in range(6):
        with pytest.raises(RdevError):
            await guarded.kill(BAD, AttemptId("cmd_1"), grace_s=1)
        with pytest.raises(RdevError):
            await guarded.instance(ProjectId("unknown"))

    assert guarded.open_projects() == []


async def test_it_says_of_the_place_what_the_place_says(
    guarded: GuardedExecutor, place: FakeExecutor, noted: Noted, nursery: trio.Nursery
) -> None:
    assert guarded.reach == place.reach
    standing = Place(nursery, {})
    standing.standing_instance = "boot-7"
    assert GuardedExecutor(standing, telemetry=noted).standing_instance == "boot-7"
    await guarded.prepare(GOOD)
    await guarded.remove(GOOD, [CommandId("cmd_1")])


async def test_so_many_breakers_are_kept_and_the_open_ones_longest(
    guarded: GuardedExecutor, place: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_executor, "PROJECTS_MAX", 2)
    await opened(guarded, place)

    async def touch(names: Sequence[str]) -> None:
        for name in names:
            await guarded.tidy(ProjectId(name), [])
            await trio.sleep(60)

    place.unreachable = set()
    await touch(["a", "b", "c"])

    assert guarded.statistics().known == 2
    place.unreachable = {BAD}
    with pytest.raises(RdevError):
        await guarded.tidy(BAD, [])
    # It was open all the time: its next failure opens it for longer.
    assert guarded.is_open(BAD)
