"""What the audit log costs: the insert of a command with its audit entry and without it.

One PostgreSQL with fsync, four clients, each a process with a connection of its own that inserts as
fast as it can: the statement of `rdev/adapters/postgres/commands.py` as it is, the same without the
entry, and without the entry and the event. All clients change from one to the next together, ten
times a second, so that all three meet the same machine and the same tables.
"""

import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import psycopg
import trio
import uuid_utils.compat
from psycopg.rows import DictRow, dict_row

from bench.harness import Context, Figure, Measurement, Scenario, ratios
from bench.peers.databases import Databases, open_databases
from bench.peers.load import make_projects, project
from bench.server import open_state_dir
from rdev.adapters.postgres import commands as commands_sql
from rdev.adapters.postgres.migrate import up
from rdev.domain.audit import Actor
from rdev.domain.commands import Kind, NewCommand, Priority, Retry
from rdev.domain.execution import Spec
from rdev.domain.ids import command_id

CLIENTS = 4
# So many that a lane's backlog does not count: its position is counted by the insert.
PROJECTS = 500
# Within which a client has connected and has its statement prepared.
WARM_S = 1.0
SLICE_S = 0.1
WINDOW_S = 60 * SLICE_S
TARGET_KEPT_PERCENT = 90

ACTOR = Actor(
    key_id="key_00000000000070008000000000000000",
    key_name="bench",
    ip="192.0.2.1",
    request_id="req-00000000-0000-7000-8000-000000000000",
)
ARGV = ("sh", "-c", "make test && git status --short")


def without(statement: str, *parts: str) -> str:
    """A statement without some of its `with` parts. Errors: ValueError where one is not there."""
    for part in parts:
        statement, found = re.subn(rf", {part} as \(.*?\n\)", "", statement, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the statement has no {part}")
    return statement


STATEMENTS = {
    "audited": commands_sql._INSERT,
    "unaudited": without(commands_sql._INSERT, "entry"),
    "unrecorded": without(commands_sql._INSERT, "change", "entry"),
}


@dataclass(slots=True, kw_only=True)
class Share:
    """What one client did with one statement. CPU in seconds: PostgreSQL's for it, and its own."""

    inserted: int = 0
    database_cpu_s: float = 0.0
    client_cpu_s: float = 0.0


def insert_for_a_while(dsn: str, starts_at: float) -> dict[str, Share]:
    """One client. `starts_at`: when its window begins (`time.time`); before that it warms up.
    Errors: TimeoutError when it was not ready by then."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        if time.time() > starts_at:
            raise TimeoutError("the machine is too busy to measure anything")
        while time.time() < starts_at:
            for statement in STATEMENTS.values():
                connection.execute(statement, _parameters()).fetchone()
        shares = {side: Share() for side in STATEMENTS}
        for number in range(int(WINDOW_S / SLICE_S)):
            side = list(STATEMENTS)[number % len(STATEMENTS)]
            _insert_until(starts_at + (number + 1) * SLICE_S, connection, side, shares[side])
        return shares


def _insert_until(
    until: float, connection: psycopg.Connection[DictRow], side: str, share: Share
) -> None:
    pid = connection.info.backend_pid
    theirs_s, mine_s = _cpu_s(pid), time.process_time()
    while time.time() < until:
        connection.execute(STATEMENTS[side], _parameters()).fetchone()
        share.inserted += 1
    share.database_cpu_s += _cpu_s(pid) - theirs_s
    share.client_cpu_s += time.process_time() - mine_s


def _cpu_s(pid: int) -> float:
    """Finer than the ticks of `stat`; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


def be_there(_: int) -> None:
    """Nothing, for a while: all clients have started, and read this module, before a window."""
    time.sleep(WARM_S)


def _parameters() -> dict[str, object]:
    uuid = uuid_utils.compat.uuid7()
    new = NewCommand(
        id=command_id(uuid),
        project=project(uuid.int % PROJECTS),
        kind=Kind.SHELL,
        spec=Spec(argv=ARGV, env={}, timeout_s=60),
        argv=ARGV,
        priority=Priority.NORMAL,
        retry=Retry.NEVER,
        expires_in_s=None,
        actor=ACTOR,
    )
    return commands_sql._insert_parameters(new)


def measure(context: Context) -> Measurement:
    """Everything in one run."""
    with open_state_dir() as state_dir:
        return trio.run(_measure, context, state_dir)


async def _measure(context: Context, state_dir: Path) -> Measurement:
    async with open_databases(state_dir) as databases:
        return await _inserts(context, databases)


async def _inserts(context: Context, databases: Databases) -> dict[str, list[float]]:
    """Rates and CPU of each side, and what the audited one keeps of the others' rate."""
    found: dict[str, list[float]] = {}
    with ProcessPoolExecutor(CLIENTS, mp_context=get_context("spawn")) as clients:
        list(clients.map(be_there, range(CLIENTS)))
        for repetition in range(-context.warm_ups, context.repetitions):
            for name, value in (await _window(databases, clients)).items():
                if repetition >= 0:
                    found.setdefault(name, []).append(value)
    for other in ("unaudited", "unrecorded"):
        kept = ratios(found["audited_per_s"], found[f"{other}_per_s"])
        found[f"kept_of_{other}"] = [100 * one for one in kept]
    found["audit_cpu"] = _differences(found["audited_cpu"], found["unaudited_cpu"])
    found["event_cpu"] = _differences(found["unaudited_cpu"], found["unrecorded_cpu"])
    return found


async def _window(databases: Databases, clients: ProcessPoolExecutor) -> dict[str, float]:
    """One window on a fresh database: what each side did in its slices of it."""
    async with databases.filled("audit", _fill) as dsn:
        starts_at = time.time() + WARM_S
        windows = [clients.submit(insert_for_a_while, dsn, starts_at) for _ in range(CLIENTS)]
        done = [await trio.to_thread.run_sync(window.result) for window in windows]
    found: dict[str, float] = {}
    for side in STATEMENTS:
        shares = [shares[side] for shares in done]
        inserted = sum(share.inserted for share in shares)
        found[f"{side}_per_s"] = inserted / (WINDOW_S / len(STATEMENTS))
        found[f"{side}_cpu"] = sum(share.database_cpu_s for share in shares) / inserted * 1e6
        found[f"{side}_client_cpu"] = sum(share.client_cpu_s for share in shares) / inserted * 1e6
    return found


async def _fill(dsn: str) -> None:
    await trio.to_thread.run_sync(up, dsn)
    names = [project(number) for number in range(PROJECTS)]
    await trio.to_thread.run_sync(partial(make_projects, dsn, names))


def _differences(more: Sequence[float], less: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(more, less, strict=True)]


SCENARIO = Scenario(
    name="audit",
    what=f"The insert of a command with its audit entry (`audited`), without it (`unaudited`), and "
    f"without entry and event (`unrecorded`): {CLIENTS} client processes, {PROJECTS} projects, "
    "fsync on; CPU is PostgreSQL's.",
    figures=(
        Figure(name="audited_per_s", unit="/s"),
        Figure(name="unaudited_per_s", unit="/s"),
        Figure(name="unrecorded_per_s", unit="/s"),
        Figure(name="kept_of_unaudited", unit="%", at_least=TARGET_KEPT_PERCENT),
        Figure(name="kept_of_unrecorded", unit="%"),
        Figure(name="audited_cpu", unit="µs each"),
        Figure(name="audit_cpu", unit="µs each"),
        Figure(name="event_cpu", unit="µs each"),
    ),
    measure=measure,
)
