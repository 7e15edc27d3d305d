"""NOTIFY between servers: told after the commit, heard a little later, or not at all."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import trio

from rdev.domain.ids import CommandId
from tests.simulation.chance import FaultKind
from tests.simulation.link import Weather

if TYPE_CHECKING:
    from tests.simulation.servers import Life

LATE_MAX_S = 0.03


class Bus:
    """Hints only: everything must also work without."""

    def __init__(self, weather: Weather) -> None:
        self._weather = weather
        self.lives: list[Life] = []
        self._due: list[tuple[float, int, Life, str, CommandId | None]] = []
        self._serial = 0
        self._pending: set[tuple[str, str, CommandId | None]] = set()
        self._news = trio.Event()

    def tell(self, sender: Life, what: str, command: CommandId | None) -> None:
        """Never waits."""
        if sender.link.is_cut:
            return
        for life in self.lives:
            if life is not sender:
                self.post(life, what, command)

    def post(self, life: Life, what: str, command: CommandId | None) -> None:
        """To one server; the same news twice at once is one."""
        key = (life.holder, what, command)
        if key in self._pending or self._weather.strikes(FaultKind.NOTIFY, 0.5):
            return
        self._pending.add(key)
        self._serial += 1
        at = trio.current_time() + LATE_MAX_S * self._weather.chance.random()
        heapq.heappush(self._due, (at, self._serial, life, what, command))
        self._news.set()

    async def run(self) -> None:
        """Deliver."""
        while True:
            self._news = trio.Event()
            with trio.move_on_at(self._due[0][0] if self._due else float("inf")):
                await self._news.wait()
            while self._due and self._due[0][0] <= trio.current_time():
                _, _, life, what, command = heapq.heappop(self._due)
                self._pending.discard((life.holder, what, command))
                if not life.link.is_cut:
                    life.hear(what, command)
