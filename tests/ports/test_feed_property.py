"""Whatever writers do, every reader of a feed sees every committed event once, in one order.

Real transactions that overlap, hold, abort and change the same commands in any order of their
numbers; two servers' hubs; readers that are cut at any moment and come back where they were.
"""

import re
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Self
from uuid import UUID

import msgspec
import pytest
import trio
from psycopg import AsyncConnection

from rdev.adapters.postgres.connection import open_connection
from rdev.adapters.postgres.feed import PostgresFeed
from rdev.domain.feed import START, Position, parse_cursor, position_of
from rdev.domain.ids import ProjectId, command_id
from rdev.services.feed import Feed
from rdev.services.stream import Frames, OfferEach, Signal
from tests.fakes.feed import KEPT_S
from tests.fakes.outlets import one_by_one
from tests.ports.conftest import Pools

WRITERS = 12
TRANSACTIONS = 2_400
COMMANDS = 25
READERS = 10
DEADLINE_S = 120.0
# After the last commit: so long nobody needs, unless something is missing for ever.
PATIENCE_S = 30.0
_FRAME = re.compile(rb"id: (\S+)\nevent: \w+\ndata: (.*)")

# What a statement that changes a command does (`sql/0009_events.sql`): the event is filed under the
# greater of its own transaction and that of the change before. `attempt` counts the changes.
CHANGE = """
with changed as (
    update chains
    set changes = changes + 1, changed_xid = greatest(pg_current_xact_id(), changed_xid)
    where id = %s
    returning *
)
insert into events (xid, type, project, command_id, kind, status, attempt)
select changed_xid, 'command.queued', project, id, 'shell', 'queued', changes from changed
"""
MAKE = """
create table chains (
    id uuid primary key, project text, changes integer not null default 0,
    changed_xid xid8 not null default pg_current_xact_id())
"""


@dataclass
class Reader:
    """What somebody saw over all its connections: the place, the command and its change."""

    seen: list[tuple[Position, str, int]] = field(default_factory=list)
    cuts: int = 0

    def together(self, outlets: Sequence[Self]) -> OfferEach:
        return one_by_one([outlet.offer for outlet in outlets])

    def offer(self, frames: Frames) -> bool:
        for frame in frames.data.split(b"\n\n"):
            if frame:
                match = _FRAME.fullmatch(frame)
                assert match is not None, frame
                place = parse_cursor(match[1].decode())
                assert place is not None
                data = msgspec.json.decode(match[2])
                self.seen.append((place, data["command_id"], data["attempt"]))
        return True

    async def follow(self, feed: Feed, projects: frozenset[ProjectId] | None) -> None:
        """One connection, from where it stood."""
        begin = self.seen[-1][0] if self.seen else START
        begin, head = await feed.start(begin)
        with feed.subscribe(projects, after=begin, head=head) as reader:
            while True:
                item = await reader.receive(self)
                if isinstance(item, Frames):
                    self.offer(item)
                assert item is not Signal.DISMISSED


@asynccontextmanager
async def running(pools: Pools) -> AsyncIterator[Feed]:
    """A server's hub that no notification reaches: only its poll tells it."""
    feed = Feed(log=PostgresFeed(pool=pools.requests, kept_s=KEPT_S), tell_replicas=lambda: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(feed.run)
        yield feed
        nursery.cancel_scope.cancel()


async def write(pools: Pools, hubs: list[Feed], random: Random, share: int) -> int:
    """Transactions one after the other; returns how many committed."""
    connection = await open_connection(pools.settings)
    committed = 0
    try:
        for _ in range(share):
            hold_s = random.choice([0, 0, 0, 0.002, 0.01]) if random.random() > 0.002 else 1.5
            aborts = random.random() < 0.15
            with trio.CancelScope():
                async with connection.transaction(force_rollback=aborts):
                    await _change(connection, random, hold_s)
            committed += not aborts
            if random.random() < 0.7:
                random.choice(hubs).wake()
    finally:
        await connection.close()
    return committed


async def _change(connection: AsyncConnection[object], random: Random, hold_s: float) -> None:
    """It has its number, and changes a command, sooner or later."""
    if random.random() < 0.5:
        await connection.execute("select pg_current_xact_id()")
        await trio.sleep(hold_s)
    await connection.execute(CHANGE, (UUID(int=random.randrange(COMMANDS)),))
    await trio.sleep(hold_s)


async def truth(pools: Pools) -> list[tuple[Position, str, int]]:
    async with pools.requests.connection() as connection:
        cursor = await connection.execute(
            "select xid::text::bigint, position, command_id, attempt from events"
            " order by xid, position"
        )
        return [
            (position_of(xid, position), command_id(command), attempt)
            for xid, position, command, attempt in await cursor.fetchall()
        ]


async def make_chains(pools: Pools) -> None:
    """Commands that writers change in turn."""
    async with pools.requests.connection() as connection:
        await connection.execute(MAKE)
        for number in range(COMMANDS):
            await connection.execute(
                "insert into chains (id, project) values (%s, %s)",
                (UUID(int=number), f"p{number % 3}"),
            )


async def read(reader: Reader, hubs: list[Feed], random: Random, *projects: str) -> None:
    """Follow one server or the other, and be cut at any moment."""
    seen = frozenset(ProjectId(project) for project in projects) or None
    while True:
        with trio.move_on_after(random.choice([0.01, 0.1, 1.0])):
            await reader.follow(random.choice(hubs), seen)
        reader.cuts += 1


@pytest.mark.slow
async def test_every_reader_sees_every_committed_event_once_and_in_order(pools: Pools) -> None:
    await make_chains(pools)
    everybody, of_p1 = [Reader() for _ in range(READERS)], Reader()
    committed: list[int] = []

    async def write_share(seed: int) -> None:
        committed.append(await write(pools, hubs, Random(seed), TRANSACTIONS // WRITERS))

    with trio.fail_after(DEADLINE_S):
        async with running(pools) as here, running(pools) as there, trio.open_nursery() as readers:
            hubs = [here, there]
            for number, reader in enumerate(everybody):
                readers.start_soon(read, reader, hubs, Random(number))
            readers.start_soon(read, of_p1, hubs, Random(99), "p1")
            async with trio.open_nursery() as writers:
                for seed in range(WRITERS):
                    writers.start_soon(write_share, seed)
            written = await truth(pools)
            in_p1 = [event for event in written if UUID(event[1][4:]).int % 3 == 1]
            wanted = {id(reader): written for reader in everybody} | {id(of_p1): in_p1}
            with trio.move_on_after(PATIENCE_S):
                while any(len(one.seen) < len(wanted[id(one)]) for one in (*everybody, of_p1)):
                    await trio.sleep(0.05)
            readers.cancel_scope.cancel()

    assert len(written) == sum(committed) > TRANSACTIONS * 0.7
    check_changes(written)
    for reader in everybody:
        assert reader.seen == written
        assert reader.cuts > 5
    assert of_p1.seen == in_p1


def check_changes(events: list[tuple[Position, str, int]]) -> None:
    """The changes of each command stand in the order in which they were made."""
    changes = defaultdict(list)
    for _, command, number in events:
        changes[command].append(number)
    for numbers in changes.values():
        assert numbers == list(range(1, len(numbers) + 1))
