"""Every sentence of rdev/ports/execution.py: real shells, local and behind execs, and the fake."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from rdev.adapters.execution.kubernetes import KubernetesExecutor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Exit, Lost, LostReason, Offsets, Piece, Stream, Why
from rdev.domain.ids import ProjectId, attempt_id
from rdev.ports.execution import Executor
from tests.adapters.execution.observing import (
    PROJECT,
    SYSTEM_PATH,
    local,
    new_command,
    observe,
    processes_in,
    read_to_end,
    read_until,
    shell_path,
    spec,
    until,
)
from tests.adapters.execution.pods import cluster
from tests.fakes.executor import FakeExecutor, FakeRun
from tests.fakes.pod_exec import V4, V5

# The same programs twice: as scripts on the PATH of real projects, as coroutines for the fake.
SCRIPTS = {
    "say": 'printf "%s" "$1"; printf "%s" "$2" >&2; exit "${3:-0}"',
    "die": 'kill -"$1" $$',
    "copy": "cat",
    "show": "env",
    "hang": "printf ready; exec sleep 1000",
    "zeros": "head -c 300000 /dev/zero; printf end",
    "steps": "for I in 1 2 3 4 5; do printf $I; sleep 0.02; done",
}


async def _say(run: FakeRun) -> int:
    _, out, err, *code = run.spec.argv
    run.write(out.encode())
    run.write(err.encode(), Stream.STDERR)
    return int(code[0]) if code else 0


async def _die(run: FakeRun) -> int:
    return -int(run.spec.argv[1])


async def _copy(run: FakeRun) -> int:
    run.write(run.spec.stdin)
    return 0


async def _show(run: FakeRun) -> int:
    run.write("".join(f"{name}={value}\n" for name, value in run.env.items()).encode())
    return 0


async def _hang(run: FakeRun) -> int:
    run.write(b"ready")
    await trio.sleep_forever()
    raise AssertionError


async def _zeros(run: FakeRun) -> int:
    run.write(bytes(300_000) + b"end")
    return 0


async def _steps(run: FakeRun) -> int:
    for step in b"12345":
        run.write(bytes([step]))
        await trio.sleep(0.02)
    return 0


PROGRAMS = {
    "say": _say,
    "die": _die,
    "copy": _copy,
    "show": _show,
    "hang": _hang,
    "zeros": _zeros,
    "steps": _steps,
}


@pytest.fixture(params=["dash", "bash", "busybox", "exec v5", "exec v4", "fake"])
async def executor(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Executor]:
    if request.param == "fake":
        async with trio.open_nursery() as nursery:
            fake = FakeExecutor(nursery, PROGRAMS)
            await fake.prepare(PROJECT)
            yield fake
            nursery.cancel_scope.cancel()
        return
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in SCRIPTS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    projects = tmp_path / "projects"
    if request.param in ("exec v5", "exec v4"):
        agreed = V5 if request.param == "exec v5" else V4
        path = f"{SYSTEM_PATH}:{programs}"
        async with cluster(projects, path, supported=(agreed,)) as made:
            await made.executor.prepare(PROJECT)
            yield made.executor
            await until(lambda: not processes_in(tmp_path), "all processes are gone")
        return
    with shell_path(request.param, tmp_path) as path:
        executor = local(projects, f"{path}:{programs}")
        await executor.prepare(PROJECT)
        yield executor
        await until(lambda: not processes_in(tmp_path), "all processes are gone")


async def test_output_comes_whole_and_the_exit_last(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("say", "hello\n", "no newline", "3"))
    assert (seen.out, seen.err) == (b"hello\n", b"no newline")
    assert (seen.exit.exit_code, seen.exit.signal, seen.exit.why) == (3, None, None)
    assert (seen.exit.stdout_bytes, seen.exit.stderr_bytes) == (6, 10)
    assert seen.exit.kill is None
    assert seen.exit.runtime_ms is not None


async def test_a_command_without_output_ends(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("say", "", ""))
    assert (seen.pieces, seen.exit.exit_code) == ([], 0)


async def test_only_stderr_is_no_stdout(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("say", "", "oops"))
    assert (seen.out, seen.err) == (b"", b"oops")


async def test_large_output_comes_in_pieces(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("zeros"))
    assert seen.out == bytes(300_000) + b"end"
    assert max(len(piece.data) for piece in seen.pieces) <= 1 << 20


async def test_death_by_signal_has_no_exit_code(executor: Executor) -> None:
    for signal in (9, 15):
        seen = await observe(executor, new_command(), spec("die", str(signal)))
        assert (seen.exit.exit_code, seen.exit.signal) == (None, signal)


async def test_an_exit_code_above_128_is_no_signal(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("say", "", "", "137"))
    assert (seen.exit.exit_code, seen.exit.signal) == (137, None)


async def test_an_unknown_program_is_127(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("no-such-program"))
    assert seen.exit.exit_code == 127


async def test_stdin_is_the_bytes_given_or_empty(executor: Executor) -> None:
    data = bytes(range(256)) * 5 + b"\n\n"
    assert (await observe(executor, new_command(), spec("copy", stdin=data))).out == data
    assert (await observe(executor, new_command(), spec("copy"))).out == b""


async def test_the_environment_has_what_was_given_and_a_marker(executor: Executor) -> None:
    command = new_command()
    seen = await observe(executor, command, spec("show", env={"GIVEN": "some 'thing'"}))
    lines = seen.out.decode().splitlines()
    assert "GIVEN=some 'thing'" in lines
    assert f"RDEV_COMMAND_ID={command}" in lines


async def test_a_late_attach_reads_all_again(executor: Executor) -> None:
    command = new_command()
    first = await observe(executor, command, spec("say", "once", "twice", "4"))
    again = await observe(executor, command, None)
    assert (again.out, again.err, again.end) == (first.out, first.err, first.end)


async def test_pieces_continue_at_the_offset_asked_for(executor: Executor) -> None:
    command = new_command()
    await observe(executor, command, spec("say", "0123456789", "abc"))
    seen = await observe(executor, command, None, offsets=Offsets(stdout=7, stderr=3))
    assert (seen.out, seen.err) == (b"789", b"")
    seen = await observe(executor, command, None, offsets=Offsets(stdout=10, stderr=1))
    assert (seen.out, seen.err) == (b"", b"bc")


async def test_an_offset_beyond_the_journal_is_lost(executor: Executor) -> None:
    command = new_command()
    await observe(executor, command, spec("say", "0123", ""))
    seen = await observe(executor, command, None, offsets=Offsets(stdout=5))
    assert seen.end == Lost(reason=LostReason.JOURNAL_TRUNCATED)


async def test_a_command_is_started_once_whoever_attaches(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    what = spec("steps")
    results: list[bytes] = []

    async def watch() -> None:
        results.append((await observe(executor, command, what, instance=instance)).out)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(watch)
    assert results == [b"12345"] * 3


async def test_without_a_spec_nothing_is_started_then_or_later(executor: Executor) -> None:
    command = new_command()
    assert (await observe(executor, command, None)).end == Lost(reason=LostReason.NOT_STARTED)
    seen = await observe(executor, command, spec("say", "never", ""))
    assert (seen.out, seen.end) == (b"", Lost(reason=LostReason.NOT_STARTED))


async def test_another_instance_starts_nothing(executor: Executor) -> None:
    command = new_command()
    seen = await observe(executor, command, spec("say", "never", ""), instance="boot-0:1")
    gone = Lost(reason=LostReason.POD_GONE, unfinished=True)
    assert (seen.out, seen.end) == (b"", gone)
    assert (await observe(executor, command, spec("say", "never", ""))).out == b""
    assert (await observe(executor, command, None, instance="boot-0:1")).end == gone


async def test_another_instance_reads_the_status(executor: Executor) -> None:
    command = new_command()
    await observe(executor, command, spec("say", "done", ""))
    seen = await observe(executor, command, spec("say", "again", ""), instance="boot-0:1")
    assert (seen.out, seen.exit.exit_code) == (b"done", 0)


async def test_attempts_of_one_command_know_nothing_of_each_other(executor: Executor) -> None:
    command = new_command()
    first, second = attempt_id(command, 1), attempt_id(command, 2)
    assert (await observe(executor, first, None)).end == Lost(reason=LostReason.NOT_STARTED)
    seen = await observe(executor, second, spec("show"))
    assert f"RDEV_COMMAND_ID={command}" in seen.out.decode().splitlines()
    assert (await observe(executor, first, spec("say", "never", ""))).out == b""
    assert (await observe(executor, second, None)).end == seen.end


async def test_a_kill_ends_the_attempt_it_names(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    first, second = attempt_id(command, 1), attempt_id(command, 2)
    assert (await executor.kill(PROJECT, first, grace_s=1)).confirmed
    async with executor.attach(
        PROJECT, second, spec=spec("hang"), instance=instance, offsets=Offsets()
    ) as attachment:
        await read_until(attachment, b"ready")
        assert (await executor.kill(PROJECT, second, grace_s=3)).confirmed
        rest = await read_to_end(attachment, Offsets(stdout=5))
    assert rest.exit.why is Why.CANCELLED


async def test_leaving_the_block_leaves_the_command(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT, command, spec=spec("steps"), instance=instance, offsets=Offsets()
    ) as attachment:
        first = await read_until(attachment, b"1")
    at = Offsets(stdout=len(first.out))
    rest = await observe(executor, command, None, offsets=at)
    assert (first.out + rest.out, rest.exit.exit_code) == (b"12345", 0)


async def test_a_cancelled_receive_loses_nothing(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT, command, spec=spec("steps"), instance=instance, offsets=Offsets()
    ) as attachment:
        got = b""
        while True:
            piece: object = None
            with trio.move_on_after(0.005):
                piece = await attachment.receive()
            if isinstance(piece, Piece):
                got += piece.data
            elif piece is not None:
                break
    assert got == b"12345"
    assert isinstance(piece, Exit)


async def test_an_error_in_the_block_passes_unchanged(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    with pytest.raises(RdevError, match="mine"):
        async with executor.attach(
            PROJECT, command, spec=spec("steps"), instance=instance, offsets=Offsets()
        ):
            raise RdevError(ErrorCode.CONFLICT, "mine")
    await observe(executor, command, None)


async def test_kill_ends_the_command_as_cancelled(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT, command, spec=spec("hang"), instance=instance, offsets=Offsets()
    ) as attachment:
        await read_until(attachment, b"ready")
        report = await executor.kill(PROJECT, command, grace_s=3)
        rest = await read_to_end(attachment, Offsets(stdout=5))
    assert report.confirmed
    assert report.survivors == ()
    assert (rest.exit.why, rest.exit.signal) == (Why.CANCELLED, 15)
    assert rest.exit.kill is not None
    assert rest.exit.kill.confirmed
    assert (await executor.kill(PROJECT, command, grace_s=3)).confirmed


async def test_a_killed_command_can_never_start(executor: Executor) -> None:
    command = new_command()
    assert (await executor.kill(PROJECT, command, grace_s=1)).confirmed
    seen = await observe(executor, command, spec("say", "never", ""))
    assert (seen.out, seen.end) == (b"", Lost(reason=LostReason.NOT_STARTED))


async def test_kill_after_the_end_changes_nothing(executor: Executor) -> None:
    command = new_command()
    before = await observe(executor, command, spec("say", "done", ""))
    assert (await executor.kill(PROJECT, command, grace_s=1)).confirmed
    assert (await observe(executor, command, None)).end == before.end


@pytest.mark.slow
async def test_the_timeout_ends_the_command(executor: Executor) -> None:
    seen = await observe(executor, new_command(), spec("hang", timeout_s=1, grace_s=2))
    assert (seen.out, seen.exit.why, seen.exit.signal) == (b"ready", Why.TIMEOUT, 15)
    assert seen.exit.kill is not None
    assert seen.exit.kill.confirmed


async def test_a_place_keeps_its_instance(executor: Executor) -> None:
    await executor.prepare(PROJECT)
    assert await executor.instance(PROJECT) == await executor.instance(PROJECT)


async def test_a_place_that_is_not_there_is_not_found(executor: Executor) -> None:
    """A pod that is there is taken as it is: its folders are made by whoever needs them first."""
    if isinstance(executor, KubernetesExecutor):
        assert await executor.instance(ProjectId("other"))
        return
    with pytest.raises(RdevError) as caught:
        await executor.instance(ProjectId("other"))
    assert caught.value.code is ErrorCode.NOT_FOUND


async def test_remove_can_be_repeated(executor: Executor) -> None:
    command = new_command()
    await observe(executor, command, spec("say", "done", ""))
    await executor.remove(PROJECT, [command, new_command()])
    await executor.remove(PROJECT, [command])
    await executor.remove(PROJECT, [])


async def test_what_was_tidied_leaves_nothing_and_never_starts_again(executor: Executor) -> None:
    commands = [new_command() for _ in range(3)]
    for command in commands:
        await observe(executor, command, spec("say", "once", ""))
    assert await executor.tidy(PROJECT, [*commands, new_command()]) == []
    assert await executor.tidy(PROJECT, commands) == []
    for command in commands:
        seen = await observe(executor, command, spec("say", "again", ""))
        assert (seen.out, seen.end) == (b"", Lost(reason=LostReason.NOT_STARTED))


async def test_tidying_leaves_alone_and_tells_what_still_runs(executor: Executor) -> None:
    ended, running = new_command(), new_command()
    instance = await executor.instance(PROJECT)
    await observe(executor, ended, spec("say", "done", ""))
    async with executor.attach(
        PROJECT, running, spec=spec("hang"), instance=instance, offsets=Offsets()
    ) as attachment:
        await read_until(attachment, b"ready")
        assert await executor.tidy(PROJECT, [ended, running]) == [running]
        await executor.kill(PROJECT, running, grace_s=3)
        rest = await read_to_end(attachment, Offsets(stdout=5))
    assert rest.exit.why is Why.CANCELLED
    assert (await observe(executor, running, None)).out == b"ready"
    assert (await observe(executor, ended, None)).end == Lost(reason=LostReason.NOT_STARTED)


async def test_all_attempts_of_a_command_are_tidied_and_removed(executor: Executor) -> None:
    command = new_command()
    attempts = [attempt_id(command, number) for number in (1, 2, 3)]
    for attempt in attempts:
        await observe(executor, attempt, spec("say", "once", ""))
    assert await executor.tidy(PROJECT, [command]) == []
    for attempt in attempts:
        seen = await observe(executor, attempt, spec("say", "again", ""))
        assert (seen.out, seen.end) == (b"", Lost(reason=LostReason.NOT_STARTED))
    await executor.remove(PROJECT, [command])
    for attempt in attempts:
        assert (await observe(executor, attempt, spec("say", "new", ""))).out == b"new"


async def test_tidying_tells_which_attempt_still_runs(executor: Executor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    second = attempt_id(command, 2)
    await observe(executor, command, None)
    async with executor.attach(
        PROJECT, second, spec=spec("hang"), instance=instance, offsets=Offsets()
    ) as attachment:
        await read_until(attachment, b"ready")
        assert await executor.tidy(PROJECT, [command]) == [second]
        await executor.kill(PROJECT, second, grace_s=3)


@pytest.mark.slow
async def test_many_are_tidied_and_removed_at_once(executor: Executor) -> None:
    command = new_command()
    await observe(executor, command, spec("say", "done", ""))
    many = [*(new_command() for _ in range(999)), command]
    assert await executor.tidy(PROJECT, many) == []
    assert (await observe(executor, command, None)).end == Lost(reason=LostReason.NOT_STARTED)
    await executor.remove(PROJECT, many)
    assert (await observe(executor, command, spec("say", "new", ""))).out == b"new"
