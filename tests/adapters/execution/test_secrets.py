"""What a command is given, and who else can see it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from rdev.adapters.execution import script
from rdev.adapters.execution.executor import ScriptExecutor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Offsets, Spec
from tests.adapters.execution.observing import (
    PROJECT,
    folder,
    local,
    new_command,
    observe,
    read_to_end,
    read_until,
    sh,
    shell_path,
    spec,
    until,
)


@contextmanager
def canary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SERVER_CANARY", "canary-of-the-server")
    yield


async def test_the_servers_environment_is_not_the_commands(
    executor: ScriptExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with canary(monkeypatch):
        seen = await observe(
            executor, new_command(), sh("cat /proc/self/environ; ls /proc/self/fd")
        )
    names = {line.partition(b"=")[0] for line in seen.out.rpartition(b"\0")[0].split(b"\0")}
    assert b"canary" not in seen.out
    assert names == {b"PATH", b"HOME", b"LANG", b"PWD", b"RDEV_COMMAND_ID"}
    # 3 is ls reading the folder: no descriptor of ours is inherited
    assert seen.out.rpartition(b"\0")[2].split() == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize("name", ["dash", "busybox"])
async def test_the_environment_of_the_place_is_not_the_commands(
    projects: Path, tmp_path: Path, name: str
) -> None:
    """A pod's exec begins with the container's environment."""
    with shell_path(name, tmp_path) as path:
        executor, command = local(projects, path), new_command()
        await executor.prepare(PROJECT)
        instance = await executor.instance(PROJECT)
        place = (str(folder(projects, command)), str(projects / PROJECT), instance)
        done = await trio.run_process(
            script.argv("sh", path, "attach", "sh", *place, 0, 0, 1, 0, 9, 1, 1 << 30),
            stdin=script.payload(script.become(spec("env"), {"PATH": path}, command)),
            env={"PATH": path, "POD_CANARY": "canary"},
            capture_stdout=True,
            check=False,
            start_new_session=True,
        )
        assert b"canary" not in done.stdout
        await until((folder(projects, command) / "go").exists, "it was started")
        seen = await observe(executor, command, None)
    assert b"RDEV_COMMAND_ID=" in seen.out
    assert b"canary" not in seen.out


@pytest.fixture
def default_signals() -> Iterator[None]:
    """As in a terminal: a test run may be a shell's background job, or under nohup."""
    of_pythons_own = {signal.SIGPIPE, signal.SIGXFSZ}
    ignored = {
        number
        for number in signal.valid_signals() - of_pythons_own
        if signal.getsignal(number) is signal.SIG_IGN
    }
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.usefixtures("default_signals")
async def test_signals_are_not_ignored_in_a_command(executor: ScriptExecutor) -> None:
    seen = await observe(executor, new_command(), sh("grep SigIgn /proc/self/status"))
    ignored = int(seen.out.split()[1], 16)
    # Not 32 and 33: they belong to the C library, no program can set or reset them, and some
    # container runtimes start everything with one of them ignored.
    assert [number for number in signal.valid_signals() if ignored & 1 << number - 1] == []


@pytest.mark.slow
async def test_secrets_are_in_no_argument_and_leave_the_disk(
    executor: ScriptExecutor, projects: Path
) -> None:
    """Looks at every process as fast as it can while commands start."""
    instance, found, looks = await executor.instance(PROJECT), [], 0

    def look() -> None:
        nonlocal looks
        looks += 1
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/cmdline", "rb") as file:
                        if b"s3cret" in file.read():
                            found.append(entry)
                except OSError:
                    continue

    what = sh("echo ready; exec sleep 0.1", env={"TOKEN": "s3cret-a"}, stdin=b"s3cret-b")
    for _ in range(5):
        command = new_command()
        async with executor.attach(
            PROJECT, command, spec=what, instance=instance, offsets=Offsets()
        ) as attachment:
            while not (folder(projects, command) / "go").exists():
                look()
                await trio.sleep(0)
            seen = await read_until(attachment, b"ready")
            on_disk = [
                path.name
                for path in folder(projects, command).rglob("*")
                if path.is_file() and b"s3cret" in path.read_bytes()
            ]
            assert on_disk == []
            at = Offsets(stdout=len(seen.out))
            assert (await read_to_end(attachment, at)).exit.exit_code == 0
    assert found == []
    assert looks > 20


async def test_a_commands_folder_is_its_owners_alone(
    executor: ScriptExecutor, projects: Path
) -> None:
    command = new_command()
    await observe(executor, command, sh("umask; pwd"))
    assert folder(projects, command).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "what",
    [
        sh("true", env={"A=B": "1"}),
        sh("true", env={"A B": "1"}),
        sh("true", env={"UID": "1"}),
        sh("true", env={"A": "x\0y"}),
        spec("a\0b"),
        spec("true", "x" * 131_072),
    ],
)
async def test_what_no_process_can_be_given_is_refused(
    executor: ScriptExecutor, what: Spec
) -> None:
    with pytest.raises(RdevError) as caught:
        await observe(executor, new_command(), what)
    assert caught.value.code is ErrorCode.BAD_REQUEST


async def test_a_missing_cwd_is_126_with_a_message(executor: ScriptExecutor) -> None:
    seen = await observe(executor, new_command(), sh("echo ran", cwd="no/such"))
    assert (seen.out, seen.exit.exit_code) == (b"", 126)
    assert b"no/such" in seen.err


async def test_the_cwd_is_relative_to_the_project(executor: ScriptExecutor, projects: Path) -> None:
    (projects / PROJECT / "a b").mkdir()
    seen = await observe(executor, new_command(), sh("pwd", cwd="a b", env={"CDPATH": "/"}))
    assert seen.out.decode().strip() == str(projects.resolve() / PROJECT / "a b")
