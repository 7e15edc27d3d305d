"""One program that writes all lines of many commands. A line is the monotonic time in ns of its
making, and padding.

`python -m bench.line_writer` reads one JSON line: `lines`, `per_s`, and `fifos`, which commands
copy, or `socket` and the number of `commands`: then it is the commands (see `bench.lines_server`)
and says when it listens. It begins at the next line.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

PADDING = b"x" * 60
STATUS = (
    b"code 0\nsignal \nwhy \nout_bytes %d\nerr_bytes 0\nlate_bytes 0\nruntime_ms 1\nkill \nend\n"
)


def write_all(lines: int, per_s: float, writers: Sequence[Callable[[bytes], None]]) -> None:
    """Line after line to each, at even times."""
    began_s = time.monotonic()
    for number in range(lines):
        # All at the same moment would be bursts; a program's lines come when they come.
        for place, write in enumerate(writers):
            due_s = began_s + (number + place / len(writers)) / per_s
            if (pause_s := due_s - time.monotonic()) > 0:
                time.sleep(pause_s)
            write(b"%d %b\n" % (time.monotonic_ns(), PADDING))


class Fifo:
    """A command that copies what is written here."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY)

    def write(self, line: bytes) -> None:
        os.write(self._descriptor, line)

    def end(self) -> None:
        """Ends the command."""
        os.close(self._descriptor)


class Attached:
    """A command, as its attach tells it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._sent_bytes = connection, 0
        connection.sendall(b"h\n")

    def write(self, line: bytes) -> None:
        self._connection.sendall(b"o %d %d\n%b" % (self._sent_bytes, len(line), line))
        self._sent_bytes += len(line)

    def end(self) -> None:
        """The last frame."""
        status = STATUS % self._sent_bytes
        self._connection.sendall(b"s %d\n%b" % (len(status), status))
        self._connection.close()


def accept(path: str, commands: int) -> list[Attached]:
    """The commands, when all of them are attached."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(commands)
        print(json.dumps({"listens": 1}), flush=True)
        return [Attached(listener.accept()[0]) for _ in range(commands)]


def main() -> None:
    """The whole life of the program."""
    plan = json.loads(sys.stdin.readline())
    commands: Sequence[Fifo | Attached]
    if "socket" in plan:
        commands = accept(plan["socket"], plan["commands"])
    else:
        commands = [Fifo(path) for path in plan["fifos"]]
    sys.stdin.readline()
    write_all(plan["lines"], plan["per_s"], [command.write for command in commands])
    for command in commands:
        command.end()


if __name__ == "__main__":
    main()
