"""An event stream on real sockets: the same promises for both ways of writing it."""

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from uuid import UUID

import h2.config
import h2.connection
import h2.events
import pytest
import trio

from rdev.adapters.http.app import build_app
from rdev.adapters.http.feed import Feeds
from rdev.adapters.http.following import Followers, WatchKey
from rdev.adapters.http.server import ConnectionTimes, HttpServer, TlsFiles
from rdev.adapters.http.stream import stream_routes
from rdev.adapters.http.writers import (
    Chunked,
    ClientLeftError,
    DirectWriter,
    SlowClientError,
    chunk,
)
from rdev.domain.commands import Kind, NewCommand, Outcome, Priority, Retry, Status
from rdev.domain.execution import Spec
from rdev.domain.ids import ProjectId, command_id
from rdev.domain.keys import KeyEnd, Principal
from rdev.domain.projects import ProjectDefinition
from rdev.domain.stream import Chunk, Source, final_lines
from rdev.services.commands import Commands
from rdev.services.feed import Feed
from rdev.services.key_watch import KeyWatch
from rdev.services.key_watch import Watch as KeyEnding
from rdev.services.stream import Fanout, Frames
from tests.adapters.http.conftest import (
    DEADLINE_S,
    KEY,
    NOON,
    Noted,
    authenticate,
    check_project,
    project_of,
)
from tests.fakes.commands import FakeCommands
from tests.fakes.depths import FakeDepths
from tests.fakes.feed import FakeFeed
from tests.fakes.keys import FakeKeys
from tests.fakes.output import FakeOutput
from tests.fakes.projects import FakeProjects
from tests.fakes.store import ACTOR, StoreState
from tests.services.scripted import gate_of

PROJECT = ProjectId("demo")
COMMAND = command_id(UUID(int=1))
TIMES = ConnectionTimes(write_s=20.0)

Event = tuple[int, bytes]
_EVENT = re.compile(rb"id: (\d+)\nevent: \w+\ndata: (.*)")


class Told(Noted):
    """Counts what was sent, too."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def events_sent(self, project: ProjectId, event_type: str, count: int) -> None:
        self.sent += count


@dataclass
class Watch:
    """A server with one running command, whose events the test makes."""

    state: StoreState
    server: HttpServer
    fanout: Fanout
    telemetry: Told
    context: ssl.SSLContext | None
    seen: list[Event] = field(default_factory=list)

    def publish(self, events: int = 1, *, size_bytes: int = 30, final: bool = False) -> None:
        """Commit events and tell of them."""
        self.fanout.publish(self.commit(events, size_bytes=size_bytes, final=final))

    def commit(self, events: int = 1, *, size_bytes: int = 30, final: bool = False) -> Chunk:
        """Commit events."""
        row = self.state.rows[COMMAND]
        lines = [b'{"line":"%s"}' % (b"x" * size_bytes) for _ in range(events)]
        source, payload = Source.STDOUT, b"\n".join(lines)
        if final:
            outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
            payload = final_lines(
                outcome, attempt=1, truncated=False, stdout_bytes=0, stderr_bytes=0
            )
            source, events = Source.LIFE, 2
        self.state.put(row, source, events, 0, payload)
        return self.state.chunks[COMMAND][-1]

    @property
    def last_seq(self) -> int:
        return self.state.chunks[COMMAND][-1].last_seq

    @property
    def readers(self) -> int:
        return self.fanout.statistics().subscriptions

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[trio.abc.Stream]:
        port = int(self.server.bound[0].rsplit(":", 1)[1])
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        stream: trio.abc.Stream = plain
        if self.context is not None:
            stream = trio.SSLStream(plain, self.context, server_hostname="localhost")
        try:
            yield stream
        finally:
            await trio.aclose_forcefully(stream)

    @asynccontextmanager
    async def follow(self, after: int = 0, **headers: str) -> AsyncIterator["Reader"]:
        """A client that has seen `connected`."""
        async with self.connect() as stream:
            reader = Reader(stream)
            await reader.ask(f"/commands/{COMMAND}/events?after={after}", **headers)
            yield reader


class Reader:
    """One client: reads the head, then the chunked body, event by event."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.head = b""
        self.body = b""
        self.is_ended = False
        self.events: list[Event] = []
        self._raw = self._rest = b""

    async def ask(self, path: str, *, method: str = "GET", body: bytes = b"", **more: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: test", f"X-API-Key: {KEY}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
        await self.stream.send_all("\r\n".join([*lines, "", ""]).encode() + body)
        while b"\r\n\r\n" not in self._raw:
            await self._receive()
        self.head, self._raw = self._raw.split(b"\r\n\r\n", 1)

    async def until(self, done: Callable[[list[Event]], bool]) -> list[Event]:
        """Read until the events are as wanted."""
        while not done(self.events):
            await self.more()
        return self.events

    async def to_end(self) -> list[Event]:
        """Read to the end of the body, and see that nothing follows it."""
        while not self.is_ended:
            await self.more()
        assert self._raw == b""
        with contextlib.suppress(trio.BrokenResourceError):
            assert await self.stream.receive_some(1) == b""
        return self.events

    async def more(self) -> None:
        await self._receive()
        while (at := self._raw.find(b"\r\n")) >= 0:
            size = int(self._raw[:at], 16)
            end = at + 2 + size
            if len(self._raw) < end + 2:
                break
            assert self._raw[end : end + 2] == b"\r\n", "a chunk was written into another"
            self._parse(self._raw[at + 2 : end])
            self._raw = self._raw[end + 2 :]
            self.is_ended = size == 0

    def _parse(self, data: bytes) -> None:
        """Note the events that have an id."""
        self.body += data
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        found = [_EVENT.fullmatch(block) for block in blocks]
        self.events += [(int(event[1]), event[2]) for event in found if event]

    async def _receive(self) -> None:
        data = await self.stream.receive_some(65_536)
        assert data, f"cut after {self.body[-200:]} {self._raw}"
        self._raw += data


Serve = Callable[..., Awaitable[Watch]]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return TlsFiles(cert_file=str(cert), key_file=str(key))


@pytest.fixture
async def start(nursery: trio.Nursery) -> AsyncIterator[Serve]:
    """Starts servers with one running command."""

    async def run(
        *,
        tls: TlsFiles | None = None,
        times: ConnectionTimes = TIMES,
        drain_s: float = 0.0,
        watch_key: WatchKey | None = None,
    ) -> Watch:
        state, telemetry = StoreState(), Told()
        store, log = FakeCommands(state), FakeOutput(state)
        fanout = Fanout(log=log, tell_replicas=lambda _: None, drain_s=drain_s)
        commands = Commands(
            store=store,
            log=log,
            gate=gate_of(FakeDepths(state)),
            fanout=fanout,
            wake_workers=lambda _: None,
            reach_holder=lambda _: None,
            new_uuid=lambda: UUID(int=1),
        )
        keys = KeyWatch(store=FakeKeys(state), now=lambda: state.now)
        followers = Followers(watch_key or keys.watch, telemetry)
        feed = Feed(log=FakeFeed(), tell_replicas=lambda: None)
        feeds = Feeds(feed, followers, check_project, lambda *_: nullcontext())
        shell = build_app(
            routes=(),
            plain=stream_routes(commands, fanout, feeds, followers),
            authenticate=authenticate,
            project_of=project_of,
            telemetry=telemetry,
            now=lambda: NOON,
            new_request_id=lambda: "req-1",
        )
        server = HttpServer(
            app=shell,
            bind=["127.0.0.1:0"],
            grace_s=5,
            telemetry=telemetry,
            tls=tls,
            times=times,
        )
        await FakeProjects(state).insert(
            ProjectDefinition(id=PROJECT), ACTOR, executor="local", reach="local:x:y"
        )
        await store.insert(_new_command())
        await nursery.start(fanout.run)
        await nursery.start(server.run)
        context = None
        if tls is not None:
            context = ssl.create_default_context(cafile=tls.cert_file)
        return Watch(
            state=state, server=server, fanout=fanout, telemetry=telemetry, context=context
        )

    with trio.fail_after(DEADLINE_S):
        yield run


@pytest.fixture(params=["direct", "send"])
async def watch(request: pytest.FixtureRequest, start: Serve) -> Watch:
    """A server whose streams are written in one of the two ways."""
    if request.param == "direct":
        return await start()
    return await start(tls=request.getfixturevalue("certificate"))


def _new_command() -> NewCommand:
    return NewCommand(
        id=COMMAND,
        project=PROJECT,
        kind=Kind.SHELL,
        spec=Spec(argv=("true",), env={}, cwd=None, stdin=b"", timeout_s=60),
        argv=("true",),
        priority=Priority.NORMAL,
        retry=Retry.NEVER,
        expires_in_s=None,
        actor=ACTOR,
    )


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.005)


# Both ways


async def test_a_stream_is_replayed_then_live_and_ends(watch: Watch) -> None:
    watch.commit(3)
    async with watch.follow() as reader:
        await reader.until(lambda events: len(events) == 4)
        for _ in range(20):
            watch.publish(2)
            await trio.sleep(0)
        watch.publish(final=True)
        events = await reader.to_end()
    assert [seq for seq, _ in events] == list(range(1, watch.last_seq + 1))
    assert b" 200 " in reader.head
    for header in (
        b"content-type: text/event-stream",
        b"cache-control: no-store, no-transform",
        b"x-accel-buffering: no",
        b"connection: close",
        b"x-request-id: req-1",
    ):
        assert header in reader.head.lower().split(b"\r\n")
    assert reader.body.startswith(b"retry: 2000\nevent: connected\n")
    await until(lambda: watch.readers == 0)
    assert watch.telemetry.sent == watch.last_seq
    await until(lambda: watch.server.open_connections == 0)


async def test_resuming_continues_where_the_client_was(watch: Watch) -> None:
    watch.commit(5)
    watch.commit(5)
    async with watch.follow(after=4) as reader:
        await reader.until(lambda events: len(events) == 7)
        watch.publish(final=True)
        events = await reader.to_end()
    assert [seq for seq, _ in events] == list(range(5, watch.last_seq + 1))


async def test_leaving_unsubscribes(watch: Watch) -> None:
    async with watch.follow() as reader:
        await reader.until(lambda events: len(events) == 1)
        await until(lambda: watch.readers == 1)
    await until(lambda: watch.readers == 0)
    watch.publish()
    await until(lambda: watch.server.open_connections == 0)


async def test_a_client_that_reads_late_loses_nothing(watch: Watch) -> None:
    async with watch.follow() as reader:
        await reader.until(lambda events: len(events) == 1)
        for _ in range(200):
            watch.publish(size_bytes=60_000)
            await trio.sleep(0)
        watch.publish(final=True)
        async with watch.follow() as other:
            await other.to_end()
        events = await reader.to_end()
    assert [seq for seq, _ in events] == list(range(1, watch.last_seq + 1))


async def test_many_clients_see_the_same_bytes(watch: Watch) -> None:
    async with contextlib.AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(watch.follow()) for _ in range(20)]
        for reader in readers:
            await reader.until(lambda events: len(events) == 1)
        for _ in range(50):
            watch.publish(3, size_bytes=200)
            await trio.sleep(0)
        watch.publish(final=True)
        for reader in readers:
            await reader.to_end()
    assert len({reader.body for reader in readers}) == 1
    assert len(readers[0].events) == watch.last_seq


async def test_a_draining_server_says_so_and_when_to_come_back(watch: Watch) -> None:
    async with contextlib.AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(watch.follow()) for _ in range(10)]
        for reader in readers:
            await reader.until(lambda events: len(events) == 1)
        watch.fanout.stop()
        for reader in readers:
            await reader.to_end()
    pauses = set()
    for reader in readers:
        last = reader.body.split(b"\n\n")[-2]
        found = re.fullmatch(
            rb'retry: (\d+)\nevent: disconnecting\ndata: {"reason":"draining"}', last
        )
        assert found, last
        pauses.add(int(found[1]))
    assert len(pauses) == 10
    assert all(1_000 <= pause <= 3_000 for pause in pauses)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "send"])
async def test_a_stalled_client_is_cut_and_disturbs_nobody(
    start: Serve, way: str, certificate: TlsFiles
) -> None:
    tls = certificate if way == "send" else None
    watch = await start(tls=tls, times=ConnectionTimes(write_s=1.0))
    async with watch.follow() as stalled, watch.follow() as reader:
        for one in (stalled, reader):
            await one.until(lambda events: len(events) == 1)
        async with trio.open_nursery() as reading:
            reading.start_soon(reader.to_end)
            while watch.readers == 2:
                watch.publish(size_bytes=60_000)
                await until(lambda: len(reader.events) == watch.last_seq)
            watch.publish(final=True)
        assert len(reader.events) == watch.last_seq


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "send"])
async def test_a_key_that_ends_ends_the_stream_of_a_stalled_client_too(
    start: Serve, way: str, certificate: TlsFiles
) -> None:
    watches: list[KeyEnding] = []

    @contextlib.contextmanager
    def watch_key(principal: Principal, on_end: Callable[[KeyEnd], None]) -> Iterator[KeyEnding]:
        watches.append(KeyEnding(on_end=on_end))
        yield watches[-1]

    tls = certificate if way == "send" else None
    times = ConnectionTimes(write_s=10 * DEADLINE_S)
    watch = await start(tls=tls, times=times, watch_key=watch_key)
    async with watch.follow():
        for _ in range(400):
            watch.publish(size_bytes=60_000)
            await trio.sleep(0)
        watches[0].end(KeyEnd.REVOKED)
        await until(lambda: watch.readers == 0)
        await until(lambda: watch.server.open_connections == 0)


# What is refused


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("GET", f"/commands/{COMMAND}/events", "wrong", 401),
        ("GET", "/commands/cmd_x/events", KEY, 404),
        ("GET", f"/commands/cmd_{'f' * 32}/events", KEY, 404),
        ("GET", f"/projects/other/events?stream_id={COMMAND}", KEY, 404),
        ("GET", "/projects/nowhere/events", KEY, 404),
        ("GET", f"/commands/{COMMAND}/events?after=x", KEY, 400),
        ("GET", f"/commands/{COMMAND}/events?after=100", KEY, 410),
        ("POST", f"/commands/{COMMAND}/events", KEY, 405),
        ("HEAD", f"/commands/{COMMAND}/events", KEY, 200),
    ],
)
async def test_what_is_refused_is_a_problem_and_is_counted(
    start: Serve, method: str, path: str, key: str, status: int
) -> None:
    watch = await start()
    async with watch.connect() as stream:
        await stream.send_all(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode()
        )
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some(65_536)
    assert data.startswith(b"HTTP/1.1 %d " % status)
    if status == 405:
        assert b"allow: GET, HEAD" in data
    elif status != 200:
        assert b"application/problem+json" in data
    await until(lambda: watch.readers == 0 and bool(watch.telemetry.finished))
    assert watch.telemetry.finished[0][2] == status


async def test_after_complete_there_is_204(start: Serve) -> None:
    watch = await start()
    watch.commit(final=True)
    row = watch.state.rows[COMMAND]
    row.command = replace(row.command, status=Status.SUCCEEDED)
    async with watch.connect() as stream:
        reader = Reader(stream)
        await reader.ask(f"/commands/{COMMAND}/events?after={watch.last_seq}")
        assert b" 204 " in reader.head.split(b"\r\n")[0]


async def test_a_request_with_a_body_is_streamed_to_all_the_same(start: Serve) -> None:
    watch = await start()
    async with watch.connect() as stream:
        reader = Reader(stream)
        await reader.ask(f"/commands/{COMMAND}/events", Content_Length="4", body=b"body")
        await reader.until(lambda events: len(events) == 1)
        watch.publish(final=True)
        assert len(await reader.to_end()) == 3


# One writer at a time


async def test_what_a_client_says_meanwhile_puts_nothing_into_its_stream(start: Serve) -> None:
    """Hypercorn would answer; but a connection that was written directly is never used again."""
    watch = await start()
    async with watch.follow() as reader:
        await reader.until(lambda events: len(events) == 1)
        await reader.stream.send_all(b"GET /commands HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        for _ in range(20):
            watch.publish()
            await trio.sleep(0)
        watch.publish(final=True)
        while not reader.is_ended:
            await reader.more()
        assert len(reader.events) == watch.last_seq


@dataclass
class Lender:
    """As much of a connection as a writer needs."""

    write_timeout_s: float = 10.0

    @contextlib.contextmanager
    def patience(self) -> Iterator[trio.CancelScope]:
        with trio.move_on_after(self.write_timeout_s) as scope:
            yield scope


@contextlib.contextmanager
def pair(*, send_bytes: int | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection, the first one non-blocking."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        there.setblocking(False)
        if send_bytes is not None:
            here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        yield here, there


def some_frames(data: bytes) -> Frames:
    return Frames(data=data, first_seq=1, last_seq=1, is_final=False, counts={})


def offer(writer: DirectWriter, frames: Frames) -> bool:
    """Whether the socket took all of it."""
    return not writer.together([writer])(frames)


async def test_a_number_that_is_used_again_reaches_nobody_else() -> None:
    """A line of one project must never reach another project's reader."""
    with pair() as (here, there):
        writer = DirectWriter(Lender(), here, Chunked())  # type: ignore[arg-type]
        assert offer(writer, some_frames(b"data: mine\n\n"))
        number = here.fileno()
        here.close()
        with pair() as (other, reader):
            # The kernel gives the lowest free number: it is the same one.
            assert other.fileno() == number
            assert not offer(writer, some_frames(b"data: secret\n\n"))
            for write in (writer.flush, writer.end):
                with pytest.raises(ClientLeftError):
                    await write()
            with pytest.raises(BlockingIOError):
                reader.recv(1)
        assert there.recv(100) == chunk(b"data: mine\n\n")


async def test_what_the_socket_does_not_take_waits_for_room(nursery: trio.Nursery) -> None:
    with pair(send_bytes=4_096) as (here, there):
        writer = DirectWriter(Lender(), here, Chunked())  # type: ignore[arg-type]
        received = b""
        wanted = b""
        for number in range(20):
            data = b"data: %d\n\n" % number * 3_000
            wanted += chunk(data)
            if not offer(writer, some_frames(data)):
                async with trio.open_nursery() as both:
                    both.start_soon(writer.flush)
                    while len(received) < len(wanted):
                        await trio.lowlevel.wait_readable(there)
                        received += there.recv(65_536)
        await writer.end()
        while not received.endswith(b"0\r\n\r\n"):
            await trio.lowlevel.wait_readable(there)
            received += there.recv(65_536)
    assert received == wanted + b"0\r\n\r\n"


async def test_a_slow_client_is_told_why_it_is_cut() -> None:
    """One that takes a little now and then, too little to go on with."""
    with pair(send_bytes=4_096) as (here, there):
        writer = DirectWriter(Lender(0.05), here, Chunked())  # type: ignore[arg-type]
        with pytest.raises(SlowClientError):
            await writer.write(b"x" * 100_000)
        received = b""
        async with trio.open_nursery() as both:
            both.start_soon(writer.part, b"event: disconnecting\n\n")
            while not received.endswith(b"0\r\n\r\n"):
                await trio.lowlevel.wait_readable(there)
                received += there.recv(65_536)
    assert received == chunk(b"x" * 100_000) + chunk(b"event: disconnecting\n\n") + b"0\r\n\r\n"


async def test_a_stream_over_http_2_says_the_same(start: Serve, certificate: TlsFiles) -> None:
    watch = await start(tls=certificate)
    assert watch.context is not None
    watch.context.set_alpn_protocols(["h2"])
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    head = [(":method", "GET"), (":path", f"/commands/{COMMAND}/events"), (":scheme", "https")]
    client.send_headers(1, [*head, (":authority", "x"), ("x-api-key", KEY)], end_stream=True)
    body, headers, ended = b"", {}, False
    async with watch.connect() as stream:
        while not ended:
            await stream.send_all(client.data_to_send())
            for event in client.receive_data(await stream.receive_some(65_536)):
                match event:
                    case h2.events.ResponseReceived():
                        headers = dict(event.headers)
                    case h2.events.DataReceived():
                        body += event.data
                        client.acknowledge_received_data(event.flow_controlled_length, 1)
                        if len(body) == len(event.data):
                            watch.publish(5)
                            watch.publish(final=True)
                    case h2.events.StreamEnded():
                        ended = True
    assert headers[":status"] == "200"
    assert "connection" not in headers
    found = [_EVENT.fullmatch(block) for block in body.split(b"\n\n")]
    assert [int(event[1]) for event in found if event] == list(range(1, watch.last_seq + 1))
    await until(lambda: watch.readers == 0)
