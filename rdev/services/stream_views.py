"""What a client must know before it watches a command, read once for many clients.

A view is remembered for a second, for as many commands as `VIEWS_MAX`. An older one serves whoever
is behind it: what came since is in the log behind it. Whoever asks for its end, or for more, needs
the truth of now (has the command ended? is the number too high?), so then it is read again.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from rdev.domain.commands import Command
from rdev.domain.ids import CommandId

VIEW_S = 1.0
VIEWS_MAX = 1_000


class Watched(Protocol):
    """What is asked of the commands' use cases."""

    async def get(self, command: CommandId) -> Command:
        """The command as it is now. Errors: NOT_FOUND."""
        ...

    async def oldest_seq(self, command: CommandId) -> int | None:
        """The first event that is still stored; None when none is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A command (without its arguments) and its oldest stored event, as they were at `read_at_s`
    (the clock of trio)."""

    command: Command
    oldest_seq: int | None
    read_at_s: float


class Views:
    """The views of the commands that are watched."""

    def __init__(self, commands: Watched) -> None:
        """Remembers nothing yet."""
        self._commands = commands
        self._remembered: OrderedDict[CommandId, View] = OrderedDict()

    async def of(self, command: CommandId, *, after: int) -> View:
        """The command for a client that has seen the events up to `after`.

        Errors: NOT_FOUND, SERVICE_UNAVAILABLE.
        """
        known = self._remembered.get(command)
        asked_at_s = trio.current_time()
        is_young = known is not None and asked_at_s - known.read_at_s < VIEW_S
        if known is not None and is_young and after < known.command.last_seq:
            return known
        # Its arguments (a prompt) may be hundreds of KiB, and nobody here asks for them.
        found = View(
            command=replace(await self._commands.get(command), argv=()),
            oldest_seq=await self._commands.oldest_seq(command),
            read_at_s=asked_at_s,
        )
        self._remembered[command] = found
        self._remembered.move_to_end(command)
        while len(self._remembered) > VIEWS_MAX:
            self._remembered.popitem(last=False)
        return found
