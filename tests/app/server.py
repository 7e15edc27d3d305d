"""A real `rdev serve` in a process of its own, and a client that reads what it really sends.

Owns the process, its state folder and the check that nothing of it is left behind. Bounded by
DEADLINE_S for everything that is waited for.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGKILL, Signals

import h11
import httpx2
import msgspec
import trio

# For what takes milliseconds to seconds: only a hung test meets it.
DEADLINE_S = 30.0
POLL_S = 0.02
ROOT = Path(__file__).parents[2]
FAKE_CLAUDE = ROOT / "tests" / "fakes" / "claude_cli.py"

Json = dict[str, object]


@dataclass(slots=True, kw_only=True)
class Server:
    """One server and its state folder; it can be ended and started again."""

    state_dir: Path
    settings: dict[str, str]
    key: str = field(default_factory=lambda: "test-" + secrets.token_hex(24))
    url: str = ""
    process: subprocess.Popen[bytes] | None = None
    # What starts it, and ends with it.
    within: tuple[str, ...] = ()
    # What `python -m` runs as the server.
    module: str = "rdev"
    arguments: tuple[str, ...] = ()
    # When the metrics were asked for last.
    scraped_at_s: float = float("-inf")

    @property
    def log(self) -> str:
        """Everything the server has written, over all its starts."""
        return self._log_file.read_text(errors="replace") if self._log_file.exists() else ""

    @property
    def _log_file(self) -> Path:
        return self.state_dir / "server.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def projects(self) -> Path:
        """Where its projects live."""
        return Path(self.settings.get("RDEV_PROJECTS_DIR", str(self.state_dir / "projects")))

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment without any setting of rdev but the server's."""
        return bare_environment() | {
            "RDEV_STATE_DIR": str(self.state_dir),
            "RDEV_BIND": "127.0.0.1:0",
            "RDEV_ADMIN_KEY": self.key,
            **self.settings,
        }

    @property
    def client_environment(self) -> dict[str, str]:
        """What `rdev run` needs."""
        return bare_environment() | {"RDEV_URL": self.url, "RDEV_KEY": self.key}

    def start(self, *, ready: bool = True) -> None:
        """Start the process and wait for its address, and (`ready`) for 200 from `/ready`."""
        self.spawn()
        self.await_address()
        if ready:
            until(lambda: probe(self.url + "/ready") == 200, "the server is ready", self)

    def spawn(self) -> None:
        """Start the process, wait for nothing."""
        (self.state_dir / "address").unlink(missing_ok=True)
        with self._log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", self.module, "serve", *self.arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def await_address(self) -> None:
        """Wait until it says where it listens."""
        address = self.state_dir / "address"
        until(address.exists, "the server listens", self)
        self.url = f"http://{address.read_text().strip()}"

    def keep_port(self) -> None:
        """Let the next start listen where this one does."""
        self.settings["RDEV_BIND"] = self.url.removeprefix("http://")

    def signal(self, number: Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def end(self, number: Signals) -> int:
        """Signal it and wait; the exit status."""
        self.signal(number)
        return self.wait()

    def kill(self) -> None:
        """As a machine's out-of-memory killer does."""
        self.end(SIGKILL)

    def rss_bytes(self, *, peak: bool = False) -> int:
        """Resident memory of the server's process."""
        name = "VmHWM:" if peak else "VmRSS:"
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    def processes(self) -> dict[int, str]:
        """Every living process of this state folder, by pid: server, database, commands."""
        return processes_of(self.state_dir)


@contextmanager
def open_server(place: Path, **settings: str) -> Iterator[Server]:
    """A ready server; afterwards Ctrl-C, and nothing of it may be left."""
    with open_state(place, **settings) as server:
        server.start()
        yield server


@contextmanager
def open_state(place: Path, **settings: str) -> Iterator[Server]:
    """A server that is not started yet; whatever was started is ended and looked after."""
    # A short path: the database's socket is in it, and socket paths end at 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="rdev-app-", dir=place))
    server = Server(state_dir=folder, settings=dict(settings))
    try:
        yield server
        if server.process is not None and server.process.poll() is None:
            assert server.end(SIGINT) == 0, server.log[-4_000:]
        until(lambda: not server.processes(), "no process is left", server)
        assert "Traceback" not in server.log, server.log
        assert '"level":"error"' not in server.log, server.log
    finally:
        # Only where the test failed: children first would be adopted, so by pid, each for itself.
        for pid in server.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)
        if server.process is not None:
            server.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def bare_environment() -> dict[str, str]:
    """This process's environment without what rdev reads."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RDEV_", "DB_", "FAKE_CLAUDE", "OTEL_"))
    }


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that work in the folder or name it in their arguments or environment."""
    mark = os.fsencode(folder)
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            argv = (entry / "cmdline").read_bytes()
            here = os.fsencode((entry / "cwd").readlink())
            known = (
                here.startswith(mark) or mark in argv or mark in (entry / "environ").read_bytes()
            )
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if known and state not in "ZX":
            found[int(entry.name)] = argv.replace(b"\0", b" ").decode(errors="replace")
    return found


def until(condition: Callable[[], object], what: str, server: Server | None = None) -> None:
    """Wait for a condition; fails with the end of the server's log."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        log = "" if server is None else server.log[-4_000:]
        ended = server is not None and server.process is not None and server.process.poll()
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}\n{log}"
        assert not ended or "left" in what, f"rdev serve ended with {ended}\n{log}"
        time.sleep(POLL_S)


async def until_async(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition without holding up the test's other tasks."""
    with trio.move_on_after(DEADLINE_S):
        while not condition():
            await trio.sleep(POLL_S)
        return
    raise AssertionError(f"not within {DEADLINE_S:g} s: {what}")


def probe(url: str) -> int | None:
    """The status of a GET; None when nobody answers."""
    try:
        return httpx2.get(url, timeout=5, trust_env=False).status_code
    except httpx2.TransportError:
        return None


def rdev(
    *argv: str, environment: Mapping[str, str], **more: object
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "rdev", *argv],
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=2 * DEADLINE_S,
        check=False,
        **more,  # type: ignore[call-overload]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event as it came over the wire."""

    name: str
    seq: int | None
    data: Json
    retry_ms: int | None = None
    # As it came; `seq` where it is a number.
    id: str | None = None

    @property
    def content(self) -> bytes:
        """The bytes that an `output` event stands for."""
        line = self.data.get("line")
        if line is None:
            raw = msgspec.convert(self.data["base64"], bytes)
        else:
            raw = str(line).encode()
        return raw if self.data.get("partial") else raw + b"\n"


def output_of(events: list[Event], stream: str = "stdout") -> bytes:
    """The bytes of one stream that the events hold."""
    return b"".join(
        event.content
        for event in events
        if event.name == "output" and event.data["stream"] == stream
    )


def seqs_of(events: list[Event]) -> list[int]:
    """The ids of the events that have one."""
    return [event.seq for event in events if event.seq is not None]


class Api:
    """A client with the server's key; one test's own."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self.http = http

    async def get(self, path: str, **more: object) -> httpx2.Response:
        return await self.http.get(path, **more)  # type: ignore[arg-type]

    async def post(self, path: str, body: object, **more: object) -> httpx2.Response:
        return await self.http.post(path, json=body, **more)  # type: ignore[arg-type]

    async def project(self, name: str = "demo") -> str:
        """Make a project."""
        response = await self.post("/projects", {"id": name})
        assert response.status_code in (200, 201), response.text
        return name

    async def submit(self, script: str, *, project: str = "demo", **fields: object) -> str:
        """Submit a shell command; its id."""
        return await self.submit_body(f"/projects/{project}/shell", {"command": script, **fields})

    async def submit_body(self, path: str, body: Json) -> str:
        response = await self.post(path, body)
        assert response.status_code == 201, response.text
        command: str = response.json()["data"]["id"]
        return command

    async def run(self, script: str, **fields: object) -> Json:
        """Submit a shell command and wait for its end; the command as GET shows it."""
        return await self.ended(await self.submit(script, **fields))

    async def command(self, command: str) -> Json:
        response = await self.get(f"/commands/{command}")
        assert response.status_code == 200, response.text
        data: Json = response.json()["data"]
        return data

    async def ended(self, command: str) -> Json:
        """The command once it has ended."""
        return await self.until_status(command, lambda status: status not in ("queued", "running"))

    async def running(self, command: str) -> Json:
        """The command once it runs."""
        return await self.until_status(command, lambda status: status == "running")

    async def until_status(self, command: str, wanted: Callable[[object], bool]) -> Json:
        with trio.fail_after(DEADLINE_S):
            while not wanted((data := await self.command(command))["status"]):
                await trio.sleep(POLL_S)
        return data

    async def output(self, command: str, stream: str = "stdout", **more: object) -> bytes:
        """The stored bytes."""
        parameters = {"stream": stream, **more}
        response = await self.get(f"/commands/{command}/output", params=parameters)
        assert response.status_code == 200, response.text
        return response.content

    @asynccontextmanager
    async def stream(
        self, command: str, *, last_id: int | None = None, path: str | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """The events of a command as they arrive, from after `last_id`."""
        headers = {} if last_id is None else {"Last-Event-ID": str(last_id)}
        async with self.wire(path or f"/commands/{command}/events", headers) as wire:
            assert wire.status == 200, wire
            async with contextlib.aclosing(read_events(wire)) as events:
                yield events

    @asynccontextmanager
    async def wire(self, path: str, headers: Mapping[str, str]) -> AsyncIterator["Wire"]:
        """A GET over a connection of its own, whose body is read as slowly as one likes."""
        url = self.http.base_url
        assert url.port is not None
        async with await trio.open_tcp_stream(url.host, url.port) as socket:
            wire = Wire(socket)
            await wire.request(
                path,
                {"Host": url.host, "Authorization": self.http.headers["Authorization"], **headers},
            )
            yield wire

    async def events(self, command: str, *, last_id: int | None = None) -> list[Event]:
        """All events of a command to the end of its stream."""
        with trio.fail_after(2 * DEADLINE_S):
            async with self.stream(command, last_id=last_id) as events:
                return [event async for event in events]


class Wire:
    """One GET on one connection."""

    def __init__(self, socket: trio.SocketStream) -> None:
        self.socket = socket
        self.status = 0
        self.headers: dict[str, str] = {}
        self._http = h11.Connection(h11.CLIENT)

    async def request(self, path: str, headers: Mapping[str, str]) -> None:
        """Send the request and read the head of the answer."""
        request = h11.Request(method="GET", target=path, headers=list(headers.items()))
        for sent in (request, h11.EndOfMessage()):
            await self.socket.send_all(self._http.send(sent) or b"")
        head = await self._next()
        assert isinstance(head, h11.Response), head
        self.status = head.status_code
        self.headers = {name.decode(): value.decode() for name, value in head.headers}

    async def body(self) -> AsyncIterator[bytes]:
        """The body in pieces. Errors: h11.RemoteProtocolError when it is cut."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def _next(self) -> h11.Response | h11.Data | h11.EndOfMessage:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self.socket.receive_some(65_536))
        assert isinstance(event, (h11.Response, h11.Data, h11.EndOfMessage)), event
        return event


async def read_events(wire: Wire) -> AsyncIterator[Event]:
    """Parse a stream as the HTML standard says, for the fields rdev sends.

    A stream that is cut (a killed server) ends here like one that the server ended.
    """
    rest = b""
    try:
        async with contextlib.aclosing(wire.body()) as body:
            async for data in body:
                *blocks, rest = (rest + data).split(b"\n\n")
                for block in blocks:
                    yield _event(block)
        assert rest == b"", f"the stream ended inside an event: {rest[:100]!r}"
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        pass


def _event(block: bytes) -> Event:
    fields = dict(line.split(b": ", 1) for line in block.split(b"\n"))
    assert fields.keys() <= {b"id", b"event", b"data", b"retry"}, block
    event_id = fields[b"id"].decode() if b"id" in fields else None
    return Event(
        name=fields[b"event"].decode(),
        id=event_id,
        seq=int(event_id) if event_id is not None and event_id.isdigit() else None,
        data=msgspec.json.decode(fields[b"data"], type=Json),
        retry_ms=int(fields[b"retry"]) if b"retry" in fields else None,
    )


@asynccontextmanager
async def open_api(server: Server) -> AsyncIterator[Api]:
    """A client of the server."""
    headers = {"Authorization": f"Bearer {server.key}"}
    async with httpx2.AsyncClient(
        base_url=server.url, headers=headers, timeout=2 * DEADLINE_S, trust_env=False
    ) as http:
        yield Api(http)


def metric(server: Server, name: str, **labels: str) -> float:
    """The value of one series as it is now, 0 where it is not there yet. The server renders at most
    once a second, so this waits until it does again."""
    time.sleep(max(0.0, server.scraped_at_s + 1.05 - time.monotonic()))
    text = httpx2.get(server.url + "/metrics", trust_env=False).text
    server.scraped_at_s = time.monotonic()  # it was rendered before that
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    for line in text.splitlines():
        found, _, rest = line.partition("{") if "{" in line else line.partition(" ")
        series, _, value = rest.rpartition(" ")
        if found == name and wanted <= set(series.rstrip("}").split(",")):
            return float(value or rest)
    return 0.0
