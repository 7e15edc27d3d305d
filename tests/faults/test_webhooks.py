"""Webhooks while the server is killed again and again: nothing that was committed is lost.

Events are committed while receivers answer 500 to three in ten requests and nothing to one in ten.
The server dies at each named point between the commit of an event and the stored outcome of its
attempt in turn, each of them at least once, and where there are rounds left at any moment.
`pytest -s` prints the ledger; the seed of a failed run is in its message.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h11
import psycopg
import pytest
import trio

from rdev.adapters.postgres import cluster
from tests.app.server import DEADLINE_S, POLL_S, Server, open_api, open_state
from tests.faults.points import WEBHOOK_POINTS, Points

ENDPOINTS = 20
# A server dies at one of the first so many times that it comes to its point.
NTH_MAX = 8
BATCH = 25
FAILED, HUNG = 0.3, 0.1
TOTAL_S = 0.5

_INSERT = """
insert into events (xid, type, project, command_id, kind, status, attempt, seq)
select pg_current_xact_id(), 'command.queued', 'p' || n %% %s, gen_random_uuid(), 'shell', 'queued',
       1, n
from generate_series(%s::integer, %s) n
returning id
"""
_LEFT = "select count(*) from deliveries where status <> 'delivered'"
_LEDGER = """
select (select count(*) from deliveries), (select sum(attempt) from deliveries),
       (select count(*) from delivery_attempts where fault = 'interrupted')
"""


@dataclass
class Receivers:
    """One server for all endpoints; what it answered to which id."""

    chance: random.Random
    is_calm: bool = False
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    hung: int = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        event_id = ""
        try:
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some(65_536))
                elif isinstance(event, h11.Request):
                    event_id = dict(event.headers)[b"webhook-id"].decode()
                elif isinstance(event, h11.EndOfMessage):
                    await self._answer(stream, http, event_id)
                elif isinstance(event, h11.ConnectionClosed):
                    return
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return  # the server was killed

    async def _answer(self, stream: trio.SocketStream, http: h11.Connection, event_id: str) -> None:
        self.requests[event_id] += 1
        drawn = 1.0 if self.is_calm else self.chance.random()
        if drawn < HUNG:
            self.hung += 1
            await stream.receive_some(1)  # until the sender gives up
            raise trio.BrokenResourceError
        status = 500 if drawn < HUNG + FAILED else 200
        self.accepted[event_id] += status == 200
        for sent in (
            h11.Response(status_code=status, headers=[("content-length", "0")]),
            h11.EndOfMessage(),
        ):
            await stream.send_all(http.send(sent) or b"")
        http.start_next_cycle()


@pytest.fixture
def server(quick_place: Path) -> Iterator[Server]:
    settings = {
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_WEBHOOK_TOTAL_S": str(TOTAL_S),
        "RDEV_WEBHOOK_SCHEDULE": ",".join(["0.2"] * 30),
        "RDEV_RATE_LIMIT_ADDRESS": "off",
    }
    with open_state(quick_place, **settings) as server:
        server.module = "tests.faults.server_with_points"
        server.start()
        server.keep_port()
        yield server


def commit(server: Server, first: int, last: int) -> list[str]:
    """Events as a state change writes them; their ids once they are committed."""
    dsn = cluster.conninfo(server.state_dir / "run")
    with psycopg.connect(dsn, autocommit=True) as connection:
        rows = connection.execute(_INSERT, (ENDPOINTS, first, last)).fetchall()
    return [f"evt_{row[0].hex}" for row in rows]


def ask(server: Server, statement: str) -> tuple[int, ...]:
    with psycopg.connect(cluster.conninfo(server.state_dir / "run")) as connection:
        row = connection.execute(statement).fetchone()
    assert row is not None
    return tuple(int(value or 0) for value in row)


async def make_endpoints(server: Server, url: str) -> None:
    async with open_api(server) as api:
        for number in range(ENDPOINTS):
            project = await api.project(f"p{number}")
            body = {"url": url, "events": ["command.queued"], "project_ids": [project]}
            assert (await api.post("/webhooks", body)).status_code == 201


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("events", "kills"), [(450, 8), pytest.param(10_000, 25, marks=pytest.mark.full)]
)
async def test_kills_lose_no_event_and_every_repeat_has_the_same_id(
    server: Server, nursery: trio.Nursery, events: int, kills: int
) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    receivers = Receivers(chance)
    serve = partial(trio.serve_tcp, receivers.handle, 0, host="127.0.0.1")
    (listener,) = await nursery.start(serve)
    url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
    await make_endpoints(server, url)
    committed: set[str] = set()
    each = events // (kills + 1)
    points = Points(folder=server.state_dir)

    for round_ in range(kills + 1):
        # Of the points in turn, at one of their first times; what is left over dies at any moment.
        is_pointed = round_ < kills // len(WEBHOOK_POINTS) * len(WEBHOOK_POINTS)
        if is_pointed:
            point = WEBHOOK_POINTS[round_ % len(WEBHOOK_POINTS)]
            points.arm(point, nth=chance.randint(1, NTH_MAX))
        end = events if round_ == kills else (round_ + 1) * each
        for first in range(round_ * each, end, BATCH):
            last = min(first + BATCH, end) - 1
            committed.update(await trio.to_thread.run_sync(commit, server, first, last))
        if round_ == kills:
            break
        if is_pointed:
            await trio.to_thread.run_sync(server.wait)
        else:
            await trio.sleep(chance.random() * 0.5)
            server.kill()
        await trio.to_thread.run_sync(server.start)

    receivers.is_calm = True
    with trio.fail_after(DEADLINE_S + events / 50):
        while (await trio.to_thread.run_sync(ask, server, _LEFT)) != (0,):
            await trio.sleep(10 * POLL_S)
    deliveries, attempts, interrupted = await trio.to_thread.run_sync(ask, server, _LEDGER)
    lost = [one for one in committed if not receivers.accepted[one]]
    twice = sum(count - 1 for count in receivers.accepted.values() if count > 1)
    print(
        f"\n{len(committed)} events, {kills} kills, {sum(receivers.requests.values())} requests"
        f" ({receivers.hung} hung), {attempts} attempts ({interrupted} interrupted):"
        f" {len(lost)} lost, {twice} accepted twice, all under the same id"
    )
    print("died at:", ", ".join(f"{name} {n}" for name, n in Counter(points.fired).items()))
    assert set(points.fired) == set(WEBHOOK_POINTS)
    assert lost == [], f"seed {seed}"
    assert set(receivers.requests) == committed, f"seed {seed}"
    assert deliveries == len(committed)
    # What was accepted twice was cut off between the answer and its storing.
    assert twice <= interrupted, f"seed {seed}"
