"""The HTTP server: listeners, connections, and their end.

Bounds: connections, and the grace that open requests get at shutdown. Runs hypercorn's connections
on listeners of its own, because hypercorn's own loop (`hypercorn.trio.serve`) waits for ever for a
client that stopped reading and gives no hold on its connections.
"""

import errno
import logging
import os
import resource
import socket
import ssl
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from email.utils import formatdate
from time import CLOCK_REALTIME, clock_gettime

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework
from hypercorn.utils import repr_socket_addr

from rdev.adapters.http import frames  # noqa: F401  (its guards are in place from here on)
from rdev.adapters.http.connection import Connection, Stream
from rdev.adapters.http.heads import Refusal, without_words
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.telemetry import Telemetry

_log = logging.getLogger("rdev.http")

# Connections the kernel keeps for us while we accept; the kernel caps it at net.core.somaxconn.
_BACKLOG = 1024
_TLS_HANDSHAKE_TIMEOUT_S = 10.0
# How long a client may take, at a stop, for 64 KiB that wait for it.
_WRITE_AT_STOP_S = 2.0
_UNIX = "unix:"

# Accepting fails for these until something is closed.
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where the certificate chain and its key are (PEM)."""

    cert_file: str
    key_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionTimes:
    """How long a connection may do nothing, in seconds."""

    # Between two requests. Longer than the 60 s that load balancers keep theirs.
    keep_alive_s: float = 75.0
    # Until the head of a request is complete.
    header_s: float = 10.0
    # Until the client takes the next 64 KiB, and until it acknowledges what was sent.
    write_s: float = 30.0


class HttpServer:
    """Serves an ASGI app on the given addresses.

    At `stop` it accepts no more, idle connections close at once, requests under way have `grace_s`;
    what is left then is cancelled and its sockets closed, also where a client does not read.
    """

    name = "http"

    def __init__(
        self,
        *,
        app: ASGIFramework,
        bind: Sequence[str],
        grace_s: float,
        telemetry: Telemetry,
        refusal: Refusal = without_words,
        tls: TlsFiles | None = None,
        times: ConnectionTimes | None = None,
        max_connections: int = 12_000,
    ) -> None:
        """Opens nothing. `bind`: `host:port`, `[v6]:port` or `unix:path`; port 0 picks one.
        `refusal` answers requests that cannot be read."""
        self._app = app
        self._bind = list(bind)
        self._grace_s = grace_s
        self._telemetry = telemetry
        self._refusal = refusal
        self._times = times or ConnectionTimes()
        self._max_connections = max_connections
        self._context = WorkerContext(None)
        self._config = _Config(keep_alive_s=self._times.keep_alive_s, tls=tls)
        self._one_closed = trio.Event()
        self._accepting = trio.CancelScope()
        self._open: set[Connection] = set()
        self._bound: tuple[str, ...] = ()

    @property
    def bound(self) -> tuple[str, ...]:
        """Where it listens, as URLs with the real ports; empty before `started`."""
        return self._bound

    @property
    def open_connections(self) -> int:
        """Connections that exist now."""
        return len(self._open)

    def stop(self) -> None:
        """Accept no more and let `run` come to its end. Synchronous, idempotent."""
        self._accepting.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`; started once it listens.

        Errors, before it has started: CONFLICT when an address cannot be bound, BAD_REQUEST for TLS
        files that cannot be used.
        Cancellation: all sockets are closed at once. Blocks: at most `grace_s` after `stop`.
        """
        raise_descriptor_limit()
        with ExitStack() as cleanup:
            listeners = self._listen(cleanup)
            async with trio.open_nursery() as connections:
                try:
                    with self._accepting:
                        async with trio.open_nursery() as accepting:
                            for listener in listeners:
                                accepting.start_soon(self._accept, listener, connections)
                            task_status.started()
                    await self._finish()
                    connections.cancel_scope.cancel()
                finally:
                    # A task inside a shielded write is reached by no cancellation.
                    for connection in tuple(self._open):
                        connection.abort()

    async def _finish(self) -> None:
        """Let what is under way come to its end, for `grace_s` at most.

        A client that does not read is not waited for: it would take the whole grace.
        """
        await self._context.terminated.set()
        for connection in self._open:
            connection.hurry(_WRITE_AT_STOP_S)
        with trio.move_on_after(self._grace_s):
            while self._open:
                self._one_closed = trio.Event()
                await self._one_closed.wait()
        if self._open:
            _log.warning("connections closed by force", extra={"connections": len(self._open)})

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
        """Accept until cancelled. Our own, because the socket object itself is needed
        (`Connection.take`), which trio's listeners hide."""
        tls = _tls_context(self._config)
        with listener:
            while True:
                try:
                    accepted, _ = listener.accept()
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(listener)
                except OSError as error:
                    # Nothing left to accept with; or that client has gone already.
                    is_short = error.errno in _OUT_OF_RESOURCES
                    if is_short:
                        _log.warning("cannot accept", extra={"error": error.strerror})
                    await trio.sleep(_ACCEPT_PAUSE_S if is_short else 0)
                else:
                    self._begin(accepted, tls, connections)
                    await trio.lowlevel.checkpoint()

    def _begin(
        self, accepted: socket.socket, tls: ssl.SSLContext | None, connections: trio.Nursery
    ) -> None:
        """Serve a connection, or close it where there are too many."""
        if len(self._open) >= self._max_connections:
            self._telemetry.limit_checked("connections", refused=True)
            accepted.close()
            return
        accepted.setblocking(False)
        connection = self._connection(accepted, tls)
        self._open.add(connection)
        connections.start_soon(self._serve, connection)

    def _connection(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> Connection:
        plain = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
        stream: Stream = plain
        if tls is not None:
            stream = trio.SSLStream(plain, tls, server_side=True, https_compatible=True)
        return Connection(
            self._app,
            self._config,
            self._context,
            stream,
            header_timeout_s=self._times.header_s,
            write_timeout_s=self._times.write_s,
            refusal=self._refusal,
            plain=accepted if tls is None else None,
        )

    async def _serve(self, connection: Connection) -> None:
        """One connection, for its whole life. Its faults are its own: logged, nobody else's."""
        try:
            await connection.run()
        except Exception:  # noqa: BLE001  # one client's fault must not end all others
            _log.exception("connection failed")
        finally:
            # Also after a cancellation, where hypercorn skips its own close (hypercorn#106).
            connection.abort()
            self._open.discard(connection)
            self._one_closed.set()

    def _listen(self, cleanup: ExitStack) -> list[socket.socket]:
        """Open all listeners; `cleanup` closes them, also where the second cannot be opened."""
        scheme = "https" if _tls_context(self._config) else "http"
        listeners: list[socket.socket] = []
        bound = []
        for bind in self._bind:
            opened = cleanup.enter_context(_opened(bind, self._times.write_s))
            if opened.family is socket.AF_UNIX:
                cleanup.callback(_unlink, bind.removeprefix(_UNIX))
            bound.append(f"{scheme}://{repr_socket_addr(opened.family, opened.getsockname())}")
            listeners.append(opened)
        self._bound = tuple(bound)
        return listeners


class _Config(Config):
    """Hypercorn's settings, with headers that are made once a second."""

    def __init__(self, *, keep_alive_s: float, tls: TlsFiles | None) -> None:
        super().__init__()
        self.accesslog = None  # the shell writes one structured line per request
        self.errorlog = logging.getLogger("hypercorn.error")
        self.keep_alive_timeout = keep_alive_s
        self.ssl_handshake_timeout = _TLS_HANDSHAKE_TIMEOUT_S
        # No connection is closed for its number of requests alone: a close under load costs the
        # client a round trip and, with bad timing, a request.
        self.keep_alive_max_requests = 1_000_000
        self.include_server_header = False
        # The same head on both versions of HTTP.
        self.h2_max_header_list_size = self.h11_max_incomplete_size
        if tls is not None:
            self.certfile, self.keyfile = tls.cert_file, tls.key_file
        self._second = -1
        self._date: list[tuple[bytes, bytes]] = []

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """The `Date` header; on every response, so it is not formatted for every response."""
        moment = clock_gettime(CLOCK_REALTIME)
        if int(moment) != self._second:
            self._second = int(moment)
            self._date = [(b"date", formatdate(moment, usegmt=True).encode())]
        return self._date


def _tls_context(config: Config) -> ssl.SSLContext | None:
    """What hypercorn makes of the certificate and its key. Errors: BAD_REQUEST for files that
    cannot serve."""
    try:
        return config.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        why = error.strerror or str(error)
        message = f"RDEV_TLS_CERT_FILE, RDEV_TLS_KEY_FILE: cannot be used: {why}"
        raise RdevError(ErrorCode.BAD_REQUEST, message) from error


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as the hard limit allows.

    The soft limit is 1024 on most systems, which is 1,000 clients.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _opened(bind: str, user_timeout_s: float) -> socket.socket:
    """A listening socket. Errors: CONFLICT, naming the address."""
    try:
        return listening_socket(bind, user_timeout_s)
    except OSError as error:
        message = f"cannot listen on {bind}: {error.strerror}; choose another RDEV_BIND"
        raise RdevError(ErrorCode.CONFLICT, message) from error


def listening_socket(bind: str, user_timeout_s: float) -> socket.socket:
    """A socket that listens on `host:port`, `[v6]:port` or `unix:path`. Errors: OSError."""
    if bind.startswith(_UNIX):
        path = bind.removeprefix(_UNIX)
        if _is_socket(path):
            _unlink(path)  # left behind by a process that was killed
        opened = socket.socket(socket.AF_UNIX)
        return _listening(opened, path)
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Inherited by the connections: the kernel gives up on a peer that acknowledges nothing.
    user_timeout_ms = int(user_timeout_s * 1000)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
    return _listening(opened, (host, int(port)))


def _listening(opened: socket.socket, address: str | tuple[str, int]) -> socket.socket:
    """The socket, bound and listening; closed when that fails."""
    try:
        opened.bind(address)
        opened.listen(_BACKLOG)
        opened.setblocking(False)
    except OSError:
        opened.close()
        raise
    return opened


def _is_socket(path: str) -> bool:
    """Whether a socket lies there."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _unlink(path: str) -> None:
    """Remove the file; somebody else may have done it."""
    with suppress(FileNotFoundError):
        os.unlink(path)
