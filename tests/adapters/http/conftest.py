"""A real server on a free loopback port, and a raw client that shows every byte."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count

import pytest
import trio
from hypercorn.typing import ASGIFramework
from quart import Blueprint

from rdev.adapters.http.access import Access, Route
from rdev.adapters.http.app import HttpLimits, Shell, build_app
from rdev.adapters.http.server import ConnectionTimes, HttpServer
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, KeyId, ProjectId
from rdev.domain.keys import Grant, Principal, Scope
from rdev.ports.telemetry import AuthFailure, Silence

KEY = "rdev_sk_test"
NOON = datetime(2026, 1, 15, 12, 0, 0, 123_456, tzinfo=UTC)

# Long enough for a machine under load; no test waits for it unless it fails.
DEADLINE_S = 20.0


HOLDER = Principal(
    key_id=KeyId("key_1"), name="the one key", grant=Grant(scopes=frozenset({Scope.ADMIN}))
)


async def authenticate(credential: str | None, client_ip: str) -> Principal:
    """Accepts KEY; knows one key of each bad kind."""
    if credential == KEY:
        return HOLDER
    if credential == "revoked":
        raise RdevError(ErrorCode.KEY_REVOKED, "the key was revoked")
    raise RdevError(ErrorCode.UNAUTHORIZED, "a key is needed")


async def project_of(command: CommandId) -> ProjectId | None:
    """No command is known here."""
    return None


async def check_project(project: ProjectId) -> str:
    """Every project but one is known here."""
    if project == "nowhere":
        raise RdevError(ErrorCode.NOT_FOUND, "there is no project 'nowhere'")
    return f"uid-of-{project}"


class AnyScope(dict[Route, Access]):
    """A route table in which every route is declared."""

    def __contains__(self, route: object) -> bool:
        return True

    def __missing__(self, route: Route) -> Access:
        return Access(scopes=(Scope.ADMIN,))


class Noted(Silence):
    """Telemetry that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[tuple[str, str]] = []
        self.finished: list[tuple[str, str, int]] = []
        self.latencies_s: list[float] = []
        self.auth: list[AuthFailure | None] = []
        self.refused: list[str] = []

    def request_started(self, method: str, path: str) -> None:
        self.started.append((method, path))

    def request_finished(self, method: str, path: str, status: int, latency_s: float) -> None:
        self.finished.append((method, path, status))
        self.latencies_s.append(latency_s)

    def authenticated(self, failure: AuthFailure | None) -> None:
        self.auth.append(failure)

    def limit_checked(self, limit: str, *, refused: bool) -> None:
        if refused:
            self.refused.append(limit)


@dataclass(slots=True)
class Reply:
    """A response as it came."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """The value of the header, or None."""
        return next((v for n, v in self.headers if n == name.lower()), None)

    def json(self) -> dict:
        """The body, parsed."""
        return json.loads(self.body)


class Wire:
    """One raw connection to the server."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._unread = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def head(self) -> Reply:
        """The head of the next response."""
        while b"\r\n\r\n" not in self._unread:
            await self._more()
        head, self._unread = self._unread.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = [(n.lower(), v.strip()) for n, v in (line.split(":", 1) for line in lines)]
        return Reply(int(first.split()[1]), headers)

    async def reply(self) -> Reply:
        """The next response with a Content-Length."""
        found = await self.head()
        length = int(found.header("content-length") or 0)
        while len(self._unread) < length:
            await self._more()
        found.body, self._unread = self._unread[:length], self._unread[length:]
        return found

    async def until(self, part: bytes) -> None:
        """Read on until the part has come."""
        while part not in self._unread:
            await self._more()
        self._unread = self._unread.split(part, 1)[1]

    async def closed(self) -> bytes:
        """Read to the end of the stream; what came until then."""
        while True:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return self._unread
            self._unread += data

    async def _more(self) -> None:
        data = await self.stream.receive_some(65536)
        assert data, f"the server closed after {self._unread!r}"
        self._unread += data


@dataclass(slots=True, kw_only=True)
class Site:
    """A running server and what it told."""

    server: HttpServer
    telemetry: Noted
    shell: Shell | None = None
    done: trio.Event = field(default_factory=trio.Event)
    # Around the server's run: what app.py cancels when its patience ends.
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Wire]:
        """A connection of its own, closed at the end."""
        port = int(self.server.bound[0].rsplit(":", 1)[1])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            yield Wire(stream)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        key: str | None = KEY,
        **headers: str,
    ) -> Reply:
        """One request on a connection of its own; `a_b` in a header's name is `a-b`."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
        if key is not None:
            lines.append(f"X-API-Key: {key}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        async with self.connect() as wire:
            await wire.send("\r\n".join([*lines, "", ""]).encode() + (body or b""))
            return await wire.reply()


Serve = Callable[..., Awaitable[Site]]


@pytest.fixture
def deadline_s() -> float:
    """How long a test may take; a test of the real clock asks for more."""
    return DEADLINE_S


@pytest.fixture
async def serve(nursery: trio.Nursery, deadline_s: float) -> AsyncIterator[Serve]:
    """Starts servers that end with the test."""

    async def start(
        *routes: Blueprint,
        app: ASGIFramework | None = None,
        limits: HttpLimits | None = None,
        times: ConnectionTimes | None = None,
        grace_s: float = 5.0,
        bind: str = "127.0.0.1:0",
        max_connections: int = 1000,
        **options: object,
    ) -> Site:
        telemetry = Noted()
        numbers = count(1)
        shell = app or build_app(
            routes=routes,
            telemetry=telemetry,
            now=lambda: NOON,
            new_request_id=lambda: f"req-{next(numbers)}",
            limits=limits,
            **{
                "authenticate": authenticate,
                "project_of": project_of,
                "access": AnyScope(),
                **options,
            },
        )
        server = HttpServer(
            app=shell,
            bind=[bind],
            grace_s=grace_s,
            telemetry=telemetry,
            **({"refusal": shell.unreadable} if isinstance(shell, Shell) else {}),
            times=times,
            max_connections=max_connections,
        )
        site = Site(server=server, telemetry=telemetry, shell=shell)

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with site.scope:
                await server.run(task_status=task_status)
            site.done.set()

        await nursery.start(run)
        return site

    with trio.fail_after(deadline_s):
        yield start


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Waits for a condition of the real world; the test's deadline bounds it."""

    async def wait(condition: Callable[[], bool]) -> None:
        while not condition():
            await trio.sleep(0.005)

    return wait
