"""Projects as folders of this machine; commands as its processes.

Owns the processes that observe (one per attachment, ended with it). Commands are nobody's here:
each runs detached in a session of its own, so neither a terminal's Ctrl-C nor the end of this
process reaches them.
"""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Final

import trio

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.executor import (
    DEFAULT_PATH,
    Place,
    ScriptExecutor,
    ScriptSettings,
)
from rdev.adapters.execution.transport import Streams, TransportError
from rdev.domain.ids import ProjectId

_JOURNAL_MAX_BYTES: Final = 1 << 30


class LocalTransport:
    """Implements `Transport` with subprocesses; environment empty, session their own."""

    def __init__(self, path: str) -> None:
        """`path` is the PATH on which the argv's first word is found."""
        self._path = path

    @asynccontextmanager
    async def run(self, project: ProjectId, argv: Sequence[str]) -> AsyncIterator[Streams]:
        """See `Transport.run`."""
        try:
            process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": self._path},
                start_new_session=True,
            )
        except OSError as error:
            raise TransportError(f"cannot start a process: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Streams(process.stdin, process.stdout)
        finally:
            await _end(process)  # noqa: ASYNC102  # _end() shields itself


async def _end(process: trio.Process) -> None:
    """End the observers as one group, and reap. Takes about a millisecond: they are killed."""
    # Nobody has reaped the leader yet (trio does so only when asked), dead or alive: its id, and so
    # the group's, cannot belong to others.
    os.killpg(process.pid, signal.SIGKILL)
    # shielded: a killed process is reaped at once, an unreaped one would stay for ever
    with trio.CancelScope(shield=True):
        await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await trio.aclose_forcefully(stream)


class LocalExecutor(ScriptExecutor):
    """`Executor` for the folders under `projects_dir`.

    Several servers on one machine share it when `machine_id` and the folder are the same.
    """

    def __init__(
        self,
        *,
        projects_dir: Path,
        base_env: Mapping[str, str],
        machine_id: str,
        shell: str = "sh",
        journal_max_bytes: int = _JOURNAL_MAX_BYTES,
        patience: Patience | None = None,
    ) -> None:
        """Opens nothing; `prepare` makes the folders."""
        root = projects_dir.resolve()
        path = base_env.get("PATH", DEFAULT_PATH)
        settings = ScriptSettings(
            base_env=base_env,
            path=path,
            shell=shell,
            journal_max_bytes=journal_max_bytes,
            patience=patience or Patience(),
        )
        super().__init__(
            reach=lambda: f"local:{machine_id}:{root}",
            transport=LocalTransport(path),
            place=lambda project: Place(home=str(root / project), commands=str(root / ".commands")),
            settings=settings,
        )

    @property
    def standing_instance(self) -> str | None:
        """See `Executor.standing_instance`: this machine, whose pid 1 outlives this process."""
        return _instance()


@cache
def _instance() -> str:
    """What the script says of this place (`read_instance`), without asking it each time."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # The name in field 2 may hold anything, a closing bracket included; field 22 is the start.
    start = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
    return f"{boot_id}:{start}"
