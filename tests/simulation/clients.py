"""Clients: they submit, repeat what was not answered, cancel, follow streams, and vanish.

Each request goes to some server, as through a load balancer.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import trio

from rdev.domain.commands import Kind, Priority, Retry
from rdev.domain.errors import RdevError
from rdev.domain.execution import Stream
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.requests import Common
from rdev.ports.commands import Accepted
from tests.fakes.store import ACTOR
from tests.simulation.chance import Chance, FaultKind, Shape
from tests.simulation.history import Answered, Awaited, Closed, History, Opened, Saw
from tests.simulation.link import Weather
from tests.simulation.places import Plan, Programs
from tests.simulation.servers import GoneError, Life
from tests.simulation.streams import Socket, follow, parse

PATIENCE_S = 10.0
FOR_EVER_S = 86_400.0
TEXTS = (
    b"one\n",
    b"two\nthree\n",
    b"half a line ",
    b"caf\xc3\xa9\n",
    b"\xff\x00\n",
    b"x" * 200 + b"\n",
    b"",
)


@dataclass(slots=True, kw_only=True)
class Client:
    """One client and its one command."""

    number: int
    weather: Weather
    history: History
    programs: Programs
    projects: list[ProjectId]
    lives: list[Life]
    connections: list[int]
    # Then its program may be one that ends in no other way.
    _will_cancel: bool = False

    async def run(self) -> None:
        """From its first request to the last event it wants to see."""
        chance = self.weather.chance
        await trio.sleep(chance.random() * self.weather.shape.arrival_s)
        async with trio.open_nursery() as nursery:
            command = await self._submit()
            if command is None:
                return
            if self._will_cancel:
                nursery.start_soon(self._cancel, command)
            match chance.integer(1, 10):
                case 1:
                    pass
                case 2:
                    await self._await_end(command)
                case _:
                    await self._follow(command)

    async def _submit(self) -> CommandId | None:
        """With a key: until it is answered. Without one: once, for a repeat would be another."""
        chance = self.weather.chance
        self._will_cancel = chance.odds(0.3)
        key = f"key-{self.number}" if self._will_cancel or chance.odds(0.8) else None
        use_case = self._submission(key)
        while True:
            command = await self._ask(use_case)
            if isinstance(command, str):
                self.history.events.append(Answered(trio.current_time(), self.number, key, command))
                return CommandId(command)
            if key is None:
                return None

    def _submission(self, key: str | None) -> Callable[[Life], Awaitable[object]]:
        chance, shape = self.weather.chance, self.weather.shape
        project = chance.one_of(self.projects)
        kind = chance.one_of((Kind.SHELL, Kind.SHELL, Kind.GIT))
        plan = draw_plan(chance, shape)
        if self._will_cancel and chance.odds(0.5):
            plan = replace(plan, steps=(*plan.steps, (FOR_EVER_S, Stream.STDOUT, b"")))
        argv = self.programs.add(plan)
        common = Common(
            env={},
            cwd="",
            stdin=b"",
            timeout_s=chance.one_of((1, 600, 600)),
            priority=chance.one_of((*Priority, Priority.NORMAL)),
            expires_in_s=chance.one_of((None, None, 2)),
            retry=chance.one_of((Retry.NEVER, Retry.NEVER, Retry.SAFE)),
        )
        digest = f"{self.number}".encode()
        idempotency = key and Idempotency(key_id="key_admin", key=key, digest=digest)

        async def submit(life: Life) -> object:
            accepted: Accepted = await life.commands.submit(
                ACTOR, project, kind, argv=argv, common=common, idempotency=idempotency or None
            )
            return accepted.command.id

        return submit

    async def _cancel(self, command: CommandId) -> None:
        """Until it is answered."""
        await trio.sleep(self.weather.chance.random() * 3)
        while await self._ask(lambda life: life.commands.cancel(ACTOR, command)) is None:
            pass

    async def _await_end(self, command: CommandId) -> None:
        """`?wait`, again and again."""

        async def wait(life: Life) -> object:
            found = await life.commands.ended(command, within_s=4.0)
            return found.status if found.status.is_terminal else None

        status = None
        while not isinstance(status, str):
            status = await self._ask(wait)
        self.history.events.append(Awaited(trio.current_time(), command, status))

    async def _follow(self, command: CommandId) -> None:
        """From any server, over cuts, to the last event."""
        after = 0
        while True:
            connection = self._connect(command, after)
            ended = await self._ask(
                connection.read, patience_s=self._stays_s(), at_end=connection.close
            )
            after = connection.last_seq
            if ended:
                return

    def _connect(self, command: CommandId, after: int) -> "Connection":
        self.connections[0] += 1
        return Connection(self.connections[0], command, after, self.history)

    def _stays_s(self) -> float:
        """How long until a client's stream is cut."""
        if self.weather.strikes(FaultKind.STREAM_CUT, 0.5):
            return self.weather.chance.random() * 2
        return float("inf")

    async def _ask(
        self,
        use_case: Callable[[Life], Awaitable[object]],
        *,
        patience_s: float | None = None,
        at_end: Callable[[], None] = lambda: None,
    ) -> object:
        """One request to some server; None where it was not answered well."""
        chance = self.weather.chance
        life = chance.one_of(self.lives)
        if patience_s is None:
            leaves = self.weather.strikes(FaultKind.CLIENT_GONE, 0.3)
            patience_s = chance.random() * 0.1 if leaves else PATIENCE_S
        try:
            answer = await life.ask(use_case, patience_s=patience_s)
        except (GoneError, RdevError):
            answer = None
        at_end()
        if answer is None:
            # A client that comes back at once would be a fault of its own.
            await trio.sleep(chance.uniform(0.1, 1.0))
        return answer


class Connection:
    """One stream of one client."""

    def __init__(self, number: int, command: CommandId, after: int, history: History) -> None:
        self.last_seq = after
        self._number = number
        self._command = command
        self._history = history
        self._is_open = False

    async def read(self, life: Life) -> object:
        """Run by a server: True where the stream's end was reached."""
        self._history.events.append(
            Opened(trio.current_time(), self._number, self._command, self.last_seq)
        )
        self._is_open = True

        socket = Socket(life.link, self._receive)
        ended = await follow(life.commands, life.fanout, self._command, self.last_seq, socket)
        return ended or None

    def close(self) -> None:
        """Nothing is seen any more."""
        if self._is_open:
            self._is_open = False
            self._history.events.append(Closed(trio.current_time(), self._number))

    def _receive(self, frames: bytes) -> None:
        now = trio.current_time()
        for seq, event, data in parse(frames) if self._is_open else ():
            self.last_seq = seq
            saw = Saw(now, self._number, self._command, seq, event, data)
            self._history.events.append(saw)


def draw_plan(chance: Chance, shape: Shape) -> Plan:
    """A process."""
    steps = tuple(
        (
            chance.random() * shape.program_s if chance.odds(0.5) else 0.0,
            chance.one_of((Stream.STDOUT, Stream.STDOUT, Stream.STDERR)),
            chance.one_of(TEXTS),
        )
        for _ in range(chance.integer(1, 4))
    )
    if chance.odds(0.01):
        # More than a reader's buffer, in lines longer than an event may be.
        steps = (*steps, (0.0, Stream.STDOUT, (b"y" * 20_000 + b"\n") * 20))
    return Plan(steps=steps, code=chance.one_of((0, 0, 0, 1, 3)))
