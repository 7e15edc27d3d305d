"""rdev's hub and HTTP server without a database: what a burst of events costs to hand out.

`python -m bench.fanout_server` reads one JSON line, prints its port, publishes at the next line
when everybody is connected, prints what that cost, and ends at the next line.
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from uuid import UUID

import trio

from rdev.adapters.http.app import HttpLimits, build_app
from rdev.adapters.http.feed import Feeds
from rdev.adapters.http.following import Followers
from rdev.adapters.http.server import HttpServer
from rdev.adapters.http.stream import stream_routes
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.domain.commands import Command, Kind, Lease, Priority, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.feed import START, Position
from rdev.domain.ids import CommandId, ProjectId, command_id
from rdev.domain.keys import ADMIN, KeyEnd, Principal
from rdev.domain.stream import Chunk, Source
from rdev.ports.authentication import Authenticate
from rdev.ports.feed import FeedBounds, FeedPage
from rdev.ports.output import Append, AppendResult
from rdev.services.feed import Feed
from rdev.services.key_watch import Watch
from rdev.services.stream import Fanout

COMMAND = command_id(UUID(int=1))
LINE = b"x" * 60


class Memory:
    """A log and a command that live as long as the process."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        now = datetime(2026, 1, 1, tzinfo=UTC)
        self.command = Command(
            id=COMMAND, project=ProjectId("bench"), kind=Kind.SHELL, status=Status.RUNNING,
            priority=Priority.NORMAL, attempt=1, exit_code=None, signal=None, reason=None,
            created_at=now, started_at=now, finished_at=None, duration_ms=None, queue_wait_ms=0,
            stdout_bytes=0, stderr_bytes=0, dropped_bytes=0, truncated=False, argv=(),
            key_id="key_admin", session_id=None, usage=None, kill=None, last_seq=0, attempt_seq=0,
        )  # fmt: skip

    def commit(self, lines: list[bytes]) -> Chunk:
        """Events at the end of the log."""
        last = self.command.last_seq
        chunk = Chunk(
            command=COMMAND,
            first_seq=last + 1,
            last_seq=last + len(lines),
            source=Source.STDOUT,
            raw_bytes=0,
            payload=b"\n".join(lines),
        )
        self.chunks.append(chunk)
        self.command = replace(self.command, last_seq=chunk.last_seq)
        return chunk

    async def get(self, command: CommandId) -> Command:
        await trio.lowlevel.checkpoint()
        return self.command

    async def project_of(self, command: CommandId) -> ProjectId | None:
        return self.command.project

    async def oldest_seq(self, command: CommandId) -> int | None:
        await trio.lowlevel.checkpoint()
        return 1

    async def read(self, command: CommandId, *, after: int, limit_bytes: int) -> list[Chunk]:
        await trio.lowlevel.checkpoint()
        found = [chunk for chunk in self.chunks if chunk.last_seq > after]
        return found[: max(1, limit_bytes // 65_536)]

    async def heads(
        self, commands: Sequence[CommandId], *, written_by_others_than: str
    ) -> dict[CommandId, int]:
        raise NotImplementedError

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        raise NotImplementedError

    async def read_tail(
        self, command: CommandId, source: Source, *, tail_bytes: int
    ) -> list[Chunk]:
        raise NotImplementedError

    async def trim(self, lease: Lease, source: Source, *, head_bytes: int, tail_bytes: int) -> int:
        raise NotImplementedError


def _only(key: str) -> Authenticate:
    """Lets in whoever has the key."""

    async def authenticate(credential: str | None, client_ip: str) -> Principal:
        if credential != key:
            raise RdevError(ErrorCode.UNAUTHORIZED, "not the benchmark's key")
        return ADMIN

    return authenticate


class Nothing:
    """A `FeedLog` in which nothing happens: the feeds are not measured here."""

    async def read(
        self, *, after: Position, limit: int, projects: Collection[ProjectId] | None
    ) -> FeedPage:
        """Nothing."""
        return FeedPage(events=(), end=after, is_held=False)

    async def bounds(self) -> FeedBounds:
        """None."""
        return FeedBounds(oldest=START, head=START)

    async def held_back_s(self) -> float:
        """Nothing is."""
        return 0.0


async def _known(project: ProjectId) -> str:
    """Every project is; its uid."""
    return project


@contextmanager
def _lasting(principal: Principal, on_end: Callable[[KeyEnd], None]) -> Iterator[Watch]:
    """The benchmark's key does not end."""
    yield Watch()


async def _serve(plan: dict[str, int], key: str) -> None:
    memory, telemetry, numbers = Memory(), PrometheusTelemetry(), count(1)
    fanout = Fanout(log=memory, tell_replicas=lambda _: None)
    followers = Followers(_lasting, telemetry)
    feed = Feed(log=Nothing(), tell_replicas=lambda: None)
    feeds = Feeds(feed, followers, _known, lambda *_: nullcontext())
    shell = build_app(
        routes=(),
        plain=stream_routes(memory, fanout, feeds, followers),
        authenticate=_only(key),
        project_of=memory.project_of,
        telemetry=telemetry,
        now=lambda: datetime.now(UTC),
        new_request_id=lambda: f"req-{next(numbers)}",
        limits=HttpLimits(max_in_flight=2_000, max_held=20_000),
    )
    server = HttpServer(
        app=shell, bind=["127.0.0.1:0"], grace_s=1, telemetry=telemetry, max_connections=20_000
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(fanout.run)
        await nursery.start(server.run)
        for _ in range(16 * plan.get("history_mib", 0)):
            memory.commit([b'{"stream":"stdout","line":"%b"}' % (LINE * 16)] * 64)
        port = int(server.bound[0].rsplit(":", 1)[1])
        print(json.dumps({"port": port, "last_seq": memory.command.last_seq}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        while fanout.statistics().subscriptions < plan["clients"]:
            await trio.sleep(0.01)
        print(json.dumps(await _publish(memory, fanout, plan)), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        nursery.cancel_scope.cancel()


async def _publish(memory: Memory, fanout: Fanout, plan: dict[str, int]) -> dict[str, float]:
    """Burst after burst, the next when the hub has handed out the last, or at its time."""
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    for first in range(0, plan["events"], plan["burst"]):
        if "per_s" in plan:
            due_s = began_s + first / plan["per_s"]
            await trio.sleep(max(0.0, due_s - time.perf_counter()))
        for _ in range(first, min(plan["events"], first + plan["burst"])):
            line = b'{"stream":"stdout","line":"%d %b"}' % (time.monotonic_ns(), LINE)
            fanout.publish(memory.commit([line]))
        await trio.lowlevel.checkpoint()
        while not fanout.is_idle:
            await trio.lowlevel.checkpoint()
    return {
        "took_s": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - cpu_began_s,
        "written": fanout.statistics().written,
        "fell_back": fanout.statistics().fell_back,
    }


def main() -> None:
    plan = json.loads(sys.stdin.readline())
    trio.run(_serve, plan, plan["key"])


if __name__ == "__main__":
    main()
