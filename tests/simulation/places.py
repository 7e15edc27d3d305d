"""Projects whose processes go on whatever becomes of rdev, and a server's way to them.

Every project is an executor of its own, so that it can restart and be out of reach by itself. An
exec that was sent arrives on its own, perhaps late, perhaps after its server died.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import (
    Exit,
    KillReport,
    Lost,
    LostReason,
    Offsets,
    Piece,
    Spec,
    Stream,
)
from rdev.domain.ids import CommandId, ProjectId
from tests.fakes.executor import FakeAttachment, FakeExecutor, FakeRun
from tests.simulation.chance import FaultKind
from tests.simulation.history import Exited, History, PlaceFault, Started, Wrote
from tests.simulation.link import Link

# An executor reports `lost: unreachable` after so long.
GIVE_UP_S = 5.0
LATE_MAX_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a process does: pauses, what it writes after each, and its exit code."""

    steps: tuple[tuple[float, Stream, bytes], ...]
    code: int


@dataclass(slots=True)
class Programs:
    """Plays plans, and writes down what the processes do."""

    history: History
    plans: list[Plan] = field(default_factory=list)
    processes: int = 0

    def add(self, plan: Plan) -> tuple[str, ...]:
        """The argv that plays it."""
        self.plans.append(plan)
        return ("play", str(len(self.plans) - 1))

    async def play(self, run: FakeRun) -> int:
        """A process, from its first moment to its last."""
        plan = self.plans[int(run.spec.argv[1])]
        command = run.env["RDEV_COMMAND_ID"]
        self.processes += 1
        process = self.processes
        events = self.history.events
        code = None
        events.append(Started(trio.current_time(), command, process))
        try:
            for pause_s, stream, data in plan.steps:
                await trio.sleep(pause_s)
                if data:
                    events.append(Wrote(trio.current_time(), command, process, stream, data))
                    run.write(data, stream)
            code = plan.code
            return code
        finally:
            events.append(Exited(trio.current_time(), command, process, code))


class Place:
    """One project's container."""

    def __init__(self, project: ProjectId, executor: FakeExecutor, history: History) -> None:
        self.project = project
        self.executor = executor
        self.boots = 1
        self.is_away = False
        self.back = trio.Event()
        self._history = history
        # Who receives now: they notice at once when the place goes away.
        self.receiving: dict[int, trio.CancelScope] = {}

    def restart(self) -> None:
        """The container restarts; what lies in its folders stays."""
        self._note("restart")
        self.boots += 1
        self.executor.restart()

    def leave(self) -> None:
        """Out of reach from now on."""
        self._note("away")
        self.is_away = True
        self.back = trio.Event()
        for scope in self.receiving.values():
            scope.cancel()

    def come_back(self) -> None:
        """Within reach again."""
        self.is_away = False
        self.back.set()

    def check(self) -> None:
        """Errors: SERVICE_UNAVAILABLE while it is out of reach."""
        if self.is_away:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the project cannot be reached")

    def _note(self, kind: str) -> None:
        self._history.events.append(PlaceFault(trio.current_time(), self.project, kind))


class Reach:
    """`Executor` as one life of a server has it: all places, over its line."""

    def __init__(self, places: dict[ProjectId, Place], link: Link, world: trio.Nursery) -> None:
        self._places = places
        self._link = link
        self._world = world
        self._is_standing = link.weather.shape.standing

    @property
    def reach(self) -> str:
        return "fake:here"

    @property
    def standing_instance(self) -> str | None:
        return "boot-1" if self._is_standing else None

    async def prepare(self, project: ProjectId) -> None:
        await self._there(project).executor.prepare(project)

    async def instance(self, project: ProjectId) -> str:
        await self._link.cross()
        place = self._there(project)
        place.check()
        found = await place.executor.instance(project)
        await self._link.cross()
        return found

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        command: CommandId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator["Observation"]:
        await self._link.cross()
        observation = Observation(self._there(project), self._link)
        weather = self._link.weather
        delay_s = 0.0
        if weather.strikes(FaultKind.LATE_EXEC, 0.3):
            delay_s = weather.chance.uniform(0.5, LATE_MAX_S)

        async def arrive() -> None:
            if delay_s:
                await weather.linger(delay_s)
            await observation.arrive(command, spec=spec, instance=instance, offsets=offsets)

        # Not a task of the server: what was sent arrives without it.
        self._world.start_soon(arrive)
        yield observation

    async def kill(self, project: ProjectId, command: CommandId, *, grace_s: int) -> KillReport:
        await self._link.cross()
        place = self._there(project)
        place.check()
        report = await place.executor.kill(project, command, grace_s=grace_s)
        await self._link.cross()
        return report

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[CommandId]:
        await self._link.cross()
        self._there(project).check()
        return await self._there(project).executor.tidy(project, commands)

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        await self._link.cross()
        self._there(project).check()
        await self._there(project).executor.remove(project, commands)

    def _there(self, project: ProjectId) -> Place:
        return self._places[project]


class Observation:
    """`Attachment` over a line that can hold up, to a place that can go away."""

    def __init__(self, place: Place, link: Link) -> None:
        self._place = place
        self._link = link
        self._arrived = trio.Event()
        self._attachment: FakeAttachment | None = None
        self._item: Piece | Exit | Lost | None = None

    async def arrive(
        self, command: CommandId, *, spec: Spec | None, instance: str, offsets: Offsets
    ) -> None:
        """The exec is there, at last."""
        while self._place.is_away:
            await self._place.back.wait()
        attaching = self._place.executor.attach(
            self._place.project, command, spec=spec, instance=instance, offsets=offsets
        )
        async with attaching as self._attachment:
            self._arrived.set()

    async def receive(self) -> Piece | Exit | Lost:
        """As `Attachment.receive`."""
        while True:
            await self._link.cross()
            if self._place.is_away:
                with trio.move_on_after(GIVE_UP_S) as waiting:
                    await self._place.back.wait()
                if waiting.cancelled_caught:
                    return Lost(reason=LostReason.UNREACHABLE, may_still_run=True)
            elif self._item is not None:
                item, self._item = self._item, None
                return item
            else:
                self._item = await self._next()

    async def _next(self) -> Piece | Exit | Lost | None:
        """None when the place goes away meanwhile."""
        with trio.CancelScope() as scope:
            self._place.receiving[id(scope)] = scope
            try:
                await self._arrived.wait()
                assert self._attachment is not None
                return await self._attachment.receive()
            finally:
                del self._place.receiving[id(scope)]
        return None
