"""How the program ends when something failed: one line on stderr, exit status 1."""

import os
import sys
from collections.abc import Callable, Coroutine

import click
import trio

from rdev.domain.errors import RdevError

# 128 + the signal, the shell's convention.
PIPE_STATUS = 141
INTERRUPT_STATUS = 130


def run_trio(main: Callable[[], Coroutine[object, object, int]]) -> None:
    """Run `main` on trio and exit with its status; an `RdevError` becomes one line.

    A reader that left (`rdev run … | head`) ends the program as SIGPIPE would, and Ctrl-C as SIGINT
    would where nobody heeds it. Other errors are defects and keep their traceback.
    """
    # Raised after the handlers: older 3.11 puts what an `except*` raises in a group, which
    # ends the program with a traceback (Debian 12 has 3.11.2).
    try:
        status = trio.run(main)
    except* RdevError as group:
        for error in _leaves(group):
            click.echo(f"rdev: {error}", err=True)
        status = 1
    except* BrokenPipeError:
        # What is still buffered cannot be written either; without this Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = PIPE_STATUS
    except* KeyboardInterrupt:
        status = INTERRUPT_STATUS
    raise SystemExit(status)


def _leaves(group: BaseExceptionGroup[RdevError]) -> list[RdevError]:
    leaves: list[RdevError] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            leaves += _leaves(error)
        else:
            leaves.append(error)
    return leaves
