"""Each sentence of "Attach, exactly", with the fault that would break it."""

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio

from rdev.adapters.execution import script
from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.executor import ScriptExecutor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Lost, LostReason, Offsets, Piece, Spec, Why
from rdev.domain.ids import CommandId
from tests.adapters.execution.observing import (
    NOWHERE,
    PROJECT,
    QUICK,
    SYSTEM_PATH,
    Seen,
    attach_processes,
    folder,
    local,
    new_command,
    observe,
    pid_line,
    processes_in,
    python,
    read_to_end,
    read_until,
    sh,
    shell_path,
    spec,
    until,
)
from tests.adapters.execution.pods import cluster


@pytest.fixture
def projects(tmp_path: Path) -> Path:
    return tmp_path / "projects"


# Over execs it is minutes long: `make test-kubernetes`. A short version is test_kubernetes.py.
@pytest.fixture(params=["local", pytest.param("kubernetes", marks=pytest.mark.full)])
async def executor(request: pytest.FixtureRequest, projects: Path) -> AsyncIterator[ScriptExecutor]:
    async with AsyncExitStack() as stack:
        if request.param == "local":
            executor: ScriptExecutor = local(projects, patience=QUICK)
        else:
            made = await stack.enter_async_context(cluster(projects, patience=QUICK))
            executor = made.executor
        await executor.prepare(PROJECT)
        yield executor
        await until(lambda: not processes_in(projects), "all processes are gone")


# --- the stream is a tail -----------------------------------------------------------------------


@pytest.mark.slow
async def test_a_hundred_cuts_lose_and_double_nothing(
    executor: ScriptExecutor, projects: Path, tmp_path: Path
) -> None:
    chunk, size = 20_000, 200_000  # bytes of a write, and of what is written at a time
    data = random.Random(7).randbytes(130 * size)
    (tmp_path / "data").write_bytes(data)
    os.mkfifo(tmp_path / "gate")
    writer = python(
        """
        import os, sys
        data, gate = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb", buffering=0)
        for at in range(0, len(data), 20_000):
            if at % 200_000 == 0:
                gate.read(1)
            os.write(1, data[at : at + 20_000])
            os.write(2, data[at : at + 100])
        """,
        str(tmp_path / "data"),
        str(tmp_path / "gate"),
    )
    command, instance, dice = new_command(), await executor.instance(PROJECT), random.Random(11)
    got, errors, cuts, granted, target = bytearray(), bytearray(), 0, 0, 0
    with (tmp_path / "gate").open("r+b", buffering=0) as gate:
        async with executor.attach(
            PROJECT, command, spec=writer, instance=instance, offsets=Offsets()
        ) as attachment:
            with trio.fail_after(100):
                while True:
                    if len(got) == granted and granted < len(data):
                        target = granted + dice.randrange(size)
                        granted += size
                        gate.write(b".")
                    if not isinstance(piece := await attachment.receive(), Piece):
                        break
                    journal = got if piece.stream == "stdout" else errors
                    assert piece.offset == len(journal)
                    journal += piece.data
                    if len(got) >= target and cut(projects, command, dice):
                        cuts, target = cuts + 1, len(data) + 1
    assert cuts >= 100
    assert got == data
    assert errors == b"".join(data[at : at + 100] for at in range(0, len(data), chunk))
    assert (piece.stdout_bytes, piece.exit_code) == (len(data), 0)  # type: ignore[union-attr]


def cut(projects: Path, command: CommandId, dice: random.Random) -> bool:
    """Kill the shell that observes alone, or with all its helpers, where there is one."""
    for pid in attach_processes(projects, command):
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:
                dice.choice((os.kill, os.killpg, os.killpg))(pid, signal.SIGKILL)
                return True
    return False


@pytest.mark.parametrize("name", ["dash", "bash", "busybox"])
async def test_every_byte_passes_through_argv_environment_stdin_and_output(
    projects: Path, tmp_path: Path, name: str
) -> None:
    """NUL (in output and stdin), invalid UTF-8, quotes, line feeds; a large argument."""
    every = bytes(range(1, 256)).decode("utf-8", "surrogateescape")
    script = """
        import os, sys
        os.write(1, os.fsencode(sys.argv[1]) + b"|" + os.environb[b"BYTES"] + b"|")
        os.write(1, sys.stdin.buffer.read() + b"|%d" % len(sys.argv[2]))
        os.write(2, b"\\x00\\xff\\n")
        """
    with shell_path(name, tmp_path) as path:
        executor = local(projects, path)
        await executor.prepare(PROJECT)
        what = python(
            script,
            every,
            "x" * 131_071,
            env={"BYTES": every, "LC_ALL": "C.UTF-8"},
            stdin=b"\0\n\0" + bytes(range(256)),
        )
        seen = await observe(executor, new_command(), what)
    raw = bytes(range(1, 256))
    assert seen.out == raw + b"|" + raw + b"|\0\n\0" + bytes(range(256)) + b"|131071"
    assert seen.err == b"\0\xff\n"


async def test_a_hundred_megabytes_come_whole(executor: ScriptExecutor) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    what = sh("head -c 100000000 /dev/zero")
    size = 0
    async with executor.attach(
        PROJECT, command, spec=what, instance=instance, offsets=Offsets()
    ) as attachment:
        with trio.fail_after(60):
            while isinstance(piece := await attachment.receive(), Piece):
                assert len(piece.data) <= 1 << 20
                size += len(piece.data)
    assert size == 100_000_000


@pytest.mark.slow
async def test_a_reader_that_pauses_holds_the_output_in_the_journal(
    executor: ScriptExecutor, projects: Path
) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("head -c 30000000 /dev/zero"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await until((folder(projects, command) / "status").exists, "the command ended unread")
        seen = await read_to_end(attachment)
    assert len(seen.out) == 30_000_000


async def test_an_attach_whose_client_vanished_leaves_no_process(
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
        await read_until(attachment, b"ready")

    def observers() -> list[str]:
        words = (" attach sh ", "tail ", "dd ")
        return [line for line in processes_in(projects).values() if any(w in line for w in words)]

    await until(lambda: not observers(), "the observers are gone")
    os.kill(int(pid_line(projects, command)[0]), 0)  # the command goes on
    assert (await executor.kill(PROJECT, command, grace_s=3)).confirmed


async def test_the_end_of_stdin_alone_ends_all_observers(
    executor: ScriptExecutor, projects: Path
) -> None:
    """What a WebSocket's end looks like from inside: nobody kills, stdin just ends."""
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; exec sleep 1000"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready")
    words = ("attach", "sh", folder(projects, command), projects / PROJECT, instance)
    numbers = (0, 0, 0, 0, 0, 0, 1 << 30)
    process = await trio.lowlevel.open_process(
        script.argv("sh", SYSTEM_PATH, *map(str, words), *numbers),
        stdin=-1,
        stdout=-1,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.send_all(script.payload())
    got = b""
    while b"k\n" not in got:
        got += await process.stdout.receive_some(1000)
    await process.stdin.aclose()
    with trio.fail_after(30):
        await process.wait()
    await process.stdout.aclose()
    await until(lambda: not attach_processes(projects, command), "no attach is left")
    await executor.kill(PROJECT, command, grace_s=3)


async def test_a_place_that_cannot_be_reached_is_lost_and_may_still_run(projects: Path) -> None:
    patience = Patience(heartbeat_s=1, silence_s=1, unreachable_s=0.3)
    executor = local(projects, "/nonexistent", patience=patience, shell="/nonexistent/sh")
    seen = await observe(executor, new_command(), sh("true"), instance=NOWHERE)
    assert seen.end == Lost(reason=LostReason.UNREACHABLE, may_still_run=True)
    assert isinstance(seen.end, Lost)
    assert seen.end.tries > 1
    with pytest.raises(RdevError) as caught:
        await executor.kill(PROJECT, new_command(), grace_s=0)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE


# --- started at most once -----------------------------------------------------------------------


@pytest.mark.slow
async def test_racing_attaches_start_a_command_once(
    executor: ScriptExecutor, projects: Path
) -> None:
    instance = await executor.instance(PROJECT)
    results: list[bytes] = []

    async def start(command: CommandId) -> None:
        what = sh("echo $RDEV_COMMAND_ID >>ledger; echo ran")
        results.append((await observe(executor, command, what, instance=instance)).out)

    commands = [new_command() for _ in range(20)]
    for command in commands:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, command)
            nursery.start_soon(start, command)
    ledger = (projects / PROJECT / "ledger").read_text().split()
    assert sorted(ledger) == sorted(commands)
    assert results == [b"ran\n"] * 40


@pytest.mark.slow
async def test_a_kill_that_races_the_start_is_decided_by_go(
    executor: ScriptExecutor, projects: Path
) -> None:
    """Either it never runs, or it is ended: never a command that outlives its kill."""
    instance = await executor.instance(PROJECT)
    for delay_ms in range(0, 60, 6):
        command, ends = new_command(), []

        async def start(command: CommandId = command, ends: list[Seen] = ends) -> None:
            what = sh("exec sleep 1000")
            ends.append(await observe(executor, command, what, instance=instance))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await trio.sleep(delay_ms / 1000)
            assert (await executor.kill(PROJECT, command, grace_s=3)).confirmed
        end = ends[0].end
        assert end == Lost(reason=LostReason.NOT_STARTED) or ends[0].exit.why is Why.CANCELLED
        assert not [line for line in processes_in(projects).values() if "sleep 1000" in line]


async def test_a_supervisor_in_another_instance_refuses_to_start(
    executor: ScriptExecutor, projects: Path
) -> None:
    """Also when the place changed between the attach and its supervisor."""
    command = new_command()
    place = folder(projects, command)
    place.mkdir(mode=0o700)
    (place / "spec.1").write_bytes(_text(sh("echo ran")))
    done = await trio.run_process(
        [
            "sh",
            str(place / "spec.1"),
            "supervise",
            "sh",
            "1",
            str(place),
            str(projects),
            NOWHERE,
            "5",
            "1",
            "1000000",
        ]
    )
    assert done.returncode == 0
    assert not (place / "go").exists()
    assert not (place / "spec.1").exists()


async def test_a_short_spec_is_refused(executor: ScriptExecutor, projects: Path) -> None:
    """A cut while the spec or the stdin travels must not start half a command."""
    command, instance = new_command(), await executor.instance(PROJECT)
    full = script.payload(script.become(sh("cat"), {}, command), b"0123456789")
    words = ("attach", "sh", str(folder(projects, command)), str(projects / PROJECT), instance)
    argv = script.argv("sh", SYSTEM_PATH, *words, 0, 0, 1, 10, 5, 1, 1 << 30)
    for length in (3, len(full) // 2, len(full) - 11, len(full) - 1):
        done = await trio.run_process(
            argv, stdin=full[:length], capture_stdout=True, check=False, start_new_session=True
        )
        assert done.stdout == b""
        assert not (folder(projects, command) / "go").exists()
        assert not list(folder(projects, command).glob("s*.*"))
    assert (await observe(executor, command, sh("cat", stdin=b"whole"))).out == b"whole"


# --- the outcome --------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_supervisor_that_was_killed_is_lost_when_its_command_ended(
    executor: ScriptExecutor, projects: Path, tmp_path: Path
) -> None:
    command, instance = new_command(), await executor.instance(PROJECT)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh(f"echo ready; read X <{gate}; echo after"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        first = await read_until(attachment, b"ready\n")
        os.kill(int(pid_line(projects, command)[2]), signal.SIGKILL)
        with trio.move_on_after(1) as still_observed:
            await attachment.receive()
        assert still_observed.cancelled_caught
        await trio.to_thread.run_sync(gate.write_text, "go\n")
        rest = await read_to_end(attachment, Offsets(stdout=len(first.out)))
    assert rest.out == b"after\n"
    assert rest.end == Lost(reason=LostReason.SUPERVISOR_GONE)


@pytest.mark.slow
async def test_supervisor_and_command_killed_together_are_lost(
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
        pid, _, supervisor, *_ = pid_line(projects, command)
        os.kill(int(supervisor), signal.SIGKILL)
        os.kill(int(pid), signal.SIGKILL)
        rest = await read_to_end(attachment, Offsets(stdout=6))
    assert rest.end == Lost(reason=LostReason.SUPERVISOR_GONE)


async def test_a_pid_that_was_taken_by_another_process_is_not_alive(
    executor: ScriptExecutor, projects: Path
) -> None:
    command = new_command()
    place = folder(projects, command)
    (place / "go").mkdir(parents=True)
    me = f"{os.getpid()} 1"  # our pid with another start time
    (place / "pid").write_text(f"{me} {me} {await executor.instance(PROJECT)}\n")
    seen = await observe(executor, command, sh("echo ran"))
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)


async def test_a_zombie_is_not_alive(executor: ScriptExecutor, projects: Path) -> None:
    """A pid 1 that does not reap leaves the command's pid in /proc for ever."""
    command = new_command()
    place = folder(projects, command)
    (place / "go").mkdir(parents=True)
    process = await trio.lowlevel.open_process(["true"])
    stat = Path(f"/proc/{process.pid}/stat")
    await until(lambda: stat.read_text().rpartition(") ")[2][0] == "Z", "it is a zombie")
    me = f"{process.pid} {stat.read_text().rpartition(') ')[2].split()[19]}"
    (place / "pid").write_text(f"{me} {me} {await executor.instance(PROJECT)}\n")
    seen = await observe(executor, command, None)
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)
    await process.wait()


async def test_nobody_is_alive_in_another_instance(
    executor: ScriptExecutor, projects: Path
) -> None:
    command = new_command()
    place = folder(projects, command)
    (place / "go").mkdir(parents=True)
    start = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19]
    me = f"{os.getpid()} {start}"
    (place / "pid").write_text(f"{me} {me} {NOWHERE}\n")
    seen = await observe(executor, command, None)
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)


@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "no end"])
async def test_a_status_that_is_not_whole_is_absent(
    executor: ScriptExecutor, projects: Path, damage: str
) -> None:
    command = new_command()
    await observe(executor, command, sh("echo done"))
    status = folder(projects, command) / "status"
    whole = status.read_bytes()
    damaged = {
        "half": whole[: len(whole) // 2],
        "garbage": b"\xff\0{}",
        "empty": b"",
        "no end": whole.removesuffix(b"end\n"),
    }
    assert damaged[damage] != whole
    status.write_bytes(damaged[damage])
    seen = await observe(executor, command, None)
    assert seen.end == Lost(reason=LostReason.SUPERVISOR_GONE)


async def test_a_truncated_journal_is_lost(executor: ScriptExecutor, projects: Path) -> None:
    command = new_command()
    await observe(executor, command, sh("echo 0123456789"))
    os.truncate(folder(projects, command) / "out", 5)
    seen = await observe(executor, command, None)
    assert (seen.out, seen.end) == (b"", Lost(reason=LostReason.JOURNAL_TRUNCATED))


async def test_a_journal_truncated_while_read_is_lost(
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
        os.truncate(folder(projects, command) / "out", 2)
        rest = await read_to_end(attachment, Offsets(stdout=6))
    assert rest.end == Lost(reason=LostReason.JOURNAL_TRUNCATED)
    await executor.kill(PROJECT, command, grace_s=3)


@pytest.mark.slow
async def test_what_descendants_write_after_the_end_is_never_output(
    executor: ScriptExecutor, projects: Path
) -> None:
    """A child writes all the time, before, at and after the command's own end."""
    script = "(while :; do echo late; done) & echo own; sleep 0.0$1; exit 3"
    for turn in range(8):
        command = new_command()
        seen = await observe(executor, command, spec("/bin/sh", "-c", script, "sh", str(turn)))
        again = await observe(executor, command, None)
        assert (len(seen.out), len(seen.err)) == (seen.exit.stdout_bytes, seen.exit.stderr_bytes)
        assert (seen.out, seen.end) == (again.out, again.end)
        assert seen.exit.exit_code == 3
        assert (folder(projects, command) / "out").stat().st_size >= len(seen.out)
        assert (await executor.kill(PROJECT, command, grace_s=3)).confirmed


@pytest.mark.slow
async def test_ending_without_a_status_holds_back_what_is_not_measured(
    executor: ScriptExecutor, projects: Path
) -> None:
    """An attach that comes between the command's end and its status sends nothing yet."""
    command, instance = new_command(), await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; exec sleep 1000"),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await read_until(attachment, b"ready\n")
        place = folder(projects, command)
        (place / "ending").touch()
        with (place / "out").open("ab") as journal:
            journal.write(b"late")
        with trio.move_on_after(1) as held:
            await attachment.receive()
        assert held.cancelled_caught
        (place / "ending").unlink()
        assert (await executor.kill(PROJECT, command, grace_s=3)).confirmed


def _text(what: Spec) -> bytes:
    payload = script.payload(script.become(what, {}, "cmd_" + "0" * 32))
    return payload.partition(b"\n")[2]
