"""One world of stores per test: the fakes, and the same ports on a PostgreSQL of the test's own."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from uuid import UUID

import pytest

from rdev.adapters.postgres.commands import PostgresCommands
from rdev.adapters.postgres.connection import ConnectionSettings, open_connection
from rdev.adapters.postgres.depths import PostgresDepths
from rdev.adapters.postgres.lanes import PostgresLanes
from rdev.adapters.postgres.leases import PostgresLeases
from rdev.adapters.postgres.output import PostgresOutput
from rdev.adapters.postgres.pool import Pool, open_dedicated, open_pool
from rdev.adapters.postgres.projects import PostgresProjects
from rdev.adapters.postgres.upkeep import PostgresUpkeep
from rdev.domain.commands import (
    LANE_CLASS,
    Claimed,
    Kind,
    NewCommand,
    Outcome,
    Priority,
    Retry,
    Status,
)
from rdev.domain.execution import LostReason, Offsets, Spec
from rdev.domain.ids import CommandId, ProjectId, command_id, command_uuid
from rdev.domain.lanes import Lane
from rdev.domain.projects import ProjectDefinition
from rdev.domain.stream import Chunk, Source, final_lines, status_line
from rdev.ports.commands import CommandStore, Lanes, Leases
from rdev.ports.depths import QueueDepths
from rdev.ports.output import Append, NewChunk, OutputLog
from rdev.ports.projects import ProjectStore
from rdev.ports.upkeep import Upkeep
from tests.fakes.commands import FakeCommands
from tests.fakes.depths import FakeDepths
from tests.fakes.lanes import FakeLanes
from tests.fakes.output import FakeOutput
from tests.fakes.projects import FakeProjects
from tests.fakes.record import Entry, Event, Record
from tests.fakes.store import ACTOR, StoreState
from tests.fakes.upkeep import FakeUpkeep

REACH = "local:machine:/projects"
LEASE_S = 600.0
PROJECT = ProjectId("demo")
_AGE = (
    "update events set at = at - make_interval(secs => %(seconds)s)",
    "update idempotency_keys set made_at = made_at - make_interval(secs => %(seconds)s)",
    """
    update commands
    set created_at = created_at - make_interval(secs => %(seconds)s),
        started_at = started_at - make_interval(secs => %(seconds)s),
        finished_at = finished_at - make_interval(secs => %(seconds)s)
    """,
)
_EVENTS = """
select type, command_id, status, attempt, seq, detail
from events
where command_id is not null
order by xid, position
"""
_ENTRIES = """
select actor, actor_name, action, target
from audit_entries
where action like 'command.%'
order by xid, id
"""
LINE = b'{"stream":"stdout","line":"%d"}'


@dataclass(slots=True, kw_only=True)
class World:
    """The ports of one store, and the steps that tests have in common."""

    commands: CommandStore
    lanes: Lanes
    leases: Leases
    output: OutputLog
    projects: ProjectStore
    depths: QueueDepths
    upkeep: Upkeep
    # That of another server on the same store.
    other_upkeep: Callable[[], Upkeep]
    # Make all that is stored so many seconds older.
    age: Callable[[float], Awaitable[None]]
    # What was recorded of changes, in order.
    record: Callable[[], Awaitable[Record]]
    # Lock a command's row from another connection.
    hold: Callable[[CommandId], AbstractAsyncContextManager[None]]
    serial: Iterator[int] = field(default_factory=lambda: count(1))

    async def project(self, name: str = PROJECT, reach: str = REACH) -> None:
        """A project to submit to."""
        definition = ProjectDefinition(id=ProjectId(name))
        await self.projects.insert(definition, ACTOR, executor="local", reach=reach)

    def new(
        self,
        project: str = PROJECT,
        *,
        kind: Kind = Kind.SHELL,
        priority: Priority = Priority.NORMAL,
        expires_in_s: int | None = None,
        retry: Retry = Retry.NEVER,
    ) -> NewCommand:
        """A command with an id greater than all before."""
        serial = next(self.serial)
        argv = ("sh", "-c", f"echo {serial}")
        return NewCommand(
            id=command_id(UUID(int=(0x0199_0000_0000_7000 + serial) << 64 | serial)),
            project=ProjectId(project),
            kind=kind,
            spec=Spec(argv=argv, env={"A": "b"}, stdin=b"\0in", timeout_s=60),
            argv=argv,
            priority=priority,
            retry=retry,
            expires_in_s=expires_in_s,
            actor=ACTOR,
        )

    async def queued(
        self,
        project: str = PROJECT,
        *,
        kind: Kind = Kind.SHELL,
        priority: Priority = Priority.NORMAL,
        expires_in_s: int | None = None,
    ) -> CommandId:
        """Accept a command, and touch its lane as the service does."""
        new = self.new(project, kind=kind, priority=priority, expires_in_s=expires_in_s)
        await self.commands.insert(new)
        await self.lanes.touch([Lane(project=new.project, lane_class=LANE_CLASS[kind])])
        return new.id

    async def claim(
        self, limit: int = 100, *, reach: str = REACH, holder: str = "one"
    ) -> list[Claimed]:
        """Take over, then claim, as a server would: again and again until there is nothing more."""
        claimed = await self.leases.take_over(reach=reach, holder=holder, limit=limit)
        while len(claimed) < limit:
            found = await self.lanes.claim(
                reach=reach, instance="boot-1", holder=holder, limit=limit - len(claimed)
            )
            claimed += found.claimed
            if not found.claimed and not found.expired:
                break
        return claimed

    async def running(self, kind: Kind = Kind.SHELL) -> Claimed:
        """A running command of a project that is made where needed."""
        await self.project()
        command = await self.queued(kind=kind)
        return next(one for one in await self.claim() if one.lease.command == command)

    async def taken_over(self, claimed: Claimed) -> Claimed:
        """The same command under another server's lease."""
        await self.leases.release([claimed.lease])
        taken = await self.claim(holder="two")
        return next(one for one in taken if one.lease.command == claimed.lease.command)

    async def log(self, command: CommandId) -> list[Chunk]:
        """The whole log, read page by page."""
        chunks: list[Chunk] = []
        while page := await self.output.read(
            command, after=chunks[-1].last_seq if chunks else 0, limit_bytes=1_000
        ):
            chunks += page
        return chunks


def lines(events: int, *, raw_bytes: int | None = None, source: Source = Source.STDOUT) -> NewChunk:
    """Output events; ten raw bytes each unless told."""
    payload = b"\n".join([LINE % number for number in range(events)])
    raw_bytes = 10 * events if raw_bytes is None else raw_bytes
    return NewChunk(source=source, events=events, raw_bytes=raw_bytes, payload=payload)


def append_to(
    claimed: Claimed,
    *chunks: NewChunk,
    outcome: Outcome | None = None,
    start: Offsets | None = None,
    start_seq: int | None = None,
) -> Append:
    """An append that begins where the claim said, or where told; its end follows."""
    start = claimed.offsets if start is None else start
    moved = {
        source: sum(chunk.raw_bytes for chunk in chunks if chunk.source is source)
        for source in Source
    }
    end = Offsets(
        stdout=start.stdout + moved[Source.STDOUT], stderr=start.stderr + moved[Source.STDERR]
    )
    return Append(
        lease=claimed.lease,
        start=start,
        start_seq=claimed.last_seq if start_seq is None else start_seq,
        end=end,
        chunks=chunks,
        outcome=outcome,
    )


def following(append: Append, *chunks: NewChunk, outcome: Outcome | None = None) -> Append:
    """The append that continues where another one ends."""
    seq = append.start_seq + sum(chunk.events for chunk in append.chunks)
    moved = {
        source: sum(chunk.raw_bytes for chunk in chunks if chunk.source is source)
        for source in Source
    }
    end = Offsets(
        stdout=append.end.stdout + moved[Source.STDOUT],
        stderr=append.end.stderr + moved[Source.STDERR],
    )
    return Append(
        lease=append.lease,
        start=append.end,
        start_seq=seq,
        end=end,
        chunks=chunks,
        outcome=outcome,
    )


def again_chunk(attempt: int = 1) -> NewChunk:
    """The event with which an attempt ends that another one is to follow."""
    payload = status_line(Status.QUEUED, attempt=attempt, reason=LostReason.SUPERVISOR_GONE)
    return NewChunk(source=Source.LIFE, events=1, raw_bytes=0, payload=payload)


def last_chunk(outcome: Outcome) -> NewChunk:
    """The events that end a command."""
    payload = final_lines(outcome, attempt=1, truncated=False, stdout_bytes=0, stderr_bytes=0)
    return NewChunk(source=Source.LIFE, events=2, raw_bytes=0, payload=payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """What a server has towards one database."""

    settings: ConnectionSettings
    requests: Pool
    heartbeats: Pool
    appends: Pool
    housekeeping: Pool


@pytest.fixture
async def pools(migrated_dsn: str) -> AsyncIterator[Pools]:
    """Pools as the server has them, on a database of the test's own."""
    settings = ConnectionSettings(dsn=migrated_dsn, statement_timeout_ms=60_000)
    async with AsyncExitStack() as stack:
        yield Pools(
            settings=settings,
            requests=await stack.enter_async_context(open_pool(settings, wait_s=60.0)),
            heartbeats=await stack.enter_async_context(
                open_dedicated(settings, "heartbeat", by_key=True, wait_s=60.0)
            ),
            appends=await stack.enter_async_context(
                open_dedicated(settings, "append", by_key=True, wait_s=60.0)
            ),
            housekeeping=await stack.enter_async_context(
                open_dedicated(settings, "housekeeping", wait_s=60.0)
            ),
        )


async def stored_record(pools: Pools) -> Record:
    """What the tables say of commands."""
    async with pools.requests.connection() as connection:
        events = await connection.execute(_EVENTS)
        entries = await connection.execute(_ENTRIES)
        return Record(
            events=[
                Event(
                    type=type_,
                    command=command_id(command),
                    status=Status(status),
                    attempt=attempt,
                    seq=seq,
                    detail=detail,
                )
                for type_, command, status, attempt, seq, detail in await events.fetchall()
            ],
            entries=[
                Entry(actor=actor, actor_name=name, action=action, target=target)
                for actor, name, action, target in await entries.fetchall()
            ],
        )


def postgres_world(pools: Pools) -> World:
    """The ports on PostgreSQL."""

    @asynccontextmanager
    async def hold(command: CommandId) -> AsyncIterator[None]:
        connection = await open_connection(pools.settings)
        try:
            async with connection.transaction():
                await connection.execute(
                    "select 1 from commands where id = %s for update", (command_uuid(command),)
                )
                yield
        finally:
            await connection.close()

    async def age(seconds: float) -> None:
        async with pools.requests.connection() as connection:
            for statement in _AGE:
                await connection.execute(statement, {"seconds": seconds})

    return World(
        commands=PostgresCommands(pool=pools.requests),
        lanes=PostgresLanes(pool=pools.requests, lease_s=LEASE_S),
        leases=PostgresLeases(pool=pools.requests, heartbeats=pools.heartbeats, lease_s=LEASE_S),
        output=PostgresOutput(pool=pools.requests, appends=pools.appends),
        projects=PostgresProjects(pool=pools.requests),
        depths=PostgresDepths(pool=pools.requests),
        upkeep=PostgresUpkeep(pool=pools.housekeeping, holder="keeper"),
        other_upkeep=lambda: PostgresUpkeep(pool=pools.requests, holder="two"),
        age=age,
        record=lambda: stored_record(pools),
        hold=hold,
    )


def fake_world_on(state: StoreState) -> World:
    """The ports in memory."""

    @asynccontextmanager
    async def hold(command: CommandId) -> AsyncIterator[None]:
        with state.hold(command):
            yield

    async def age(seconds: float) -> None:
        state.age(seconds)

    async def record() -> Record:
        return state.record

    commands = FakeCommands(state, lease_s=LEASE_S)
    upkeep = FakeUpkeep(state)
    return World(
        commands=commands,
        lanes=FakeLanes(state, lease_s=LEASE_S),
        leases=commands,
        output=FakeOutput(state),
        projects=FakeProjects(state),
        depths=FakeDepths(state),
        upkeep=upkeep,
        other_upkeep=lambda: upkeep,
        age=age,
        record=record,
        hold=hold,
    )


@pytest.fixture
async def real(pools: Pools) -> World:
    """The ports on PostgreSQL, for what only it can show."""
    return postgres_world(pools)


@pytest.fixture(params=["fake", "postgres"])
def world(request: pytest.FixtureRequest) -> World:
    """The ports, once in memory and once on PostgreSQL."""
    if request.param == "fake":
        return fake_world_on(StoreState())
    return request.getfixturevalue("real")
