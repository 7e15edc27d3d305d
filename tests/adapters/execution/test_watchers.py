"""Growth is noticed by whatever the project has: GNU tail, inotifyd, or looking now and then."""

import sys
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

# What busybox calls inotifyd (Debian's has none): events of modification, as lines on stdout.
INOTIFYD = """#!{python}
import ctypes, os, sys
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
for word in sys.argv[2:]:
    libc.inotify_add_watch(fd, word.partition(":")[0].encode(), 2)
while True:
    os.write(1, b"c\\tsomething\\n" * (len(os.read(fd, 4096)) // 16))
"""


@pytest.fixture(params=["tail", "inotifyd", "poll", "a watcher that dies"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A PATH with that way to notice growth and no better one."""
    with shell_path("dash" if request.param == "tail" else "busybox", tmp_path) as path:
        inotifyd = Path(path.partition(":")[0]) / "inotifyd"
        inotifyd.unlink(missing_ok=True)
        if request.param == "inotifyd":
            inotifyd.write_text(INOTIFYD.format(python=sys.executable))
            inotifyd.chmod(0o755)
        elif request.param == "a watcher that dies":
            inotifyd.symlink_to("/bin/false")
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
