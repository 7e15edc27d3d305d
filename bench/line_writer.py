"""One program that writes all lines of many commands.

`python -m bench.line_writer LINES PER_S FIFO…`: each command copies its FIFO. A line is the
monotonic time in ns of its making, and padding.
"""

import os
import sys
import time

PADDING = "x" * 60


def main(lines: int, per_s: float, paths: list[str]) -> None:
    """Write line after line to all, at even times; then close them, which ends the commands."""
    opened = [os.open(path, os.O_WRONLY) for path in paths]
    began_s = time.monotonic()
    for number in range(lines):
        # All at the same moment would be bursts; a program's lines come when they come.
        for place, descriptor in enumerate(opened):
            due_s = began_s + (number + place / len(opened)) / per_s
            if (pause_s := due_s - time.monotonic()) > 0:
                time.sleep(pause_s)
            os.write(descriptor, b"%d %s\n" % (time.monotonic_ns(), PADDING.encode()))
    for descriptor in opened:
        os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
