"""The ledger of webhooks while the server is killed again and again.

Events are committed in batches while receivers answer 500 to three in ten requests and nothing to
one in ten; the server gets SIGKILL at any moment after the last batch of a round, and the next one
takes over. Then all is answered, and the ledger says what never arrived (`killed_lost`), what came
under an id that no event has (`killed_other_ids`), and what was accepted more than once
(`killed_twice`, under the same id by construction). tests/faults/test_webhooks.py kills at named
points; this is at chance. Bounded by DEADLINE_S after the last kill.
"""

import http.client
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h11
import psycopg
import trio

from bench.server import Server, open_mortal_server, open_server, open_state_dir
from rdev.adapters.postgres import cluster

ENDPOINTS = 20
EVENTS, KILLS = 600, 4
LONG_EVENTS, LONG_KILLS = 10_000, 25
BATCH = 25
FAILED, HUNG = 0.3, 0.1
LIVES_MOST_S = 1.0
DEADLINE_S = 300.0
SETTINGS = {
    "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
    "RDEV_WEBHOOK_TOTAL_S": "0.5",
    "RDEV_WEBHOOK_SCHEDULE": ",".join(["0.2"] * 30),
}

_INSERT = """
insert into events (xid, type, project, command_id, kind, status, attempt, seq)
select pg_current_xact_id(), 'command.queued', 'p' || n %% %s, gen_random_uuid(), 'shell', 'queued',
       1, n
from generate_series(1, %s) n
returning id
"""
_LEFT = "select count(*) from deliveries where status <> 'delivered'"
_INTERRUPTED = "select count(*) from delivery_attempts where fault = 'interrupted'"


@dataclass(slots=True)
class _Receivers:
    """One port for all endpoints; what it answered to which id."""

    chance: random.Random
    is_calm: bool = False
    port: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    async def handle(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        event_id = ""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some(65_536))
                elif isinstance(event, h11.Request):
                    event_id = dict(event.headers)[b"webhook-id"].decode()
                elif isinstance(event, h11.EndOfMessage):
                    if not await self._answer(stream, connection, event_id):
                        return
                elif isinstance(event, h11.ConnectionClosed):
                    return
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return  # the server was killed

    async def _answer(
        self, stream: trio.SocketStream, connection: h11.Connection, event_id: str
    ) -> bool:
        """False where it said nothing until the sender gave up."""
        self.requests[event_id] += 1
        drawn = 1.0 if self.is_calm else self.chance.random()
        if drawn < HUNG:
            await stream.receive_some(1)
            return False
        status = 500 if drawn < HUNG + FAILED else 200
        self.accepted[event_id] += status == 200
        head = h11.Response(status_code=status, headers=[("content-length", "0")])
        for sent in (head, h11.EndOfMessage()):
            await stream.send_all(connection.send(sent) or b"")
        connection.start_next_cycle()
        return True


def measure(*, long: bool) -> Mapping[str, float]:
    """The ledger. Errors: trio.TooSlowError where something was not delivered in time."""
    events, kills = (LONG_EVENTS, LONG_KILLS) if long else (EVENTS, KILLS)
    with open_state_dir() as state_dir:
        return trio.run(_measure, state_dir, events, kills)


async def _measure(state_dir: Path, events: int, kills: int) -> Mapping[str, float]:
    receivers = _Receivers(random.Random())
    committed: set[str] = set()
    each = events // kills
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, receivers.handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        receivers.port = listener.socket.getsockname()[1]
        for round_ in range(kills):
            server_of = open_mortal_server(state_dir, **SETTINGS)
            server = await trio.to_thread.run_sync(server_of.__enter__)
            try:
                if round_ == 0:
                    await trio.to_thread.run_sync(_make_endpoints, server, receivers.port)
                count = events - len(committed) if round_ == kills - 1 else each
                committed |= await trio.to_thread.run_sync(_commit, state_dir, count)
                await trio.sleep(receivers.chance.random() * LIVES_MOST_S)
            finally:
                server_of.__exit__(None, None, None)
        receivers.is_calm = True
        server_of = open_server(state_dir, **SETTINGS)
        await trio.to_thread.run_sync(server_of.__enter__)
        try:
            with trio.fail_after(DEADLINE_S):
                while await trio.to_thread.run_sync(_ask, state_dir, _LEFT):
                    await trio.sleep(0.2)
            interrupted = _ask(state_dir, _INTERRUPTED)
        finally:
            await trio.to_thread.run_sync(server_of.__exit__, None, None, None)
        nursery.cancel_scope.cancel()
    return {
        "killed_events": len(committed),
        "killed_lost": sum(not receivers.accepted[one] for one in committed),
        "killed_other_ids": len(set(receivers.requests) - committed),
        "killed_twice": sum(count - 1 for count in receivers.accepted.values() if count > 1),
        "killed_interrupted": interrupted,
    }


def _commit(state_dir: Path, count: int) -> set[str]:
    """Events as a state change writes them; their ids once they are committed."""
    found: set[str] = set()
    with psycopg.connect(cluster.conninfo(state_dir / "run"), autocommit=True) as connection:
        while count > 0:
            rows = connection.execute(_INSERT, (ENDPOINTS, min(BATCH, count))).fetchall()
            found |= {f"evt_{row[0].hex}" for row in rows}
            count -= len(rows)
    return found


def _ask(state_dir: Path, statement: str) -> int:
    with psycopg.connect(cluster.conninfo(state_dir / "run")) as connection:
        row = connection.execute(statement).fetchone()
    assert row is not None
    return int(row[0])


def _make_endpoints(server: Server, port: int) -> None:
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    for number in range(ENDPOINTS):
        connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
        body = {
            "url": f"http://127.0.0.1:{port}/{number}",
            "events": ["command.queued"],
            "project_ids": [f"p{number}"],
        }
        connection.request("POST", "/webhooks", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 201:
            raise RuntimeError(f"POST /webhooks: {answer.status} {answer.read()!r}")
        connection.close()
