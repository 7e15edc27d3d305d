"""Two servers on one database and one projects folder, under load, watched all the time.

Owns the cluster, the servers, the clients and the records; whoever runs faults against it uses
`faults.py`. At its end the gate opens, every command must end, and the verdict is in `tally`.
"""

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, Signals

import h11
import httpx2
import psycopg
import trio

from tests.adapters.postgres.proxy import TcpProxy
from tests.app.server import POLL_S, Api, Json, Server, processes_of, read_events
from tests.faults.database import Database, open_database
from tests.faults.ledger import Record, Tally, Work, judge
from tests.faults.points import Points

LEASE_S = 2.0
# The promise: what a dead server held is observed again after so much.
RECOVERY_MAX_S = LEASE_S + 5.0
# For what takes seconds on an idle machine: only what hangs meets it.
PATIENCE_S = 60.0
WITNESS = Path(__file__).with_name("witness.sql").read_text()
# A lane of four, full for as long as the arena stands: what is sent there waits.
FULL_PROJECT = "full"
FULL_LANE = 4
# The event that says that a command runs; what follows is its output.
RUNNING_SEQ = 2
PROJECTS = ("p1", "p2", "p3")
WORK = {
    Work.QUICK: 8,
    Work.BULK: 2,
    Work.SLOW: 5,
    Work.FAILING: 1,
    Work.CANCELLED: 2,
    Work.NEVER: 1,
    Work.EXPIRED: 1,
}


@dataclass(slots=True, kw_only=True)
class Node:
    """One of the servers. `proxy` is between it and the database, where there is one."""

    name: str
    server: Server
    points: Points
    proxy: TcpProxy | None = None
    api: Api | None = None

    @property
    def lives(self) -> bool:
        """Whether its process runs (or stands still)."""
        return self.server.process is not None and self.server.process.poll() is None

    async def start(self) -> None:
        """Start it and wait until it listens; it need not be ready."""
        await self.forget_client()
        if not self.lives:
            self.server.spawn()
        address = self.server.state_dir / "address"
        await wait_until(lambda: address.exists() or not self.lives, "it listens", PATIENCE_S)
        assert self.lives, self.server.log[-4_000:]
        self.server.url = f"http://{address.read_text().strip()}"
        headers = {"Authorization": f"Bearer {self.server.key}"}
        # Without certificates, whose reading would hold up every watcher.
        http = httpx2.AsyncClient(
            base_url=self.server.url, headers=headers, timeout=10, trust_env=False, verify=False
        )
        self.api = Api(http)

    async def forget_client(self) -> None:
        """Close what a server that is gone left open."""
        if self.api is not None:
            api, self.api = self.api, None
            await api.http.aclose()

    async def ready(self) -> None:
        """Wait until it serves."""
        await wait_until_async(self._is_ready, f"{self.name} is ready", PATIENCE_S)

    async def _is_ready(self) -> bool:
        assert self.api is not None
        try:
            return (await self.api.get("/ready")).status_code == 200
        except httpx2.TransportError:
            return False

    def signal(self, number: Signals) -> None:
        self.server.signal(number)

    async def ended(self) -> float:
        """Wait for its end; when it was (monotonic)."""
        await wait_until(lambda: not self.lives, f"{self.name} ends", PATIENCE_S)
        return time.monotonic()

    async def stale(self) -> float:
        """How many stale writes this process has counted."""
        assert self.api is not None
        text = (await self.api.get("/metrics")).text
        wanted = ("rdev_queue_stale ", "rdev_appender_stale ")
        return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(wanted))


@dataclass(slots=True, kw_only=True)
class Arena:
    """See the module."""

    folder: Path
    database: Database
    nodes: tuple[Node, Node]
    chance: random.Random
    seed: int
    nursery: trio.Nursery
    tally: Tally = field(default_factory=Tally)
    records: list[Record] = field(default_factory=list)
    _closing: bool = False
    _at_work: int = 0

    @property
    def alive(self) -> list[Node]:
        """The servers that can be asked."""
        return [node for node in self.nodes if node.lives and node.api is not None]

    def other(self, node: Node) -> Node:
        """The other server."""
        return self.nodes[1] if node is self.nodes[0] else self.nodes[0]

    def injected(self, kind: str, count: int = 1) -> None:
        """Count a fault."""
        self.tally.injections[kind] += count

    async def open(self) -> None:
        """Start both servers and make the projects."""
        for node in self.nodes:
            await node.start()
        for node in self.nodes:
            await node.ready()
        for project in (FULL_PROJECT, *PROJECTS):
            await self._ask("POST", "/projects", (200, 201), json={"id": project})

    async def close(self) -> None:
        """End both servers as Ctrl-C does."""
        for node in self.nodes:
            if node.lives:
                node.signal(SIGINT)
        for node in self.nodes:
            await node.ended()

    # --- the load ---------------------------------------------------------------------------------

    async def begin(self, *, workers: int) -> None:
        """Fill the full lane, and keep so many clients busy until the end."""
        full = [self.new_record(Work.ENDLESS, FULL_PROJECT) for _ in range(FULL_LANE)]
        for record in full:
            self._launch(record)
        # Before any fault and any other work: what waits behind it must not run instead.
        try:
            await wait_until(
                lambda: all(len(record.events) > RUNNING_SEQ for record in full),
                "the full lane is full",
                PATIENCE_S,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; seed {self.seed}\n{self._told(full)}") from error
        for _ in range(workers):
            self.nursery.start_soon(self._keep_busy)

    def new_record(self, work: Work, project: str | None = None) -> Record:
        """A command that is not sent yet."""
        if work in (Work.NEVER, Work.EXPIRED):
            project = FULL_PROJECT
        name = f"{work}{len(self.records)}"
        record = Record(name=name, work=work, project=project or self.chance.choice(PROJECTS))
        self.records.append(record)
        return record

    def _launch(self, record: Record) -> None:
        self.nursery.start_soon(self.carry_out, record)

    async def _keep_busy(self) -> None:
        while not self._closing:
            (work,) = self.chance.choices(list(WORK), list(WORK.values()))
            await self.carry_out(self.new_record(work))

    def _told(self, records: list[Record]) -> str:
        """What the watchers heard of these, and where the database has them."""
        lines = [
            f"{record.name} {record.command}: {[event.name for event in record.events][-4:]}"
            for record in records
        ]
        for statement in (
            "select id, status, attempt, holder, lease_until - now(), last_seq, out_offset, "
            "created_at, started_at, rank from commands where project = 'full' order by id",
            "select project, lane_class, cap, due, last_start from lanes order by 1, 2",
            "select extract(epoch from now()), now()",
        ):
            lines += [" ".join(map(str, row)) for row in self.query(statement)]
        return "\n".join([*lines, *(node.server.log[-3_000:] for node in self.nodes)])

    async def carry_out(self, record: Record) -> None:
        """Send a command, watch it to its end, cancel it where that is its work."""
        self._at_work += 1
        await self._submit(record)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, record)
            if record.work in (Work.CANCELLED, Work.NEVER):
                await trio.sleep(self.chance.uniform(0, 1))
                await self._ask("DELETE", f"/commands/{record.command}", (200, 202))
        self._at_work -= 1

    async def _submit(self, record: Record) -> None:
        """Until somebody answers: the idempotency key makes one command of it."""
        path, more = self._request(record)
        answer = await self._ask("POST", path, (200, 201), **more)
        record.command = answer.json()["data"]["id"]

    async def is_refused(self, node: Node, record: Record) -> bool:
        """Whether this server now says 503 to it."""
        assert node.api is not None
        path, more = self._request(record)
        try:
            return (await node.api.http.request("POST", path, **more)).status_code == 503  # type: ignore[arg-type]
        except httpx2.TransportError:
            return False

    def _request(self, record: Record) -> tuple[str, dict[str, object]]:
        body: Json = {"command": record.script(self.folder), "timeout_s": 3_600}
        if record.work is Work.EXPIRED:
            body["expires_in_s"] = 2
        headers = {"Idempotency-Key": record.name}
        return f"/projects/{record.project}/shell", {"json": body, "headers": headers}

    async def _ask(
        self, method: str, path: str, wanted: Sequence[int], **more: object
    ) -> httpx2.Response:
        """Ask one server or the other until one answers as it should. Anything but "not now" is a
        fault."""
        while True:
            if node := self._anyone():
                assert node.api is not None
                try:
                    answer = await node.api.http.request(method, path, **more)  # type: ignore[arg-type]
                except (httpx2.TransportError, RuntimeError):
                    pass  # it died
                else:
                    if answer.status_code in wanted:
                        return answer
                    assert answer.status_code == 503, f"{method} {path}: {answer.text}"
            await trio.sleep(POLL_S)

    def _anyone(self) -> Node | None:
        return self.chance.choice(alive) if (alive := self.alive) else None

    async def _watch(self, record: Record) -> None:
        """Follow the events on whatever server is there, from where the watcher is."""
        while not record.ended:
            if (node := self._anyone()) is None:
                await trio.sleep(POLL_S)
                continue
            assert node.api is not None
            try:
                await self._watch_on(node.api, record)
            except (OSError, h11.RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError):
                pass  # it died, or does not answer
            await trio.sleep(0 if record.ended else POLL_S)

    async def _watch_on(self, api: Api, record: Record) -> None:
        last = record.events[-1].seq if record.events else 0
        path = f"/commands/{record.command}/events"
        with trio.fail_after(5) as patience:
            async with api.wire(path, {"Last-Event-ID": str(last)}) as wire:
                if wire.status == 503:
                    return
                if wire.status != 200:
                    body = b"".join([part async for part in wire.body()])
                    told = f"{api.http.base_url}{path}: {wire.status} {body[:500]!r}"
                    raise AssertionError(f"seed {self.seed}: {record.name}: {told}")
                async with contextlib.aclosing(read_events(wire)) as events:
                    async for event in events:
                        # A frozen server is left after a while, as a client would.
                        patience.deadline = trio.current_time() + 5
                        if event.seq is None:
                            continue
                        record.events.append(event)
                        record.heard_at_s = time.monotonic()
                        record.ended = event.name == "complete"

    # --- recovery -------------------------------------------------------------------------------

    async def held_by(self, node: Node) -> list[str]:
        """The running commands that the server holds, by the database."""
        statement = (
            "select 'cmd_' || replace(id::text, '-', '') from commands c "
            "join witness.servers s using (holder) where c.status = 'running' and s.name = %s"
        )
        rows = await trio.to_thread.run_sync(self.query, statement, (node.name,))
        return [row[0] for row in rows]

    def query(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        """Ask the database, past rdev. Blocks."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self.database.connect() as connection:
                    return connection.execute(statement, parameters).fetchall()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    async def recovered(self, held: Sequence[str], since_s: float) -> float:
        """Wait until every one of these was heard of since then; seconds after it."""
        waited_for = set(held)

        def heard() -> bool:
            known = {record.command: record for record in self.records if record.command}
            for command in list(waited_for):
                record = known.get(command)
                if record is not None and (record.heard_at_s > since_s or record.ended):
                    waited_for.discard(command)
            return not waited_for

        await wait_until(heard, f"these are heard of again: {waited_for}", PATIENCE_S)
        times = [record.heard_at_s for record in self.records if record.command in held]
        first = max((at for at in times), default=since_s)
        return max(0.0, min(first, time.monotonic()) - since_s)

    async def settle(self) -> None:
        """Let everything end, then judge."""
        self._closing = True
        for node in self.nodes:
            if not node.lives:
                await node.start()
            await node.ready()
        # The full lane stays full until nobody waits behind it any more.
        with trio.move_on_after(PATIENCE_S):
            while self._at_work > FULL_LANE:
                await trio.sleep(POLL_S)
        (self.folder / "gate").touch()
        with trio.move_on_after(PATIENCE_S):
            while self._at_work:
                await trio.sleep(POLL_S)
        for node in self.nodes:
            self.tally.stale_counted += int(await node.stale())
        await trio.to_thread.run_sync(self._hear_witness)
        judge(self.records, self.folder, self.tally)
        for node in self.nodes:
            if "Traceback" in node.server.log:
                self.tally.findings.append(f"FOUND a traceback of {node.name}: {node.server.log}")

    def _hear_witness(self) -> None:
        take_overs = self.query("select count(*)::int from witness.take_overs")
        self.tally.take_overs += int(str(take_overs[0][0]))
        for what, command, by in self.query("select what, command, by from witness.faults"):
            self.tally.stale_accepted += 1
            self.tally.findings.append(f"FOUND by the witness: {what}: {command} by {by}")

    def check(self) -> None:
        """Errors: AssertionError with what was found and the seed."""
        told = "\n".join([f"seed {self.seed}", *self.tally.findings[:40]])
        tally = self.tally
        assert not tally.findings, told
        assert (tally.lost_commands, tally.lost_bytes) == (0, 0), told
        assert (tally.doubled_starts, tally.stale_accepted) == (0, 0), told


@asynccontextmanager
async def open_arena(
    place: Path,
    *,
    seed: int,
    proxied: bool = False,
    data_place: Path | None = None,
    running_max: int = 64,
) -> AsyncIterator[Arena]:
    """Two ready servers; afterwards nothing of them is left. `data_place`: where the database lies,
    else in `place`; `running_max` is the first server's."""
    folder = Path(tempfile.mkdtemp(prefix="rdev-arena-", dir=place))
    nodes: list[Node] = []
    try:
        with open_database(data_place or place) as database:
            async with trio.open_nursery() as nursery:
                with database.connect() as connection:
                    connection.execute(WITNESS)
                for name in ("one", "two"):
                    proxy = TcpProxy(database.dsn_for(name)) if proxied else None
                    if proxy is not None:
                        await nursery.start(proxy.run)
                    nodes.append(_new_node(name, folder, database, proxy))
                nodes[0].server.settings["RDEV_RUNNING_MAX"] = str(running_max)
                arena = Arena(
                    folder=folder,
                    database=database,
                    nodes=(nodes[0], nodes[1]),
                    chance=random.Random(seed),
                    seed=seed,
                    nursery=nursery,
                )
                await arena.open()
                yield arena
                await arena.close()
                nursery.cancel_scope.cancel()
    finally:
        await _clear(nodes, folder)


async def _clear(nodes: list[Node], folder: Path) -> None:
    """Leave nothing, also of an arena that failed."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
        for node in nodes:
            await node.forget_client()
    for node in nodes:
        if node.lives:
            node.signal(SIGCONT)
            node.signal(SIGKILL)
            node.server.wait()
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _new_node(name: str, folder: Path, database: Database, proxy: TcpProxy | None) -> Node:
    state_dir = folder / name
    state_dir.mkdir(mode=0o700)
    # The witness must know the holder before its first claim.
    (state_dir / "server-id").write_text(f"holder-{name}\n")
    with database.connect() as connection:
        connection.execute("insert into witness.servers values (%s, %s)", (name, f"holder-{name}"))
    settings = {
        "RDEV_DATABASE_DSN": proxy.dsn if proxy else database.dsn_for(name),
        "RDEV_PROJECTS_DIR": str(folder / "projects"),
        "RDEV_LEASE_S": f"{LEASE_S:g}",
        "RDEV_DRAIN_DELAY_S": "0",
        "RDEV_GRACE_S": "5",
    }
    server = Server(
        state_dir=state_dir,
        settings=settings,
        # An arena's own: whoever finds a dead server's port taken by another's must not be let in.
        key=f"faults-{folder.name}-" + "k" * 32,
        module="tests.faults.server_with_points",
    )
    return Node(name=name, server=server, points=Points(folder=state_dir), proxy=proxy)


async def wait_until(condition: Callable[[], object], what: str, within_s: float) -> None:
    """Wait for a condition. Errors: AssertionError."""
    with trio.move_on_after(within_s):
        while not condition():
            await trio.sleep(POLL_S)
        return
    raise AssertionError(f"not within {within_s:g} s: {what}")


async def wait_until_async(
    condition: Callable[[], Awaitable[bool]], what: str, within_s: float
) -> None:
    """The same for a condition that waits itself."""
    with trio.move_on_after(within_s):
        while not await condition():
            await trio.sleep(POLL_S)
        return
    raise AssertionError(f"not within {within_s:g} s: {what}")
