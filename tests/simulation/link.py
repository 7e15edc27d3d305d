"""One server's line to everything outside of it. What crosses it is all that a server does.

A crash is the cut of the line: the dead server's tasks are cancelled and may run on in their
shields, but nothing of them reaches the store, a project or a client any more. Between two
crossings a server only changes its own memory, so dying right before and right after each crossing
is dying everywhere. A paused server's line holds everything up, in both directions.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId
from tests.fakes.store import StoreState
from tests.simulation.chance import Chance, FaultKind, Shape

# An unlucky statement takes up to so long: longer than any lease here, and than a commit's shield.
SLOW_MAX_S = 7.0
FAULTS_PER_CALL = 0.04
AWAY_S = 0.3
# No run needs so many.
CROSSINGS_MAX = 200_000

Call = Callable[..., Awaitable[object]]
Port = TypeVar("Port")


class Watch(Protocol):
    """Told of each statement at its commit, before anything else can happen."""

    def committed(self, name: str, arguments: tuple[object, ...], result: object) -> None: ...


@dataclass(slots=True)
class Weather:
    """What all lines have in common."""

    state: StoreState
    watch: Watch
    chance: Chance
    shape: Shape
    faults: Counter[FaultKind] = field(default_factory=Counter)
    # The database cannot be reached while there are any.
    outages: int = 0
    # From then on nothing is broken, and what was slow is done.
    calm: trio.Event = field(default_factory=trio.Event)

    def strikes(self, kind: FaultKind, probability: float) -> bool:
        """Whether this fault happens here and now; counted."""
        if self.calm.is_set() or not self.shape.has(kind) or not self.chance.odds(probability):
            return False
        self.faults[kind] += 1
        return True

    async def linger(self, seconds: float) -> None:
        """Wait, but not into the calm."""
        with trio.move_on_after(seconds):
            await self.calm.wait()


class Link:
    """The line of one life of one server."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.is_cut = False
        self.crossings = 0
        # Dies when so many crossings are done.
        self.dies_at: int | None = None
        self.die: Callable[[], None] = lambda: None
        self._resumed: trio.Event | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the server stands still."""
        return self._resumed is not None

    def pause(self) -> None:
        """Stand still."""
        if self._resumed is None:
            self._resumed = trio.Event()

    def resume(self) -> None:
        """Go on, with all that was in hand."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def cross(self) -> None:
        """Let something out or in, as soon as the server moves; never when it is dead."""
        while self._resumed is not None:
            await self._resumed.wait()
        self.crossings += 1
        if self.crossings == self.dies_at:
            self.die()
        if self.crossings > CROSSINGS_MAX:
            raise RuntimeError("a server is busy without time passing")
        if self.is_cut:
            await trio.sleep_forever()

    async def call(self, name: str, method: Call, *args: object, **kwargs: object) -> object:
        """One statement, there and back."""
        weather = self.weather
        await self.cross()
        await self._travel()
        if weather.strikes(FaultKind.DB_BEFORE, FAULTS_PER_CALL):
            raise _unavailable("the statement was not executed")
        if weather.strikes(FaultKind.DB_UNCOMMITTED, FAULTS_PER_CALL):
            await self._hold_all()
            raise _unavailable("the transaction was not committed")
        result = await method(*args, **kwargs)
        weather.watch.committed(name, (*args, *kwargs.values()), result)
        if weather.strikes(FaultKind.DB_REPLY, FAULTS_PER_CALL):
            raise _unavailable("the reply was lost")
        await self._travel()
        await self.cross()
        return result

    async def _travel(self) -> None:
        weather = self.weather
        if weather.outages:
            await trio.sleep(AWAY_S * weather.chance.random())
            raise _unavailable("the database cannot be reached")
        if weather.strikes(FaultKind.DB_LATENCY, FAULTS_PER_CALL):
            await weather.linger(weather.chance.uniform(0.1, SLOW_MAX_S))
            await self._moving()
        elif weather.shape.latency_s and weather.chance.odds(0.3):
            await trio.sleep(weather.shape.latency_s * weather.chance.random())
            await self._moving()

    async def _moving(self) -> None:
        """What was on its way when a server died arrives or not; while it stands still, not yet."""
        while self._resumed is not None:
            await self._resumed.wait()
        if self.is_cut and self.weather.chance.odds(0.5):
            await trio.sleep_forever()

    async def _hold_all(self) -> None:
        """Rows stay locked until the database sees that the connection is gone."""
        state, weather = self.weather.state, self.weather
        with ExitStack() as locks:
            for command in [c for c in state.rows if c not in state.held]:
                if weather.chance.odds(0.5):
                    locks.enter_context(held(state, command))
            await weather.linger(weather.chance.random())


class held:
    """`StoreState.hold`, given back whatever ends the block."""

    def __init__(self, state: StoreState, command: CommandId) -> None:
        self._state, self._command = state, command

    def __enter__(self) -> None:
        self._state.held.add(self._command)

    def __exit__(self, *exc: object) -> None:
        self._state.held.discard(self._command)


def linked(port: Port, link: Link) -> Port:
    """A port of the store as one server sees it: every method is a call over its line."""
    return _Linked(port, link)  # type: ignore[return-value]  # it has the port's methods, all of them


class _Linked:
    def __init__(self, port: object, link: Link) -> None:
        self._port, self._link = port, link

    def __getattr__(self, name: str) -> Call:
        method: Call = getattr(self._port, name)

        async def call(*args: object, **kwargs: object) -> object:
            return await self._link.call(name, method, *args, **kwargs)

        setattr(self, name, call)
        return call


def _unavailable(message: str) -> RdevError:
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=1.0)
