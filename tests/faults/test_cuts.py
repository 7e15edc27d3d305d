"""Clients that are cut ten thousand times see every byte of the journals, each once.

Two servers on one database and one projects folder; they are killed, stopped, frozen and started
again while commands write in every manner; clients are cut at random bytes and come back to one
server or the other; output goes over what is kept, and old output is pruned.

It bites. What the short run found when a guard was taken away, once each:

| broken on purpose | found |
|---|---|
| resume at the number before the one that was asked for | 148 events twice |
| join in the middle of a chunk of the tail | 12,875 lost |
| after the log, stand where the tail ends | 2,518 lost |
| forget what a socket did not take | the wire ends inside an event, 5 times |

`RDEV_TEST_SEED` repeats the drawing (not an interleaving). The ledger is printed at the end.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import httpx2
import psycopg
import pytest
import trio

from tests.app.server import Server, open_state
from tests.faults import cut_writer
from tests.faults.cut_reader import Client, CutTally, Replica
from tests.faults.cut_truth import Seen, Truth

SEED = int(os.environ.get("RDEV_TEST_SEED", str(random.randrange(1 << 30))))
WRITER = Path(cut_writer.__file__)
PROJECTS = ("p1", "p2", "p3")
POLL_S = 0.02
PATIENCE_S = 60.0
LEASE_S = 2.0
SETTINGS = {
    "RDEV_LEASE_S": f"{LEASE_S:g}",
    "RDEV_DRAIN_DELAY_S": "0",
    "RDEV_GRACE_S": "2",
    "RDEV_RETENTION_DAYS": "1",
    "RDEV_STREAM_BUFFER_BYTES": "16384",
    "RDEV_RATE_LIMIT_ADDRESS": "off",
    "RDEV_LOG_LEVEL": "warn",
}
# What nights do to a command that has ended: its output is of a day of its own, long ago. The
# housekeeper drops that day a moment later.
MAKE_OLD = """
create table if not exists output_{day:%Y%m%d} partition of output
    for values from ('{day}') to ('{day}'::date + 1);
update commands set day = '{day}' where id = '{command}';
update output set day = '{day}' where command_id = '{command}';
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything."""

    cuts: int
    troubles: int  # of the servers; `_trouble` has four kinds
    commands: int  # at a time
    clients: int  # of a command; half of them from its beginning
    life_s: tuple[float, float]
    trouble_every_s: tuple[float, float]


@dataclass(slots=True, kw_only=True)
class Yard:
    """The servers, the commands and the clients of one run."""

    replicas: tuple[Replica, Replica]
    dsn: str
    folder: Path
    size: Size
    chance: random.Random
    nursery: trio.Nursery
    tally: CutTally = field(default_factory=CutTally)
    calm: trio.Event = field(default_factory=trio.Event)
    _at_work: int = 0
    _started: int = 0

    async def run(self) -> None:
        """Commands and clients until there were enough cuts, and then to their ends."""
        for project in PROJECTS:
            await self._ask("/projects", {"id": project})
        async with trio.open_nursery() as troubles:
            troubles.start_soon(self._trouble)
            while not self._had_enough():
                if self._at_work < self.size.commands:
                    await self._start_command()
                await trio.sleep(POLL_S)
            troubles.cancel_scope.cancel()
        for replica in self.replicas:
            await self._start(replica)
        self.calm.set()
        with trio.fail_after(PATIENCE_S):
            while self._at_work:
                await trio.sleep(POLL_S)

    def _had_enough(self) -> bool:
        troubles = self.tally.troubles.total()
        return self.tally.cuts.total() >= self.size.cuts and troubles >= self.size.troubles

    # --- commands and their clients ---------------------------------------------------------------

    async def _start_command(self) -> None:
        """One command with its clients."""
        self._started += 1
        kind = list(cut_writer.STEPS)[self._started % len(cut_writer.STEPS)]
        life_s = self.chance.uniform(*self.size.life_s)
        script = f"exec {sys.executable} -I -S {WRITER} {kind} {SEED}.{self._started} {life_s:.2f}"
        project = PROJECTS[self._started % len(PROJECTS)]
        name = f"{kind}{self._started}"
        command = await self._ask(f"/projects/{project}/shell", {"command": script}, key=name)
        self.tally.counts["commands"] += 1
        self._at_work += 1
        self.nursery.start_soon(self._watch, name, project, command, life_s)

    async def _watch(self, name: str, project: str, command: str, life_s: float) -> None:
        """All clients of a command; some come when it has ended, some when it is old."""
        truth = Truth(self.folder / "projects" / ".commands" / command)
        paths = (f"/commands/{command}/events", f"/projects/{project}/events?stream_id={command}")
        async with trio.open_nursery() as clients:
            for number in range(self.size.clients):
                client = Client(
                    seen=Seen(name=f"{name}.{number}", truth=truth, faults=self.tally.faults),
                    path=paths[number % 2],
                    replicas=self.replicas,
                    chance=random.Random(self.chance.getrandbits(32)),
                    tally=self.tally,
                    nursery=self.nursery,
                )
                late_s = 0.0 if number % 2 else self.chance.uniform(0, 1.5 * life_s)
                clients.start_soon(self._follow, client, late_s, command, life_s)
        self._at_work -= 1

    async def _follow(self, client: Client, late_s: float, command: str, life_s: float) -> None:
        """One client; the first of some commands to see the end makes a night pass."""
        with trio.move_on_after(late_s):
            await self.calm.wait()
        await client.follow(calm=self.calm)
        truth = client.seen.truth
        self.tally.counts["gaps seen"] += client.seen.gaps
        self.tally.counts["gaps resumed within"] += client.seen.gaps_within
        self.tally.counts["streams seen to their end"] += client.seen.is_complete
        if client.seen.is_complete and int(command[-1], 16) < 5 and not truth.is_aged:
            for journal in truth.journals.values():
                journal.read_on()
            truth.is_aged = True
            self.tally.counts["commands made old"] += 1
            days = 10 + self.tally.counts["commands made old"]
            await trio.to_thread.run_sync(make_old, self.dsn, command, days)

    async def _ask(self, path: str, body: dict[str, object], *, key: str | None = None) -> str:
        """POST to one server or the other until one of them does it; the id."""
        headers = {} if key is None else {"Idempotency-Key": key}
        async with httpx2.AsyncClient(trust_env=False, verify=False, timeout=10) as http:
            while True:
                replica = self.chance.choice(self.replicas)
                if replica.port is None:
                    await trio.sleep(POLL_S)
                    continue
                headers["Authorization"] = f"Bearer {replica.server.key}"
                url = f"http://127.0.0.1:{replica.port}{path}"
                try:
                    answer = await http.post(url, json=body, headers=headers)
                    if answer.status_code in (200, 201):
                        return str(answer.json()["data"]["id"])
                except httpx2.TransportError:
                    pass  # it died
                await trio.sleep(POLL_S)

    # --- what happens to the servers --------------------------------------------------------------

    async def _trouble(self) -> None:
        """One server after the other, and now and then both."""
        number = 0
        while True:
            await trio.sleep(self.chance.uniform(*self.size.trouble_every_s))
            trouble = (self._kill, self._stop, self._freeze, self._kill_both)[number % 4]
            number += 1
            await trouble()

    async def _kill(self) -> None:
        """kill -9, and back after a while."""
        await self._end(self.chance.choice(self.replicas), SIGKILL, "kill -9")

    async def _stop(self) -> None:
        """SIGTERM: streams are told to go, leases are given back."""
        await self._end(self.chance.choice(self.replicas), SIGTERM, "SIGTERM")

    async def _kill_both(self) -> None:
        """For a moment nobody serves."""
        async with trio.open_nursery() as nursery:
            for replica in self.replicas:
                nursery.start_soon(self._end, replica, SIGKILL, "kill -9")

    async def _freeze(self) -> None:
        """SIGSTOP past the lease: what it then writes is stale."""
        replica = self.chance.choice(self.replicas)
        self.tally.troubles["SIGSTOP"] += 1
        replica.server.signal(SIGSTOP)
        try:
            await trio.sleep(LEASE_S * self.chance.uniform(0.5, 1.5))
        finally:
            replica.server.signal(SIGCONT)

    async def _end(self, replica: Replica, number: int, what: str) -> None:
        self.tally.troubles[what] += 1
        process = replica.server.process
        assert process is not None
        process.send_signal(number)
        await until(lambda: process.poll() is not None, f"{replica.name} ends")
        replica.port = None
        await trio.sleep(self.chance.uniform(0, 1))
        await self._start(replica)

    async def _start(self, replica: Replica) -> None:
        """Start it again, where it does not run."""
        server = replica.server
        process = server.process
        assert process is not None
        if process.poll() is not None:
            server.spawn()
        address = server.state_dir / "address"
        await until(address.exists, f"{replica.name} listens")
        replica.port = port_of(server)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition. Errors: AssertionError."""
    with trio.move_on_after(PATIENCE_S):
        while not condition():
            await trio.sleep(POLL_S)
        return
    raise AssertionError(f"not within {PATIENCE_S:g} s: {what}")


def make_old(dsn: str, command: str, days: int) -> None:
    """Move a command's output so many days back. Blocks."""
    day = datetime.now(UTC).date() - timedelta(days=days)
    statement = MAKE_OLD.format(day=day, command=command.removeprefix("cmd_"))
    with psycopg.connect(dsn) as connection:
        connection.execute(statement)


@contextmanager
def open_pair(place: Path, folder: Path, dsn: str) -> Iterator[tuple[Replica, Replica]]:
    """Two ready servers; afterwards they end in order, and nothing of them is left."""
    settings = SETTINGS | {
        "RDEV_DATABASE_DSN": dsn,
        "RDEV_PROJECTS_DIR": str(folder / "projects"),
    }
    with open_state(place, **settings) as one, open_state(place, **settings) as two:
        for server in (one, two):
            server.module = "tests.faults.server_with_small_logs"
            server.spawn()
        for server in (one, two):
            server.await_address()
        yield (
            Replica(name="one", server=one, port=port_of(one)),
            Replica(name="two", server=two, port=port_of(two)),
        )


def port_of(server: Server) -> int:
    """Where it listens now."""
    return int((server.state_dir / "address").read_text().strip().rpartition(":")[2])


async def run_cuts(place: Path, folder: Path, dsn: str, session: CutTally, size: Size) -> None:
    """One run, judged."""
    with open_pair(place, folder, dsn) as replicas:
        async with trio.open_nursery() as nursery:
            yard = Yard(
                replicas=replicas,
                dsn=dsn,
                folder=folder,
                size=size,
                chance=random.Random(SEED),
                nursery=nursery,
            )
            try:
                await yard.run()
            finally:
                session.add(yard.tally)
            nursery.cancel_scope.cancel()
    faults = yard.tally.faults
    told = "\n".join([f"seed {SEED}", *faults.found])
    assert (faults.lost, faults.twice, faults.wrong) == (0, 0, 0), told
    assert not faults.found, told


@pytest.mark.slow
async def test_three_hundred_cuts_lose_nothing_and_show_nothing_twice(
    quick_place: Path, tmp_path: Path, migrated_dsn: str, session_cuts: CutTally
) -> None:
    size = Size(
        cuts=300, troubles=3, commands=4, clients=6, life_s=(1.0, 2.0), trouble_every_s=(0.2, 0.6)
    )
    await run_cuts(quick_place, tmp_path, migrated_dsn, session_cuts, size)


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_ten_thousand_cuts_lose_nothing_and_show_nothing_twice(
    quick_place: Path, tmp_path: Path, migrated_dsn: str, session_cuts: CutTally
) -> None:
    size = Size(
        cuts=10_000,
        troubles=32,
        commands=8,
        clients=15,
        life_s=(3.0, 8.0),
        trouble_every_s=(1.0, 4.0),
    )
    await run_cuts(quick_place, tmp_path, migrated_dsn, session_cuts, size)
    counts = session_cuts.counts
    for what in ("410 explained", "gaps seen", "replica switches"):
        assert counts[what], f"there was none of these: {what}"
