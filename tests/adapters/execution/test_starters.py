"""Several who start the same attempt at once: one does, and with all that the command was given."""

from pathlib import Path

import trio

from tests.adapters.execution.observing import (
    PROJECT,
    QUICK,
    SYSTEM_PATH,
    local,
    new_command,
    observe,
    processes_in,
    spec,
    until,
)

TOOL = """#!/bin/sh
D=%(turns)s
%(body)s
exec %(real)s "$@"
"""

# Each has opened its text. The first one goes on when both have written the command's stdin, the
# second one when the first has removed what it removes.
SH_BODY = """
case "$*" in
  spec.*" start "*)
    exec 9<"$1"
    shift
    if /bin/mkdir "$D/first" 2>/dev/null; then
      while [ "$(ls "$3" | grep -c '^stdin')" -lt 2 ]; do sleep 0.01; done
    else
      while [ "$(ls "$3" | grep -c '^stdin')" -gt 1 ]; do sleep 0.01; done
    fi
    set -- /proc/self/fd/9 "$@" ;;
esac
"""

# The first one who is about to make go/ waits until the other one has.
MKDIR_BODY = """
case "$*" in
  */go)
    if /bin/mkdir "$D/go" 2>/dev/null; then
      TURNS=1000
      while [ ! -d "$1" ] && [ $((TURNS -= 1)) -gt 0 ]; do sleep 0.01; done
    fi ;;
esac
"""


def write_tool(folder: Path, turns: Path, name: str, body: str) -> None:
    real = next(Path(f"/{place}/{name}") for place in ("bin", "usr/bin"))
    text = TOOL % {"turns": turns, "body": body, "real": real}
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


async def test_who_starts_second_has_the_stdin_that_the_first_one_had(
    projects: Path, tmp_path: Path
) -> None:
    tools, turns = tmp_path / "tools", tmp_path / "turns"
    for made in (tools, turns):
        made.mkdir()
    write_tool(tools, turns, "sh", SH_BODY)
    write_tool(tools, turns, "mkdir", MKDIR_BODY)
    executor = local(projects, f"{tools}:{SYSTEM_PATH}", patience=QUICK)
    await executor.prepare(PROJECT)
    command, outputs = new_command(), []

    async def start() -> None:
        seen = await observe(executor, command, spec("cat", stdin=b"what it was given"))
        outputs.append(seen.out)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        nursery.start_soon(start)
    assert outputs == [b"what it was given"] * 2
    await until(lambda: not processes_in(projects), "all processes are gone")
