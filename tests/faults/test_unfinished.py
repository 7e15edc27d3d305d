"""`unfinished` is said only of what provably did not finish and cannot be running."""

import os
from pathlib import Path

import pytest

from rdev.adapters.execution.local import LocalExecutor
from rdev.domain.execution import Lost, LostReason, Offsets
from rdev.domain.ids import AttemptId, attempt_id
from tests.adapters.execution.observing import (
    NOWHERE,
    PROJECT,
    QUICK,
    folder,
    local,
    new_command,
    observe,
    sh,
)

GONE = Lost(reason=LostReason.SUPERVISOR_GONE, unfinished=True)


@pytest.fixture
def projects(tmp_path: Path) -> Path:
    return tmp_path / "projects"


@pytest.fixture
async def executor(projects: Path) -> LocalExecutor:
    executor = local(projects, patience=QUICK)
    await executor.prepare(PROJECT)
    return executor


def _left_by_another_instance(projects: Path, *, where: str = NOWHERE) -> AttemptId:
    """A folder as a machine that lost its power leaves it. The pids in it are ours: they live."""
    attempt = attempt_id(new_command(), 1)
    place = folder(projects, attempt)
    (place / "go").mkdir(parents=True)
    start = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19]
    me = f"{os.getpid()} {start}"
    (place / "pid").write_text(f"{me} {me} {where}\n")
    (place / "out").write_text("0123456789")
    return attempt


async def test_what_ran_in_another_instance_without_an_end_is_unfinished(
    executor: LocalExecutor, projects: Path
) -> None:
    attempt = _left_by_another_instance(projects)
    seen = await observe(executor, attempt, sh("echo again"), instance=NOWHERE)
    assert (seen.out, seen.end) == (b"0123456789", GONE)


@pytest.mark.parametrize("sign", ["status", "ending", "why"])
async def test_a_sign_of_its_end_leaves_it_unproven(
    executor: LocalExecutor, projects: Path, sign: str
) -> None:
    """A status that is not whole, an end without its sizes, a kill or a timeout that had begun."""
    attempt = _left_by_another_instance(projects)
    (folder(projects, attempt) / sign).write_text("")
    seen = await observe(executor, attempt, None, instance=NOWHERE)
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)


async def test_in_the_same_instance_a_dead_supervisor_proves_nothing(
    executor: LocalExecutor, projects: Path
) -> None:
    """Its command may have finished, or have left something that runs."""
    here = await executor.instance(PROJECT)
    attempt = _left_by_another_instance(projects, where=here)
    place = folder(projects, attempt)
    (place / "pid").write_text(f"{os.getpid()} 1 {os.getpid()} 1 {here}\n")
    seen = await observe(executor, attempt, None, instance=here)
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)
    # Whoever believes in another instance than the one that is written there proves nothing either.
    seen = await observe(executor, attempt, None, instance=NOWHERE)
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)


async def test_a_journal_that_lost_its_end_with_the_power_is_unfinished(
    executor: LocalExecutor, projects: Path
) -> None:
    attempt = _left_by_another_instance(projects)
    at = Offsets(stdout=11)
    seen = await observe(executor, attempt, None, instance=NOWHERE, offsets=at)
    assert seen.end == Lost(reason=LostReason.JOURNAL_TRUNCATED, unfinished=True)
    (folder(projects, attempt) / "status").write_text("code 0\n")
    seen = await observe(executor, attempt, None, instance=NOWHERE, offsets=at)
    assert seen.end == Lost(reason=LostReason.JOURNAL_TRUNCATED)


async def test_a_starter_that_went_with_its_instance_never_becomes_the_command(
    executor: LocalExecutor, projects: Path
) -> None:
    """It had made go/ and not yet written who it is."""
    attempt = _left_by_another_instance(projects)
    place = folder(projects, attempt)
    (place / "pid").rename(place / "pid.77")
    (place / "pid.77").write_text(f"77 1 76 1 {NOWHERE}\n")
    (place / "out").write_text("")
    seen = await observe(executor, attempt, sh("echo again"), instance=NOWHERE)
    assert (seen.out, seen.end) == (b"", GONE)


async def test_a_folder_that_went_with_its_instance_stays_gone(
    executor: LocalExecutor, projects: Path
) -> None:
    """Whoever asks again, and in whatever instance: it is never called not started."""
    attempt = attempt_id(new_command(), 1)
    gone = Lost(reason=LostReason.POD_GONE, unfinished=True)
    for _ in range(2):
        seen = await observe(executor, attempt, sh("echo again"), instance=NOWHERE)
        assert (seen.out, seen.end) == (b"", gone)
    assert (folder(projects, attempt) / "go").is_dir()
    assert folder(projects, attempt).stat().st_mode & 0o777 == 0o700


async def test_a_kill_in_a_place_without_the_folder_does_not_prove_that_it_was_never_started(
    executor: LocalExecutor, projects: Path
) -> None:
    attempt = attempt_id(new_command(), 1)
    assert (await executor.kill(PROJECT, attempt, grace_s=1)).confirmed
    seen = await observe(executor, attempt, None, instance=NOWHERE)
    assert isinstance(seen.end, Lost)
    assert seen.end.reason is LostReason.POD_GONE
    here = await observe(executor, attempt, None)
    assert here.end == Lost(reason=LostReason.NOT_STARTED)
    assert [entry.name for entry in (projects / ".commands").iterdir()] == [attempt]
