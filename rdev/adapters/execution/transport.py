"""What a place must be able to do for rdev: run an argv and hand over its streams. No more."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio
import trio.abc

from rdev.domain.ids import ProjectId


class TransportError(Exception):
    """The place cannot be reached now: nothing was learned about the command. `retry_after_s`: when
    it had better be tried again, where that was told."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        """`message` is fit for logs."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NeverRanError(trio.BrokenResourceError):
    """The place says that the argv's program is not there: it never ran, and never will."""


@dataclass(frozen=True, slots=True)
class Streams:
    """An exec's ends. `stdin` stays open until the block is left; its end (stdout's `b""`) may come
    at any time and means only that this exec is over."""

    stdin: trio.abc.SendStream
    stdout: trio.abc.ReceiveStream


class Transport(Protocol):
    """Runs an argv in a project."""

    def run(self, project: ProjectId, argv: Sequence[str]) -> AbstractAsyncContextManager[Streams]:
        """Run it as the leader of a process group; stderr is nobody's.

        Leaving the block closes its stdin and forgets it; what it detached goes on.
        Errors: TransportError on entry and from nowhere else; broken streams raise trio's errors,
        of them NeverRanError (by stdout) where the place has no such program.
        """
        ...
