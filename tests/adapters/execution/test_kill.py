"""How a command ends when it is asked to: timeout, limit, kill, and what it left behind."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import trio

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.executor import ScriptExecutor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Lost, LostReason, Offsets, Why
from rdev.domain.ids import CommandId, attempt_id
from tests.adapters.execution.observing import (
    NOWHERE,
    PROJECT,
    folder,
    local,
    new_command,
    observe,
    path_without,
    pid_line,
    processes_in,
    read_to_end,
    read_until,
    sh,
    shell_path,
    until,
)


@pytest.mark.slow
async def test_the_timeout_is_enforced_with_nobody_attached(
    executor: ScriptExecutor, projects: Path
) -> None:
    """TERM is ignored; the watchdog escalates on its own."""
    command, instance = new_command(), await executor.instance(PROJECT)
    what = sh("trap '' TERM; echo ready; while :; do sleep 0.1; done", timeout_s=1, grace_s=1)
    async with executor.attach(
        PROJECT, command, spec=what, instance=instance, offsets=Offsets()
    ) as attachment:
        await read_until(attachment, b"ready\n")
    await until((folder(projects, command) / "status").exists, "a status without an attach")
    seen = await observe(executor, command, None)
    assert (seen.exit.why, seen.exit.signal) == (Why.TIMEOUT, 9)
    assert seen.exit.kill is not None
    assert seen.exit.kill.confirmed


@pytest.mark.slow
async def test_the_timeout_is_enforced_without_a_supervisor(
    executor: ScriptExecutor, projects: Path
) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; exec sleep 1000", timeout_s=3),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready\n")
        os.kill(int(pid_line(projects, command)[2]), signal.SIGKILL)
        rest = await read_to_end(attachment, Offsets(stdout=6))
    assert rest.end == Lost(reason=LostReason.SUPERVISOR_GONE)
    assert (folder(projects, command) / "why").read_text().startswith("timeout ")


ESCAPERS = {
    "background": "sleep 1000 &",
    "nohup": "/usr/bin/nohup sleep 1000 >/dev/null 2>&1 &",
    "setsid": "setsid sleep 1000 &",
    "daemon": "(setsid sh -c 'sleep 1000 & exit' &)",
    "clean setsid": "setsid env -i PATH=$PATH sleep 1000 &",
    "clean daemon": "(setsid env -i PATH=$PATH sh -c 'sleep 1000 & exit' &)",
}


@pytest.mark.parametrize("how", ESCAPERS)
async def test_a_kill_reaches_what_escaped(
    executor: ScriptExecutor, projects: Path, how: str
) -> None:
    await _kill_with_escaper(executor, projects, ESCAPERS[how])


@pytest.mark.parametrize("how", [how for how in ESCAPERS if how != "clean daemon"])
async def test_without_a_subreaper_only_a_daemon_with_a_clean_environment_escapes(
    projects: Path, tmp_path: Path, how: str
) -> None:
    """No perl on this PATH: group, tree and marker."""
    with shell_path("busybox", tmp_path) as path:
        executor = local(projects, path)
        await executor.prepare(PROJECT)
        await _kill_with_escaper(executor, projects, ESCAPERS[how])


async def test_a_kill_of_a_later_attempt_knows_its_marker(projects: Path, tmp_path: Path) -> None:
    """The marker is the command's; the folder has the attempt's name."""
    with shell_path("busybox", tmp_path) as path:
        executor = local(projects, path)
        await executor.prepare(PROJECT)
        await _kill_with_escaper(executor, projects, ESCAPERS["daemon"], number=2)


async def _kill_with_escaper(
    executor: ScriptExecutor, projects: Path, escaper: str, *, number: int = 1
) -> None:
    attempt, instance = attempt_id(new_command(), number), await executor.instance(PROJECT)

    def sleepers() -> int:
        return sum(line.startswith("sleep 1000") for line in processes_in(projects).values())

    async with executor.attach(
        PROJECT,
        attempt,
        spec=sh(f"{escaper}\necho ready; exec sleep 1000"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready\n")
        await until(lambda: sleepers() >= 2, "the escaper runs")
        report = await executor.kill(PROJECT, attempt, grace_s=3)
        rest = await read_to_end(attachment, Offsets(stdout=6))
    assert report.confirmed
    assert rest.exit.why is Why.CANCELLED
    assert not [line for line in processes_in(projects).values() if "sleep 1000" in line]


@pytest.mark.slow
async def test_a_kill_survives_its_caller(executor: ScriptExecutor, projects: Path) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    what = sh("trap '' TERM; echo ready; while :; do sleep 0.1; done")
    async with executor.attach(
        PROJECT, command, spec=what, instance=instance, offsets=Offsets()
    ) as attachment:
        await read_until(attachment, b"ready\n")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_kill, executor, command)
            await until((folder(projects, command) / "why").exists, "the kill began")
            nursery.cancel_scope.cancel()
        rest = await read_to_end(attachment, Offsets(stdout=6))
    assert (rest.exit.why, rest.exit.signal) == (Why.CANCELLED, 9)


async def _kill(executor: ScriptExecutor, command: CommandId) -> None:
    await executor.kill(PROJECT, command, grace_s=1)


async def test_a_kill_whose_worker_died_is_taken_over(
    executor: ScriptExecutor, projects: Path
) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; exec sleep 1000"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready\n")
        (folder(projects, command) / "why").write_text("cancelled 5 999999 1\n")
        assert (await executor.kill(PROJECT, command, grace_s=3)).confirmed
        rest = await read_to_end(attachment, Offsets(stdout=6))
    assert rest.exit.why is Why.CANCELLED


async def test_a_kill_spares_those_who_took_the_pids(
    executor: ScriptExecutor, projects: Path
) -> None:
    """The command ended long ago; its pids now lead another session and have other children."""
    command = new_command()
    await observe(executor, command, sh("echo done"))
    async with trio.open_nursery() as nursery:
        stranger = await nursery.start(
            lambda task_status: trio.run_process(
                ["sh", "-c", "setsid sleep 1000 & sleep 1000"],
                start_new_session=True,
                check=False,
                task_status=task_status,
            )
        )
        place = folder(projects, command)
        taken = f"{stranger.pid} 1"
        for instance in (await executor.instance(PROJECT), NOWHERE):
            (place / "pid").write_text(f"{taken} {taken} {instance}\n")
            assert (await executor.kill(PROJECT, command, grace_s=1)).confirmed
        children = Path(f"/proc/{stranger.pid}/task/{stranger.pid}/children").read_text().split()
        assert stranger.poll() is None
        assert len(children) == 2
        for pid in (*map(int, children), stranger.pid):
            os.kill(pid, signal.SIGKILL)


async def test_a_place_without_a_tool_says_which(projects: Path, tmp_path: Path) -> None:
    with pytest.raises(RdevError, match="missing setsid") as caught:
        await local(projects, path_without("setsid", tmp_path)).prepare(PROJECT)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE


@pytest.mark.slow
async def test_a_journal_over_its_limit_ends_the_command(projects: Path) -> None:
    executor = local(projects, journal_max_bytes=2_000_000)
    await executor.prepare(PROJECT)
    seen = await observe(
        executor, new_command(), sh("while :; do head -c 100000 /dev/zero >&2; sleep 0.01; done")
    )
    assert seen.exit.why is Why.OUTPUT_LIMIT
    assert seen.exit.stderr_bytes > 2_000_000
    assert seen.exit.kill is not None
    assert seen.exit.kill.confirmed


async def test_nothing_stays_when_a_folder_is_removed_under_its_command(
    executor: ScriptExecutor, projects: Path
) -> None:
    """The fixture sees whether the supervisor and its watchdog go."""
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; exec sleep 1000"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready\n")
        pid = int(pid_line(projects, command)[0])
        await executor.remove(PROJECT, [command])
    assert not folder(projects, command).exists()
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
async def test_an_end_before_the_start_is_told_without_a_heartbeat(
    executor: ScriptExecutor, projects: Path
) -> None:
    """The starter that lost against the kill says so: nobody waits for the next heartbeat."""
    patient = local(projects, patience=Patience(heartbeat_s=1_000, silence_s=2_000))
    instance = await executor.instance(PROJECT)
    for delay_ms in range(1, 41, 2):
        command = new_command()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                what = sh("exec sleep 1000")
                nursery.start_soon(partial(observe, patient, command, what, instance=instance))
                await trio.sleep(delay_ms / 1000)
                assert (await patient.kill(PROJECT, command, grace_s=3)).confirmed


async def test_a_kill_ends_a_command_that_stopped_its_supervisor(executor: ScriptExecutor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; kill -STOP $PPID; exit 4"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready\n")
        assert (await executor.kill(PROJECT, command, grace_s=1)).confirmed
        with trio.fail_after(30):
            rest = await read_to_end(attachment, Offsets(stdout=6))
    assert rest.exit.why is Why.CANCELLED
