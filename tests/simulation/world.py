"""One run: what a seed makes of servers, places, clients and faults, and what the checker says.

No thread, no real clock, no order that depends on hashes: the same seed is the same run.
"""

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio
from trio.testing import MockClock

from rdev.domain.ids import ProjectId
from rdev.domain.projects import ProjectDefinition
from rdev.domain.sse import split_events
from tests.fakes.projects import FakeProjects
from tests.fakes.store import ACTOR, StoreState
from tests.simulation.bus import Bus
from tests.simulation.chance import Chance, FaultKind, Shape, draw_shape, seed_scheduler
from tests.simulation.checker import check
from tests.simulation.clients import Client
from tests.simulation.fleet import Fleet
from tests.simulation.history import Closed, History, Opened, Overdue, Saw
from tests.simulation.link import Weather
from tests.simulation.nemesis import Nemesis
from tests.simulation.places import Place, Programs
from tests.simulation.recorder import Recorder
from tests.simulation.seams import Plant, sound
from tests.simulation.servers import Life

# What may pass between the last fault and the end of everything, besides a lease and a third (the
# holders' one heartbeat), the clients' arrival and the programs themselves: the longest pause of a
# retry (5 s), a shield (5 s), a stream that looks at the log by itself (15 s), and some polls.
SETTLE_S = 30.0
STEPS_MAX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to."""

    seed: int
    violations: Sequence[str]
    history: History
    virtual_s: float
    commands: int
    faults: Counter[FaultKind]


class World:
    """Everything there is."""

    def __init__(self, seed: int, plant: Plant | None) -> None:
        self.chance = Chance(seed)
        self.shape: Shape = draw_shape(self.chance)
        self.history = History()
        self.state = StoreState()
        self.recorder = Recorder(self.state, self.history)
        self.weather = Weather(self.state, self.recorder, self.chance, self.shape)
        self.seams = sound(self.state, lease_s=self.shape.lease_s)
        if plant is not None:
            plant(self.seams, self.state, self.shape.lease_s)
        self.virtual_s = 0.0

    async def run(self) -> None:
        """To the end of all commands and clients, or to the bound of what that may take."""
        async with trio.open_nursery() as nursery:
            programs = Programs(self.history)
            places = await self._make_places(nursery, programs)
            bus = Bus(self.weather)
            fleet = Fleet(
                weather=self.weather,
                history=self.history,
                new_life=functools.partial(
                    Life,
                    weather=self.weather,
                    seams=self.seams,
                    places=places,
                    bus=bus,
                    world=nursery,
                ),
            )
            bus.lives = fleet.lives
            fleet.start(nursery)
            nursery.start_soon(bus.run)
            await self._live(fleet, places, programs)
            nursery.cancel_scope.cancel()
        self.virtual_s = trio.current_time()
        self._read_all()

    async def _make_places(
        self, nursery: trio.Nursery, programs: Programs
    ) -> dict[ProjectId, Place]:
        places = {}
        projects = FakeProjects(self.state)
        for number in range(self.shape.projects):
            project = ProjectId(f"project-{number}")
            executor = self.seams.executor(nursery, {"play": programs.play})
            await executor.prepare(project)
            definition = ProjectDefinition(id=project)
            await projects.insert(definition, ACTOR, executor="fake", reach=executor.reach)
            places[project] = Place(project, executor, self.history)
        return places

    async def _live(self, fleet: Fleet, places: dict[ProjectId, Place], programs: Programs) -> None:
        connections = [0]
        clients = [
            Client(
                number=number,
                weather=self.weather,
                history=self.history,
                programs=programs,
                projects=list(places),
                lives=fleet.lives,
                connections=connections,
            )
            for number in range(self.shape.clients)
        ]
        nemesis = Nemesis(
            weather=self.weather, fleet=fleet, places=list(places.values()), history=self.history
        )
        with trio.CancelScope() as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._limit, patience)
                nursery.start_soon(nemesis.run)
                for client in clients:
                    nursery.start_soon(client.run)
            while self.recorder.open:
                await self.recorder.changed.wait()
        if patience.cancelled_caught:
            what = f"{self.recorder.open} commands" if self.recorder.open else "a client"
            self.history.events.append(Overdue(trio.current_time(), what))

    async def _limit(self, patience: trio.CancelScope) -> None:
        shape = self.shape
        await self.weather.calm.wait()
        work_s = shape.arrival_s + shape.clients * STEPS_MAX * shape.program_s
        patience.deadline = trio.current_time() + 4 / 3 * shape.lease_s + SETTLE_S + work_s

    def _read_all(self) -> None:
        """The whole log, as somebody reads it who comes when all is over."""
        events, now = self.history.events, self.virtual_s
        for number, command in enumerate(self.state.rows, 1):
            events.append(Opened(now, -number, command, 0))
            for chunk in self.state.chunks[command]:
                for seq, event, data in split_events(
                    chunk.payload, chunk.first_seq, chunk.last_seq
                ):
                    events.append(Saw(now, -number, command, seq, str(event), data))
            events.append(Closed(now, -number))


@contextmanager
def _silence() -> Iterator[None]:
    """Every fault is logged; the history tells more."""
    logger = logging.getLogger("rdev")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def simulate(seed: int, plant: Plant | None = None) -> Result:
    """Run a seed, with a bug in it where one is given."""
    world = World(seed, plant)
    broken = []
    with _silence():
        seed_scheduler(seed)
        try:
            trio.run(world.run, clock=MockClock(autojump_threshold=0))
        except Exception as error:
            broken.append(f"the run broke: {error!r}")
    return Result(
        seed=seed,
        violations=[*broken, *check(world.history.events)],
        history=world.history,
        virtual_s=world.virtual_s,
        commands=len(world.state.rows),
        faults=world.weather.faults,
    )
