"""rdev's queue in this process, as `app.py` builds it, over an executor that runs nothing.

Real: PostgreSQL adapters, notifier, listener, fan-out, appender, queue, submissions. Not there:
HTTP and processes. What is measured on the way is the time of each claim statement.
"""

import os
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio
import uuid_utils.compat

from rdev import interpreter
from rdev.adapters.postgres.commands import PostgresCommands
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.depths import PostgresDepths
from rdev.adapters.postgres.lanes import PostgresLanes
from rdev.adapters.postgres.leases import PostgresLeases
from rdev.adapters.postgres.listen import Listener
from rdev.adapters.postgres.notifier import QUEUE_CHANNEL, STREAM_CHANNEL, Notifier
from rdev.adapters.postgres.output import PostgresOutput
from rdev.adapters.postgres.pool import open_dedicated, open_pool
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.domain.audit import Actor
from rdev.domain.backoff import Backoff
from rdev.domain.commands import Kind, Priority, Retry
from rdev.domain.depths import DepthLimits
from rdev.domain.execution import Exit, KillReport, Lost, Offsets, Piece, Spec
from rdev.domain.ids import AttemptId, CommandId, ProjectId, command_of
from rdev.domain.lanes import Lane
from rdev.domain.requests import Common
from rdev.ports.commands import Claims
from rdev.services.appender import Appender
from rdev.services.commands import Commands
from rdev.services.depths import QueueGate
from rdev.services.queue import CommandQueue
from rdev.services.stream import Fanout

REACH = "bench:here"
INSTANCE = "bench"
# `git` shares its lane with `claude`: one command of a project at a time.
KIND = Kind.GIT
# The defaults of the settings.
POOL_MAX = 12
RUNNING_MAX = 64
LEASE_S = 30.0
DEPTH_MAX = 10_000_000
CALLER = Actor(key_id="bench", key_name="bench", ip="127.0.0.1", request_id="bench")
COMMON = Common(
    env={}, cwd="", stdin=b"", timeout_s=60, priority=Priority.NORMAL, expires_in_s=None,
    retry=Retry.NEVER,
)  # fmt: skip

_EXIT = Exit(exit_code=0, signal=None, why=None, stdout_bytes=0, stderr_bytes=0, runtime_ms=0)


class _Attachment:
    """A command that takes `takes_s`, says nothing and succeeds."""

    def __init__(self, takes_s: float) -> None:
        self._takes_s = takes_s

    async def receive(self) -> Piece | Exit | Lost:
        if self._takes_s:
            await trio.sleep(self._takes_s)
        else:
            await trio.lowlevel.checkpoint()
        return _EXIT


@dataclass(slots=True, kw_only=True)
class NoopExecutor:
    """The `Executor` port without processes. `started` is told of each start."""

    takes_s: Callable[[ProjectId], float] = lambda _: 0.0
    started: Callable[[ProjectId, CommandId], None] = lambda _, __: None
    reach: str = REACH
    standing_instance: str | None = INSTANCE

    async def prepare(self, project: ProjectId) -> None:
        """Nothing to make."""

    async def instance(self, project: ProjectId) -> str:
        """Always the same."""
        return INSTANCE

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        attempt: AttemptId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator[_Attachment]:
        """Start what there is to start."""
        self.started(project, command_of(attempt))
        yield _Attachment(self.takes_s(project))

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        """Nothing runs."""
        return KillReport(confirmed=True)

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[AttemptId]:
        """Nothing is there."""
        return []

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        """Nothing is there."""


class TimedLanes(PostgresLanes):
    """Knows how long each claim statement took and what it brought."""

    def __init__(self, **given: object) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self.claims_ms: list[float] = []
        self.claims_found: list[int] = []

    async def claim(
        self,
        *,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        touched: Collection[Lane] = (),
        closed: Collection[ProjectId] = (),
    ) -> Claims:
        """See `Lanes.claim`."""
        began = time.perf_counter()
        found = await super().claim(
            reach=reach,
            instance=instance,
            holder=holder,
            limit=limit,
            touched=touched,
            closed=closed,
        )
        self.claims_ms.append((time.perf_counter() - began) * 1e3)
        self.claims_found.append(len(found.claimed))
        return found

    def forget(self) -> None:
        """Begin again."""
        self.claims_ms.clear()
        self.claims_found.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """What runs."""

    queue: CommandQueue
    appender: Appender
    lanes: TimedLanes
    commands: Commands
    nursery: trio.Nursery = field(repr=False)

    async def submit(self, project: ProjectId) -> CommandId:
        """Accept one command, as a request does."""
        accepted = await self.commands.submit(
            CALLER, project, KIND, argv=("git", "status"), common=COMMON
        )
        return accepted.command.id

    async def until_finished(self, count: int, within_s: float = 120.0) -> None:
        """Wait until so many commands have ended here."""
        with trio.fail_after(within_s):
            while self.queue.statistics().finished < count:
                await trio.sleep(0.005)


@asynccontextmanager
async def open_rig(
    dsn: str, executor: NoopExecutor, *, running_max: int = RUNNING_MAX
) -> AsyncIterator[Rig]:
    """The services on a migrated database, running; stopped at the end of the block."""
    settings = ConnectionSettings(dsn=dsn)
    async with AsyncExitStack() as stack:
        requests = await stack.enter_async_context(open_pool(settings, max_size=POOL_MAX))
        heartbeats = await stack.enter_async_context(
            open_dedicated(settings, "heartbeat", by_key=True)
        )
        appends = await stack.enter_async_context(open_dedicated(settings, "append", by_key=True))
        claims = await stack.enter_async_context(open_dedicated(settings, "claim"))
        notifier = Notifier(pool=requests, server="bench")
        log = PostgresOutput(pool=requests, appends=appends)
        fanout = Fanout(log=log, tell_replicas=notifier.stream_changed)
        appender = Appender(log=log, publish=fanout.publish, backoff=_backoff)
        lanes = TimedLanes(pool=claims, lease_s=LEASE_S)
        queue = CommandQueue(
            lanes=lanes,
            leases=PostgresLeases(pool=requests, heartbeats=heartbeats, lease_s=LEASE_S),
            executor=executor,
            appender=appender,
            log=log,
            telemetry=PrometheusTelemetry(),
            backoff=_backoff,
            announce=fanout.announce,
            wake_replicas=notifier.queue_changed,
            holder=f"bench-{os.getpid()}",
            lease_s=LEASE_S,
            running_max=running_max,
        )
        telemetry = PrometheusTelemetry()
        limits = DepthLimits(project_max=DEPTH_MAX, server_max=DEPTH_MAX)
        gate = QueueGate(queue=PostgresDepths(pool=requests), limits=limits, telemetry=telemetry)
        commands = Commands(
            store=PostgresCommands(pool=requests),
            log=log,
            gate=gate,
            fanout=fanout,
            wake_workers=queue.wake,
            reach_holder=queue.cancel,
            new_uuid=uuid_utils.compat.uuid7,
        )
        listener = Listener(
            settings,
            {
                QUEUE_CHANNEL: notifier.heard(lambda _: queue.wake()),
                STREAM_CHANNEL: notifier.heard(fanout.wake_each),
            },
            on_connect=queue.wake,
        )
        async with trio.open_nursery() as nursery:
            for subsystem in (notifier, listener, queue):
                await nursery.start(subsystem.run)
            interpreter.calm()
            yield Rig(
                queue=queue, appender=appender, lanes=lanes, commands=commands, nursery=nursery
            )
            for subsystem in (queue, listener, notifier):
                subsystem.stop()


def _backoff() -> Backoff:
    return Backoff(random=random.random)
