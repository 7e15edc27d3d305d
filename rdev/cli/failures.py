"""How the program ends when something failed: one line on stderr, exit status 1."""

from collections.abc import Callable, Coroutine

import click
import trio

from rdev.domain.errors import RdevError


def run_trio(main: Callable[[], Coroutine[object, object, int]]) -> None:
    """Run `main` on trio and exit with its status; an `RdevError` becomes one line.

    Other errors are defects and keep their traceback.
    """
    try:
        status = trio.run(main)
    except* RdevError as group:
        for error in _leaves(group):
            click.echo(f"rdev: {error}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(status)


def _leaves(group: BaseExceptionGroup[RdevError]) -> list[RdevError]:
    leaves: list[RdevError] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            leaves += _leaves(error)
        else:
            leaves.append(error)
    return leaves
