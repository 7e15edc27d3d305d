"""Breaks servers, places and the database, one thing after another, and mends all at the end."""

import trio

from tests.simulation.chance import FaultKind
from tests.simulation.fleet import Fleet
from tests.simulation.history import Calm, Fault, History
from tests.simulation.link import Weather
from tests.simulation.places import Place

# What begins by itself, and how likely each is where the run has it.
EVENTS = (
    FaultKind.CRASH,
    FaultKind.CRASH_AT,
    FaultKind.STOP,
    FaultKind.INTERRUPT,
    FaultKind.PAUSE,
    FaultKind.DB_AWAY,
    FaultKind.PLACE_RESTART,
    FaultKind.PLACE_AWAY,
)


class Nemesis:
    """One task. What it breaks for a while, it mends before the calm at the latest."""

    def __init__(
        self, *, weather: Weather, fleet: Fleet, places: list[Place], history: History
    ) -> None:
        self._weather = weather
        self._fleet = fleet
        self._places = places
        self._history = history

    async def run(self) -> None:
        """Until the calm."""
        weather, chance, shape = self._weather, self._weather.chance, self._weather.shape
        kinds = [kind for kind in EVENTS if shape.has(kind)]
        async with trio.open_nursery() as faults:
            with trio.move_on_after(shape.faulty_s):
                while kinds:
                    await trio.sleep(shape.every_s * 2 * chance.random())
                    faults.start_soon(self._strike, chance.one_of(kinds))
                await trio.sleep_forever()
            weather.calm.set()
        self._history.events.append(Calm(trio.current_time()))

    async def _strike(self, kind: FaultKind) -> None:
        weather, chance = self._weather, self._weather.chance
        life = chance.one_of(self._fleet.lives)
        place = chance.one_of(self._places)
        match kind:
            case FaultKind.CRASH:
                self._note(kind, life.holder)
                life.die()
            case FaultKind.CRASH_AT:
                life.link.dies_at = life.link.crossings + chance.integer(1, 30)
            case FaultKind.STOP | FaultKind.INTERRUPT:
                self._note(kind, life.holder)
                if kind is FaultKind.INTERRUPT:
                    life.queue.cancel_running()
                await self._fleet.stop(life)
            case FaultKind.PAUSE:
                self._note(kind, life.holder)
                life.link.pause()
                leases = chance.one_of((0.5, 1.5, 2.5))
                await weather.linger(weather.shape.lease_s * leases * chance.uniform(0.6, 1.2))
                life.link.resume()
            case FaultKind.DB_AWAY:
                self._note(kind, "database")
                weather.outages += 1
                await weather.linger(chance.uniform(0.1, 1.5 * weather.shape.lease_s))
                weather.outages -= 1
            case FaultKind.PLACE_RESTART:
                self._note(kind, place.project)
                place.restart()
            case FaultKind.PLACE_AWAY if not place.is_away:
                self._note(kind, place.project)
                place.leave()
                await weather.linger(chance.uniform(0.1, 8.0))
                place.come_back()

    def _note(self, kind: FaultKind, whom: str) -> None:
        self._weather.faults[kind] += 1
        self._history.events.append(Fault(trio.current_time(), kind, whom))
