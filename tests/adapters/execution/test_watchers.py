"""Growth is noticed by whatever the project has: GNU tail, inotifyd, or looking now and then."""

import shutil
from pathlib import Path

import pytest

from rdev.domain.execution import Offsets
from tests.adapters.execution.observing import (
    PROJECT,
    local,
    new_command,
    processes_in,
    read_to_end,
    read_until,
    sh,
    shell_path,
    until,
)


@pytest.fixture(params=["tail", "inotifyd", "poll"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    with shell_path("dash" if request.param == "tail" else "busybox", tmp_path) as path:
        inotifyd = Path(path.partition(":")[0]) / "inotifyd"
        if request.param == "poll":
            inotifyd.unlink(missing_ok=True)
        elif request.param == "inotifyd" and not inotifyd.exists():
            toybox = shutil.which("toybox")
            if toybox is None:
                pytest.skip("neither this busybox nor a toybox has inotifyd")
            inotifyd.symlink_to(toybox)
        return path


async def test_each_line_arrives_and_then_the_end(path: str, tmp_path: Path) -> None:
    """The heartbeat is far away: only a watcher can have noticed."""
    executor = local(tmp_path / "projects", path)
    await executor.prepare(PROJECT)
    command, instance = new_command(), await executor.instance(PROJECT)
    gate = tmp_path / "projects" / PROJECT / "gate"
    script = "mkfifo gate; exec 3<>gate; for I in 1 2 3; do echo line $I; read X <&3; done"
    async with executor.attach(
        PROJECT, command, spec=sh(script), instance=instance, offsets=Offsets()
    ) as attachment:
        size = 0
        for turn in b"123":
            seen = await read_until(attachment, b"line %c\n" % turn, Offsets(stdout=size))
            size += len(seen.out)
            with gate.open("w") as opened:
                opened.write("\n")
        end = await read_to_end(attachment, Offsets(stdout=size))
    assert end.exit.stdout_bytes == size == 21
    await until(lambda: not processes_in(tmp_path), "all processes are gone")
