"""No event without a change, no change without an event, and of each command in their order.

What only PostgreSQL can show: transactions that fail half-way, and numbers of transactions that are
not in the order in which those saw each other.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
import pytest
import trio

from rdev.adapters.postgres.connection import TrioConnection, open_connection
from rdev.domain.commands import Claimed, Kind, Outcome, Retry, Status
from rdev.domain.errors import RdevError
from rdev.domain.ids import CommandId, command_id
from rdev.ports.output import Append, AppendState
from tests.fakes.store import ACTOR
from tests.ports.conftest import (
    REACH,
    Pools,
    World,
    again_chunk,
    append_to,
    last_chunk,
    lines,
)
from tests.ports.test_lane_interleavings import inside
from tests.ports.witness import check_record, install

SUCCEEDED = Outcome(status=Status.SUCCEEDED, exit_code=0)
ENDS = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT, Status.LOST)

# As a feed reads: what is next below the oldest transaction that is still open.
NEXT = """
select xid::text::bigint, position, type, command_id
from events
where (xid, position) > (%s::text::xid8, %s) and xid < pg_snapshot_xmin(pg_current_snapshot())
  and command_id is not null
order by xid, position
"""


@dataclass(slots=True, kw_only=True)
class Reader:
    """A feed from the beginning."""

    pools: Pools
    at: tuple[int, int] = (0, 0)
    told: list[tuple[str, CommandId]] = field(default_factory=list)

    async def read(self) -> None:
        """What is to be read now."""
        async with self.pools.requests.connection() as connection:
            found = await (await connection.execute(NEXT, (str(self.at[0]), self.at[1]))).fetchall()
        for xid, position, type_, command in found:
            self.at = xid, position
            self.told.append((type_, command_id(command)))

    def of(self, command: CommandId) -> list[str]:
        """What it heard of one command."""
        return [type_ for type_, about in self.told if about == command]


# Each after something that a younger transaction did.
async def _claim(world: World, command: CommandId) -> None:
    await world.lanes.repair(reach=REACH)
    assert [one.lease.command for one in await world.claim()] == [command]


async def _cancel(world: World, command: CommandId) -> None:
    await world.commands.request_cancel(command, ACTOR)


async def _expire(world: World, command: CommandId) -> None:
    assert await world.lanes.expire(holder="one", limit=10) == [command]


LATER = {"started": _claim, "cancelled": _cancel, "expired": _expire}


async def _number(connection: TrioConnection) -> int:
    """Makes a transaction draw its number."""
    query = "select pg_current_xact_id()::text::bigint"
    row = await (await connection.execute(query)).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("what", LATER)
async def test_a_change_by_an_older_transaction_stands_behind_what_it_saw(
    real: World, pools: Pools, what: str
) -> None:
    """The older one draws its number, then an unrelated one, then the command is accepted."""
    await real.project()
    reader = Reader(pools=pools)
    async with (
        await open_connection(pools.settings) as older,
        await open_connection(pools.settings) as unrelated,
        unrelated.transaction(),
    ):
        async with older.transaction():
            first = await _number(older)
            between = await _number(unrelated)
            new = real.new(expires_in_s=0 if what == "expired" else None)
            await real.commands.insert(new)
            await reader.read()
            await LATER[what](inside(older, real), new.id)
        await reader.read()
        # The unrelated one holds back everything younger than itself, and only that.
        assert reader.of(new.id) == []
    await reader.read()
    assert reader.of(new.id) == ["command.queued", f"command.{what}"]
    async with pools.requests.connection() as connection:
        query = "select xid::text::bigint from events order by xid, position"
        found = [row[0] for row in await (await connection.execute(query)).fetchall()]
    assert first < between < found[0] == found[1]


async def test_an_end_by_an_older_transaction_stands_behind_the_claim(
    real: World, pools: Pools
) -> None:
    """Also behind a take-over that came between, which is no event."""
    await real.project()
    reader = Reader(pools=pools)
    async with (
        await open_connection(pools.settings) as older,
        await open_connection(pools.settings) as unrelated,
        unrelated.transaction(),
    ):
        async with older.transaction():
            await _number(older)
            await _number(unrelated)
            claimed = await real.running()
            taken = await real.taken_over(claimed)
            end = append_to(taken, last_chunk(SUCCEEDED), outcome=SUCCEEDED)
            await inside(older, real).output.append([end])
        await reader.read()
        assert reader.told == []
    await reader.read()
    command = claimed.lease.command
    assert reader.of(command) == ["command.queued", "command.started", "command.completed"]
    async with pools.requests.connection() as connection:
        query = "select action from audit_entries where target = %s order by xid, id"
        name = (str(command),)
        found = [row[0] for row in await (await connection.execute(query, name)).fetchall()]
    assert found == [
        "command.submitted",
        "command.started",
        "command.taken_over",
        "command.finished",
    ]


async def test_what_was_restored_into_another_cluster_is_told_in_order(
    real: World, pools: Pools
) -> None:
    """Its numbers are ahead of ours until the operator says so, as the page tells it."""
    claimed = await real.running()
    waiting = await real.queued()
    page = Path("docs/operations.md").read_text()
    [recipe] = [one for one in page.split("```") if one.startswith("sql\nupdate events")]
    async with pools.requests.connection() as connection:
        for table, column in (
            ("events", "xid"),
            ("commands", "changed_xid"),
            ("projects", "changed_xid"),
        ):
            await connection.execute(f"update {table} set {column} = '9000000000'")
        for statement in recipe.removeprefix("sql\n").strip().split(";")[:-1]:
            await connection.execute(statement)
    await real.output.append([append_to(claimed, last_chunk(SUCCEEDED), outcome=SUCCEEDED)])
    await real.claim()
    reader = Reader(pools=pools)
    await reader.read()
    assert reader.of(claimed.lease.command)[-1] == "command.completed"
    assert reader.of(waiting) == ["command.queued", "command.started"]


class InjectedError(Exception):
    """A transaction that is not to be committed."""


@dataclass(slots=True, kw_only=True)
class Storm:
    """Many writers on one database; what one of them does is in one transaction, which may fail."""

    real: World
    pools: Pools
    chance: random.Random
    reader: Reader
    names: list[str]
    known: list[CommandId] = field(default_factory=list)
    # Claimed and not ended, as far as is known here.
    running: list[Claimed] = field(default_factory=list)
    failed: int = 0
    acting: int = 0

    async def submit(self, world: World) -> Callable[[], None]:
        """Some commands, of which some expire at once and some may run again."""
        made = []
        for _ in range(8):
            kind = self.chance.choice((Kind.SHELL, Kind.GIT))
            expires_in_s = 0 if self.chance.random() < 0.1 else None
            name = self.chance.choice(self.names)
            retry = self.chance.choice(tuple(Retry))
            new = world.new(name, kind=kind, expires_in_s=expires_in_s, retry=retry)
            await world.commands.insert(new)
            made.append(new.id)
        return lambda: self.known.extend(made)

    async def claim(self, world: World) -> Callable[[], None]:
        """What is due."""
        await world.lanes.repair(reach=REACH)
        found = await world.lanes.claim(reach=REACH, instance="boot-1", holder="one", limit=80)
        return lambda: self.running.extend(found.claimed)

    async def take_over(self, world: World) -> Callable[[], None]:
        """After some leases were given back."""
        mine = self._some(4)
        await world.leases.release([one.lease for one in mine])
        found = await world.leases.take_over(reach=REACH, holder="two", limit=10)
        return lambda: self.running.extend(found)

    async def append(self, world: World) -> Callable[[], None]:
        """Some end, some are queued again, some go on."""
        mine = self._some(80)
        batch = [self._append(one) for one in mine]
        results = await world.output.append(batch) if batch else []
        done = {
            one.lease
            for one, result in zip(mine, results, strict=True)
            if result.state not in (AppendState.LOCKED, AppendState.REFUSED)
        }
        going_on = [
            replace(one, offsets=append.end, last_seq=one.last_seq + 1)
            for one, append, result in zip(mine, batch, results, strict=True)
            if append.outcome is None and result.state is AppendState.APPLIED
        ]

        def settle() -> None:
            self.running = [one for one in self.running if one.lease not in done] + going_on

        return settle

    async def cancel(self, world: World) -> Callable[[], None]:
        """Whatever has become of it."""
        for command in self.chance.sample(self.known, min(3, len(self.known))):
            await world.commands.request_cancel(command, ACTOR)
        return lambda: None

    async def expire(self, world: World) -> Callable[[], None]:
        """What is late."""
        await world.lanes.expire(holder="one", limit=10)
        return lambda: None

    def _some(self, most: int) -> list[Claimed]:
        """Of what runs; one for each command."""
        mine = {one.lease.command: one for one in self.running}
        return self.chance.sample(list(mine.values()), min(most, len(mine)))

    def _append(self, one: Claimed) -> Append:
        what = self.chance.random()
        if what < 0.1:
            return append_to(one, lines(1))
        if what < 0.3:
            outcome = Outcome(status=Status.QUEUED, reason="supervisor_gone")
            return append_to(one, lines(1), again_chunk(one.attempt), outcome=outcome)
        outcome = Outcome(status=self.chance.choice(ENDS))
        return append_to(one, lines(2), last_chunk(outcome), outcome=outcome)

    async def act(self, steps: int) -> None:
        """One writer."""
        operations = (self.submit, self.submit, self.claim, self.append, self.append)
        rare = (self.take_over, self.cancel, self.expire)
        connection = await open_connection(self.pools.settings)
        for _ in range(steps):
            operation = self.chance.choice(rare if self.chance.random() < 0.2 else operations)
            try:
                await self._transact(connection, operation)
            except (InjectedError, psycopg.errors.QueryCanceled):
                self.failed += 1
            except (psycopg.OperationalError, RdevError):
                self.failed += 1
                if connection.closed or connection.broken:
                    connection = await open_connection(self.pools.settings)
        await connection.close()
        self.acting -= 1

    async def follow(self) -> None:
        """The feed, as long as somebody writes."""
        while self.acting:
            await self.reader.read()

    async def _transact(
        self,
        connection: TrioConnection,
        operation: Callable[[World], Awaitable[Callable[[], None]]],
    ) -> None:
        """One in ten is rolled back, one in fifty loses its server before the commit, one in
        twenty is stopped somewhere inside."""
        fate = self.chance.random()
        async with connection.transaction():
            if fate < 0.05:
                limit_ms = self.chance.randrange(1, 8)
                await connection.execute(f"set local statement_timeout = {limit_ms}")
            settle = await operation(inside(connection, self.real))
            if fate > 0.9:
                raise InjectedError
            if fate > 0.88:
                async with self.pools.requests.connection() as other:
                    pid = connection.info.backend_pid
                    await other.execute("select pg_terminate_backend(%s, 5000)", (pid,))
        settle()


@pytest.mark.slow
async def test_the_record_is_what_happened_whatever_fails(real: World, pools: Pools) -> None:
    """Ten thousand changes by four writers, beside a reader whose order must be every command's."""
    await install(pools)
    storm = Storm(
        real=real,
        pools=pools,
        chance=random.Random(11),
        reader=Reader(pools=pools),
        names=[f"project-{number}" for number in range(60)],
    )
    for name in storm.names:
        await real.project(name)
    changes = 0
    with trio.fail_after(110):
        while changes < 10_000:
            async with trio.open_nursery() as nursery:
                storm.acting = 4
                for _ in range(storm.acting):
                    nursery.start_soon(storm.act, 150)
                nursery.start_soon(storm.follow)
            changes = await check_record(pools)
    await storm.reader.read()
    async with pools.requests.connection() as connection:
        query = "select command_id, array_agg(type order by seq) from events group by 1"
        lives = await (await connection.execute(query)).fetchall()
    heard: dict[CommandId, list[str]] = {}
    for type_, command in storm.reader.told:
        heard.setdefault(command, []).append(type_)
    assert heard == {command_id(command): types for command, types in lives}
    assert storm.failed > 100
    print(f"{changes} changes, {storm.failed} failed transactions")
