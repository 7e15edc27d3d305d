"""A server that lives several lives under one name: the real services on lines that can be cut."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import trio

from rdev.domain.depths import DepthLimits
from rdev.domain.errors import RdevError
from rdev.domain.ids import CommandId, ProjectId
from rdev.ports.telemetry import Silence
from rdev.services.appender import Appender
from rdev.services.commands import Commands
from rdev.services.depths import QueueGate
from rdev.services.queue import CommandQueue
from rdev.services.stream import Fanout
from tests.simulation.bus import Bus
from tests.simulation.history import FellOver, History
from tests.simulation.link import Link, Weather, linked
from tests.simulation.places import Place, Reach
from tests.simulation.seams import Seams


class GoneError(Exception):
    """The client's connection broke; what became of the request is unknown to it."""


@dataclass(slots=True)
class Request:
    """One request, run by the server, awaited by a client."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = None
    answer: object = None


class Life:
    """One process. Builds what the composition root builds."""

    def __init__(
        self,
        holder: str,
        *,
        weather: Weather,
        seams: Seams,
        places: dict[ProjectId, Place],
        bus: Bus,
        world: trio.Nursery,
    ) -> None:
        self.holder = holder
        self.link = link = Link(weather)
        # Dead, as far as anybody can see.
        self.over = trio.Event()
        self._requests: dict[int, Request] = {}
        self._nursery: trio.Nursery | None = None
        # Takes requests.
        self._is_open = False
        self._scope = trio.CancelScope()
        store = linked(seams.commands, link)
        log = linked(seams.output, link)
        backoff = weather.chance.backoff
        shape = weather.shape

        def tell(what: str, command: CommandId | None = None) -> None:
            bus.tell(self, what, command)

        self.fanout: Fanout = seams.fanout(
            log=log, tell_replicas=lambda command: tell("stream", command)
        )
        appender = seams.appender(log=log, publish=self.fanout.publish, backoff=backoff)
        assert isinstance(appender, Appender)
        self.queue = CommandQueue(
            lanes=linked(seams.lanes, link),
            leases=store,
            executor=Reach(places, link, world),
            appender=appender,
            log=log,
            telemetry=Silence(),
            backoff=backoff,
            announce=self.fanout.announce,
            wake_replicas=lambda: tell("queue"),
            holder=holder,
            lease_s=shape.lease_s,
            running_max=shape.running_max,
        )

        def reach_holder(command: CommandId) -> None:
            self.queue.cancel(command)
            tell("cancel", command)

        self.commands = Commands(
            store=store,
            log=log,
            gate=QueueGate(
                queue=linked(seams.depths, link),
                limits=DepthLimits(project_max=shape.project_max, server_max=1_000),
                telemetry=Silence(),
            ),
            fanout=self.fanout,
            wake_workers=self.queue.wake,
            reach_holder=reach_holder,
            new_uuid=weather.chance.uuid,
        )

    async def run(self, history: History) -> None:
        """To its end, whichever it is."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self._is_open = True
                    self._nursery.start_soon(self.fanout.run)
                    try:
                        await self.queue.run()
                    finally:
                        self._is_open = False
                    self._nursery.cancel_scope.cancel()
        except Exception as error:
            # What a dead server's tasks run into, nobody sees.
            if not self.link.is_cut:
                what = "; ".join(f"{type(leaf).__name__}: {leaf}" for leaf in _leaves(error))
                history.events.append(FellOver(trio.current_time(), self.holder, what))
        self.die()

    def die(self) -> None:
        """At once: nothing crosses its line any more."""
        self.link.is_cut = True
        self.link.resume()
        self.over.set()
        self._scope.cancel()
        for request in self._requests.values():
            request.failure = GoneError()
            request.done.set()

    def hear(self, what: str, command: CommandId | None) -> None:
        """A notification of another server; without a command: some may have been missed."""
        match what, command:
            case "queue", _:
                self.queue.wake()
            case "cancel", str():
                self.queue.cancel(command)
            case "stream", str():
                self.fanout.wake(command)
            case _:
                self.queue.wake()
                self.fanout.wake_all()

    async def ask(
        self, use_case: Callable[["Life"], Awaitable[object]], *, patience_s: float
    ) -> object:
        """A client's request. Errors: what the use case raises; GoneError."""
        if self.link.is_cut or not self._is_open or self._nursery is None:
            raise GoneError
        request = Request()
        self._requests[id(request)] = request
        self._nursery.start_soon(self._serve, request, use_case)
        try:
            with trio.move_on_after(patience_s):
                await request.done.wait()
        finally:
            del self._requests[id(request)]
            request.scope.cancel()
        if request.failure is not None:
            raise request.failure
        if not request.done.is_set():
            raise GoneError
        return request.answer

    async def _serve(
        self, request: Request, use_case: Callable[["Life"], Awaitable[object]]
    ) -> None:
        with request.scope:
            try:
                request.answer = await use_case(self)
            except RdevError as error:
                request.failure = error
            await self.link.cross()
            request.done.set()


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
