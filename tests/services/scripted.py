"""A server's services on the fakes, and the programs that tests let them run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.commands import Claimed, Kind, NewCommand, Priority, Retry, Status
from rdev.domain.depths import DepthLimits
from rdev.domain.execution import Spec
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.projects import ProjectDefinition
from rdev.domain.stream import Chunk
from rdev.ports.depths import QueueDepths
from rdev.ports.telemetry import Silence
from rdev.services.appender import Appender
from rdev.services.attempts import Attempt
from rdev.services.depths import QueueGate
from rdev.services.guarded_executor import GuardedExecutor
from rdev.services.queue import CommandQueue
from rdev.services.stream import Fanout
from tests.fakes.commands import FakeCommands
from tests.fakes.executor import FakeExecutor, FakeRun, Program
from tests.fakes.lanes import FakeLanes
from tests.fakes.output import FakeOutput
from tests.fakes.projects import FakeProjects
from tests.fakes.store import ACTOR, StoreState

PROJECT = ProjectId("demo")
LEASE_S = 30.0


def backoff() -> Backoff:
    """Pauses without chance."""
    return Backoff(random=lambda: 0.5)


def gate_of(queue: QueueDepths) -> QueueGate:
    """A gate that lets everything in."""
    limits = DepthLimits(project_max=10**6, server_max=10**6)
    return QueueGate(queue=queue, limits=limits, telemetry=Silence())


async def quick(run: FakeRun) -> int:
    """Say one line."""
    await trio.lowlevel.checkpoint()
    run.write(b"hello\n")
    return 0


async def forever(run: FakeRun) -> int:
    """Say that it began, then run until it is killed."""
    run.write(b"begun\n")
    await trio.sleep_forever()
    return 0


PROGRAMS: Mapping[str, Program] = {"quick": quick, "forever": forever}


class Place(FakeExecutor):
    """Projects whose instance is known beforehand where `standing_instance` says so."""

    standing_instance: str | None = None


@dataclass(slots=True, kw_only=True)
class Server:
    """The services of one process. Several may share a store and a place."""

    state: StoreState
    place: Place
    holder: str = "one"
    running_max: int = 64
    # Breakers around the place, where the test is about those.
    guard: GuardedExecutor | None = None
    store: FakeCommands = field(init=False)
    lanes: FakeLanes = field(init=False)
    log: FakeOutput = field(init=False)
    fanout: Fanout = field(init=False)
    appender: Appender = field(init=False)
    queue: CommandQueue = field(init=False)
    # Everything that was published and announced here, in order.
    published: list[Chunk] = field(default_factory=list)
    announced: list[CommandId] = field(default_factory=list)
    told: list[CommandId] = field(default_factory=list)
    # The queues of the other processes, as far as a notification reaches them.
    replicas: list[CommandQueue] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Build what the composition root builds."""
        self.store = FakeCommands(self.state, lease_s=LEASE_S)
        self.lanes = FakeLanes(self.state, lease_s=LEASE_S)
        self.log = FakeOutput(self.state)
        self.fanout = Fanout(log=self.log, tell_replicas=self.told.append)
        self.appender = Appender(log=self.log, publish=self._publish, backoff=backoff)
        self.queue = CommandQueue(
            lanes=self.lanes,
            leases=self.store,
            executor=self.guard or self.place,
            appender=self.appender,
            log=self.log,
            telemetry=Silence(),
            backoff=backoff,
            announce=self._announce,
            wake_replicas=self._wake_replicas,
            holder=self.holder,
            lease_s=LEASE_S,
            running_max=self.running_max,
            left_alone=self.guard.left_alone if self.guard else tuple,
        )

    def attempt(self, claimed: Claimed) -> Attempt:
        """An attempt as the queue makes it."""
        return Attempt(
            claimed=claimed,
            writer=self.appender.open(claimed),
            executor=self.place,
            leases=self.store,
            log=self.log,
            backoff=backoff,
        )

    async def claim(self) -> list[Claimed]:
        """What the queue would take over and claim at a tick."""
        reach = self.place.reach
        claimed = await self.store.take_over(reach=reach, holder=self.holder, limit=100)
        await self.lanes.repair(reach=reach)
        instance = self.place.standing_instance
        while True:
            found = await self.lanes.claim(
                reach=reach, instance=instance, holder=self.holder, limit=100
            )
            if not found.claimed and not found.expired:
                return claimed
            claimed += found.claimed

    async def ended(self, command: CommandId) -> Status:
        """Wait for the end of a command, in the clock's time."""
        with trio.fail_after(3_600):
            while not self.state.rows[command].command.status.is_terminal:
                await trio.sleep(0.01)
        return self.state.rows[command].command.status

    def payload(self, command: CommandId) -> bytes:
        """All stored events of a command, a line each."""
        return b"\n".join([chunk.payload for chunk in self.state.chunks[command]])

    def _publish(self, chunk: Chunk) -> None:
        self.published.append(chunk)
        self.fanout.publish(chunk)

    def _wake_replicas(self) -> None:
        for queue in self.replicas:
            queue.wake()

    def _announce(self, command: CommandId) -> None:
        self.announced.append(command)
        self.fanout.announce(command)


async def make_project(server: Server, name: str = PROJECT) -> None:
    """A project in the store and in the place."""
    definition = ProjectDefinition(id=ProjectId(name))
    await server.place.prepare(definition.id)
    projects = FakeProjects(server.state)
    await projects.insert(definition, ACTOR, executor="fake", reach=server.place.reach)


async def submit(
    server: Server,
    program: str,
    *,
    project: str = PROJECT,
    kind: Kind = Kind.SHELL,
    expires_in_s: int | None = None,
    timeout_s: int = 86_400,
    retry: Retry = Retry.NEVER,
) -> CommandId:
    """Queue a program; nobody is told."""
    serial = len(server.state.rows) + 1
    new = NewCommand(
        id=command_id(UUID(int=serial)),
        project=ProjectId(project),
        kind=kind,
        spec=Spec(argv=(program,), timeout_s=timeout_s),
        argv=(program,),
        priority=Priority.NORMAL,
        retry=retry,
        expires_in_s=expires_in_s,
        actor=ACTOR,
    )
    return (await server.store.insert(new)).command.id
