"""What the tests of the execution port share: shells, reading to the end, looking at processes."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.local import LocalExecutor
from rdev.domain.execution import Exit, Lost, Offsets, Piece, Spec, Stream
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.ports.execution import Attachment, Executor

PROJECT = ProjectId("demo")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
START = Offsets()
DEADLINE_S = 60.0  # generous: the machine may be busy


def new_command() -> CommandId:
    return command_id(uuid.uuid4())


def spec(*argv: str, timeout_s: int = 60, **rest: object) -> Spec:
    return Spec(argv=argv, timeout_s=timeout_s, **rest)  # type: ignore[arg-type]


def sh(script: str, **rest: object) -> Spec:
    return spec("/bin/sh", "-c", script, **rest)  # type: ignore[arg-type]


@dataclass
class Seen:
    """All that an attachment gave."""

    out: bytes = b""
    err: bytes = b""
    end: Exit | Lost | None = None
    pieces: list[Piece] = field(default_factory=list)

    @property
    def exit(self) -> Exit:
        assert isinstance(self.end, Exit), self.end
        return self.end

    def add(self, piece: Piece, start: Offsets = START) -> None:
        before = self.out if piece.stream is Stream.STDOUT else self.err
        base = start.stdout if piece.stream is Stream.STDOUT else start.stderr
        assert piece.offset == base + len(before), "hole or overlap"
        assert 0 < len(piece.data) <= 1 << 20
        self.pieces.append(piece)
        if piece.stream is Stream.STDOUT:
            self.out += piece.data
        else:
            self.err += piece.data


async def read_to_end(attachment: Attachment, start: Offsets = START) -> Seen:
    seen = Seen()
    with trio.fail_after(DEADLINE_S):
        while seen.end is None:
            match await attachment.receive():
                case Piece() as piece:
                    seen.add(piece, start)
                case end:
                    seen.end = end
    return seen


async def read_until(attachment: Attachment, text: bytes, start: Offsets = START) -> Seen:
    seen = Seen()
    with trio.fail_after(DEADLINE_S):
        while text not in seen.out:
            piece = await attachment.receive()
            assert isinstance(piece, Piece), piece
            seen.add(piece, start)
    return seen


async def observe(
    executor: Executor,
    command: CommandId,
    what: Spec | None,
    *,
    instance: str | None = None,
    offsets: Offsets = START,
) -> Seen:
    if instance is None:
        instance = await executor.instance(PROJECT)
    async with executor.attach(
        PROJECT, command, spec=what, instance=instance, offsets=offsets
    ) as attachment:
        return await read_to_end(attachment, offsets)


async def until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    """Wait for a condition of the outside world. It counts when it was seen: asked again, it may
    see a process between two of its forms."""
    with trio.move_on_after(DEADLINE_S):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"never: {what}")


def processes_in(folder: Path) -> dict[int, str]:
    """The living processes that work below a folder: pid → command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if not os.readlink(entry / "cwd").startswith(str(folder)):
                continue
            state = (entry / "stat").read_text().rpartition(") ")[2][0]
            if state not in "ZX":
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found[int(entry.name)] = re.sub(r"\s+", " ", b" ".join(words).decode("latin-1"))
        except OSError:
            continue
    return found


@contextmanager
def shell_path(name: str, folder: Path) -> Iterator[str]:
    """A PATH whose `sh` and tools are those of dash, bash or busybox."""
    tools = folder / f"tools-{name}"
    if not tools.exists():
        tools.mkdir()
        if name == "busybox":
            busybox = shutil.which("busybox")
            if busybox is None:
                pytest.skip("busybox is not installed")
            listed = subprocess.run([busybox, "--list"], capture_output=True, check=True, text=True)
            for applet in listed.stdout.split():
                (tools / applet).symlink_to(busybox)
        else:
            found = shutil.which(name, path=SYSTEM_PATH)
            if found is None:
                pytest.skip(f"{name} is not installed")
            (tools / "sh").symlink_to(found)
    yield str(tools) if name == "busybox" else f"{tools}:{SYSTEM_PATH}"


def path_without(tool: str, folder: Path) -> str:
    """A PATH with the system's tools but one. Not busybox's: some of its shells need no PATH."""
    tools = folder / f"tools-without-{tool}"
    tools.mkdir()
    for place in reversed(SYSTEM_PATH.split(":")):
        for found in Path(place).iterdir():
            (tools / found.name).unlink(missing_ok=True)
            (tools / found.name).symlink_to(found)
    (tools / tool).unlink()
    return str(tools)


def local(projects_dir: Path, path: str = SYSTEM_PATH, **rest: object) -> LocalExecutor:
    env = {"PATH": path, "HOME": "/nowhere", "LANG": "C.UTF-8"}
    return LocalExecutor(
        projects_dir=projects_dir,
        base_env=env,
        machine_id="test",
        **rest,  # type: ignore[arg-type]
    )


def folder(projects: Path, command: CommandId) -> Path:
    return projects / ".commands" / command


def pid_line(projects: Path, command: CommandId) -> list[str]:
    """The pids of command and supervisor: [pid, start, supervisor, its start, instance]."""
    return (folder(projects, command) / "pid").read_text().split()


def attach_processes(projects: Path, command: CommandId) -> list[int]:
    """The shells that observe a command: the one that leads its group, and its helpers."""
    mine = f" attach sh {folder(projects, command)}"
    return [pid for pid, line in processes_in(projects).items() if mine in line]


def python(source: str, *argv: str, **rest: object) -> Spec:
    return spec(sys.executable, "-c", textwrap.dedent(source), *argv, **rest)


# Seconds between two looks at a silent command; a dead supervisor is seen as fast.
QUICK = Patience(heartbeat_s=0.2, silence_s=30, unreachable_s=60)
NOWHERE = "00000000-0000-0000-0000-000000000000:1"
