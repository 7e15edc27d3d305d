"""The servers of a run: as many names as the shape says, each with one life after another."""

from collections.abc import Callable

import trio

from tests.simulation.chance import FaultKind
from tests.simulation.history import Fault, History
from tests.simulation.link import Weather
from tests.simulation.servers import Life

STOP_GRACE_S = 10.0


class Fleet:
    """`lives` has one entry a server: the life it lives now, or lived last."""

    def __init__(
        self, *, weather: Weather, history: History, new_life: Callable[[str], Life]
    ) -> None:
        self._weather = weather
        self._history = history
        self._new_life = new_life
        self.lives: list[Life] = []

    def start(self, nursery: trio.Nursery) -> None:
        """All of them."""
        for number in range(self._weather.shape.servers):
            self.lives.append(self._new_life(f"server-{number}"))
            nursery.start_soon(self._keep_alive, number, nursery)

    async def _keep_alive(self, number: int, nursery: trio.Nursery) -> None:
        """A dead server comes back after a while, at once when it is calm."""
        while True:
            life = self.lives[number]
            life.link.die = lambda life=life: self._die_at(life)
            nursery.start_soon(life.run, self._history)
            await life.over.wait()
            await self._weather.linger(self._weather.chance.random() * 6)
            self.lives[number] = self._new_life(life.holder)

    def _die_at(self, life: Life) -> None:
        """At a crossing that was chosen beforehand."""
        if self._weather.calm.is_set():
            return
        self._weather.faults[FaultKind.CRASH_AT] += 1
        self._history.events.append(Fault(trio.current_time(), FaultKind.CRASH_AT, life.holder))
        life.die()

    async def stop(self, life: Life) -> None:
        """As SIGTERM does: what does not end within the grace is cancelled."""
        life.fanout.stop()
        life.queue.stop()
        with trio.move_on_after(STOP_GRACE_S):
            await life.over.wait()
        life.die()
