"""Webhooks: from the commit of an event to its first attempt, and how many attempts there are.

A real server on its own PostgreSQL (fsync on), receivers on loopback in this process. Events are
inserted as statements that change commands do it, each in a transaction, and the server is told as
another server tells it. `latency_*`: from the commit's return to the request at the receiver, 20
endpoints, some 60 events/s in all. `holes_*`: the same beside 20 endpoints that take connections
and never answer, each with a backlog. `deliveries`: 50 endpoints that answer at once, and a backlog
that lasts; what the receivers cost is this process's. `owed_*`: what the trigger adds to a
statement that inserts one event, without its commit. `killed_*`: the ledger of webhook_kills.py.
With `--long` that has the issue's 10,000 events; all else is the same. Bounded: each wait for what
must come has a deadline, and a part that misses it fails.
"""

import http.client
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import psycopg
import trio

from bench import webhook_kills
from bench.harness import Context, Figure, Measurement, Scenario, percentile
from bench.server import Server, open_server, open_state_dir
from rdev.adapters.postgres import cluster

ENDPOINTS = 20
EVENTS = 1_500
PAUSE_S = 0.01
TOTAL_S = 2.0
BACKLOG = 200
FAST_ENDPOINTS = 50
FAST_EVENTS = 250
WARM_S = 0.5
WINDOW_S = 3.0
OWED_EVENTS = 300
OWED_ENDPOINTS = (0, 1, 50)

_INSERT = """
insert into events (xid, type, project, command_id, kind, status, attempt, seq)
select pg_current_xact_id(), 'command.queued', %s, gen_random_uuid(), 'shell', 'queued', 1, n
from generate_series(1, %s) n
returning id
"""
_TELL = "select pg_notify('rdev_webhooks', 'bench:')"
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@dataclass(slots=True)
class Sink:
    """Receivers: all paths on one port are endpoints that answer, on another that never do."""

    arrived_s: dict[str, float] = field(default_factory=dict)
    count: int = 0
    good_port: int = 0
    hole_port: int = 0

    async def accept(self, stream: trio.SocketStream) -> None:
        """Just enough HTTP to cost little."""
        rest = b""
        try:
            while more := await stream.receive_some(65_536):
                rest += more
                while (end := _end_of_request(rest)) is not None:
                    lowered = rest[:end].lower()
                    start = lowered.index(b"webhook-id: ") + 12
                    event = rest[start : lowered.index(b"\r", start)].decode()
                    self.arrived_s.setdefault(event, time.perf_counter())
                    self.count += 1
                    rest = rest[end:]
                    await stream.send_all(_ANSWER)
        except trio.BrokenResourceError:
            return

    async def hang(self, stream: trio.SocketStream) -> None:
        """Read until the sender gives up."""
        try:
            while await stream.receive_some(65_536):
                pass
        except trio.BrokenResourceError:
            return


def _end_of_request(data: bytes) -> int | None:
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return None
    lowered = data[:head].lower()
    start = lowered.index(b"content-length: ") + 16
    end = lowered.find(b"\r", start)
    length = int(lowered[start : end if end >= 0 else None])
    return head + 4 + length if len(data) >= head + 4 + length else None


@asynccontextmanager
async def _open_sink() -> AsyncIterator[Sink]:
    sink = Sink()
    async with trio.open_nursery() as nursery:
        for handler, name in ((sink.accept, "good_port"), (sink.hang, "hole_port")):
            serve = partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            setattr(sink, name, listener.socket.getsockname()[1])
        yield sink
        nursery.cancel_scope.cancel()


def measure(context: Context) -> Measurement:
    """Everything in one run of one server for each part."""
    found: dict[str, float] = {}
    settings = {
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_WEBHOOK_TOTAL_S": str(TOTAL_S),
        "RDEV_RATE_LIMIT_ADDRESS": "off",
    }
    for part in (_owed, _latency, _throughput):
        with open_state_dir() as state_dir, open_server(state_dir, **settings) as server:
            found |= trio.run(part, server)
    found |= webhook_kills.measure(long=context.long)
    return found


async def _latency(server: Server) -> Mapping[str, float]:
    """Without holes, then with as many holes as endpoints."""
    async with _open_sink() as sink:
        for number in range(ENDPOINTS):
            _make(server, f"http://127.0.0.1:{sink.good_port}/{number}", f"p{number}")
        with _connect(server) as connection:
            await _waits_ms(connection, sink, ENDPOINTS)  # every endpoint has accepted something
            alone = await _waits_ms(connection, sink, EVENTS)
            for number in range(ENDPOINTS):
                _make(server, f"http://127.0.0.1:{sink.hole_port}/{number}", f"hole{number}")
                connection.execute(_INSERT, (f"hole{number}", BACKLOG))
            connection.execute(_TELL)
            # Until each has hung once, and some are left alone by their breakers.
            await trio.sleep(2 * TOTAL_S)
            beside = await _waits_ms(connection, sink, EVENTS)
    return {
        "latency_p50": percentile(alone, 50),
        "latency_p99": percentile(alone, 99),
        "holes_p50": percentile(beside, 50),
        "holes_p99": percentile(beside, 99),
        "holes_to_none": percentile(beside, 99) / percentile(alone, 99),
    }


async def _waits_ms(
    connection: psycopg.Connection[tuple[object, ...]], sink: Sink, events: int
) -> list[float]:
    committed_s: dict[str, float] = {}

    def commit(number: int) -> None:
        row = connection.execute(_INSERT, (f"p{number % ENDPOINTS}", 1)).fetchone()
        assert row is not None
        committed_s[f"evt_{str(row[0]).replace('-', '')}"] = time.perf_counter()
        connection.execute(_TELL)

    for number in range(events):
        await trio.to_thread.run_sync(commit, number)
        await trio.sleep(PAUSE_S)
    with trio.fail_after(30):
        while not committed_s.keys() <= sink.arrived_s.keys():
            await trio.sleep(0.01)
    return [(sink.arrived_s[one] - at_s) * 1000 for one, at_s in committed_s.items()]


async def _throughput(server: Server) -> Mapping[str, float]:
    async with _open_sink() as sink:
        for number in range(FAST_ENDPOINTS):
            _make(server, f"http://127.0.0.1:{sink.good_port}/{number}", f"p{number}")
        with _connect(server) as connection:
            for number in range(FAST_ENDPOINTS):
                connection.execute(_INSERT, (f"p{number}", FAST_EVENTS))
            connection.execute(_TELL)
        with trio.fail_after(30):
            while sink.count < FAST_ENDPOINTS:
                await trio.sleep(0.01)
        await trio.sleep(WARM_S)
        count, cpu_s, began_s = sink.count, server.cpu_s(), time.perf_counter()
        await trio.sleep(WINDOW_S)
        took_s = time.perf_counter() - began_s
        done, used_s = sink.count - count, server.cpu_s() - cpu_s
        if sink.count >= FAST_ENDPOINTS * FAST_EVENTS:
            raise RuntimeError("the backlog did not last: raise FAST_EVENTS")
    return {
        "deliveries": done / took_s,
        "deliveries_cpu": used_s / done * 1e6,
        "deliveries_cores": used_s / took_s,
    }


async def _owed(server: Server) -> Mapping[str, float]:
    """What the trigger adds, with so many endpoints that are owed every event."""
    found, made = {}, 0
    with _connect(server) as connection:
        connection.execute("alter table events disable trigger events_are_owed")
        bare_us = _insert_us(connection)
        connection.execute("alter table events enable trigger events_are_owed")
        for endpoints in OWED_ENDPOINTS:
            while made < endpoints:
                # Nobody listens there, and what is owed is rolled back.
                _make(server, f"http://127.0.0.1:9/{made}", "demo")
                made += 1
            found[f"owed_{endpoints}"] = _insert_us(connection) - bare_us
    return {"insert": bare_us, **found}


def _insert_us(connection: psycopg.Connection[tuple[object, ...]]) -> float:
    """The median statement of a transaction that is rolled back."""
    took_us = []
    with connection.transaction(force_rollback=True):
        for _ in range(OWED_EVENTS):
            began_s = time.perf_counter()
            connection.execute(_INSERT, ("demo", 1))
            took_us.append((time.perf_counter() - began_s) * 1e6)
    return percentile(took_us, 50)


def _connect(server: Server) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(cluster.conninfo(server.state_dir / "run"), autocommit=True)


def _make(server: Server, url: str, project: str) -> None:
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    try:
        body = {"url": url, "events": ["command.queued"], "project_ids": [project]}
        connection.request("POST", "/webhooks", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 201:
            raise RuntimeError(f"POST /webhooks: {answer.status} {answer.read()!r}")
    finally:
        connection.close()


SCENARIO = Scenario(
    name="webhooks",
    what="Webhooks: commit to first attempt, attempts per second, black holes, the outbox, kills.",
    figures=(
        Figure(name="latency_p50", unit="ms", at_most=50),
        Figure(name="latency_p99", unit="ms", at_most=250),
        Figure(name="holes_p50", unit="ms"),
        Figure(name="holes_p99", unit="ms", at_most=250),
        Figure(name="holes_to_none", unit="", at_most=1.1),
        Figure(name="deliveries", unit="/s", at_least=1_200),
        Figure(name="deliveries_cpu", unit="µs"),
        Figure(name="deliveries_cores", unit=""),
        Figure(name="insert", unit="µs"),
        Figure(name="owed_0", unit="µs"),
        Figure(name="owed_1", unit="µs"),
        Figure(name="owed_50", unit="µs"),
        Figure(name="killed_events", unit=""),
        Figure(name="killed_lost", unit="", at_most=0),
        Figure(name="killed_other_ids", unit="", at_most=0),
        Figure(name="killed_twice", unit=""),
        Figure(name="killed_interrupted", unit=""),
    ),
    measure=measure,
)
