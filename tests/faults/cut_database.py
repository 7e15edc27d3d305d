"""A road to PostgreSQL that breaks: every connection is cut after some number of bytes.

Owns the listener and the open connections. A cut may fall into what is asked (the statement comes
in half, or not at all) or into what is answered (it was done, and nobody is told): both ends are
closed. Bounded by the connections that the pool under test keeps.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import trio
from psycopg.conninfo import conninfo_to_dict, make_conninfo

CHUNK_BYTES = 65_536
# Of the greeting of a connection, that nothing but patience depends on: it is let through.
GREETING_ASKED_BYTES, GREETING_TOLD_BYTES = 300, 500


@dataclass(slots=True, kw_only=True)
class Road:
    """Where the connections go; `asked` and `told` count the cuts of either direction."""

    dsn: str
    folder: Path
    luck: random.Random
    mean_bytes: int = 6_000
    asked: int = 0
    told: int = 0
    _socket: Path = field(init=False)

    def __post_init__(self) -> None:
        self._socket = self.folder / ".s.PGSQL.5432"

    @property
    def broken_dsn(self) -> str:
        """The same database over this road."""
        given = conninfo_to_dict(self.dsn)
        return make_conninfo("", **(given | {"host": str(self.folder), "port": "5432"}))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(str(self._socket))
        listening.listen(64)
        listener = trio.SocketListener(listening)
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, [listener])
            task_status.started()

    async def _serve(self, client: trio.SocketStream) -> None:
        """One connection to its end."""
        is_asked = self.luck.random() < 0.5
        budget = int(self.luck.expovariate(1 / self.mean_bytes))
        async with client, await self._open() as server, trio.open_nursery() as nursery:

            async def pump(
                source: trio.abc.Stream, sink: trio.abc.Stream, left: int | None
            ) -> None:
                try:
                    while data := await source.receive_some(CHUNK_BYTES):
                        await sink.send_all(data if left is None else data[:left])
                        left = None if left is None else left - len(data)
                        if left is not None and left < 0:
                            self._count(is_asked=is_asked)
                            break
                except (trio.BrokenResourceError, trio.ClosedResourceError):  # the other one's cut
                    pass
                nursery.cancel_scope.cancel()

            asked = GREETING_ASKED_BYTES + budget if is_asked else None
            told = None if is_asked else GREETING_TOLD_BYTES + budget
            nursery.start_soon(pump, client, server, asked)
            nursery.start_soon(pump, server, client, told)

    def _count(self, *, is_asked: bool) -> None:
        self.asked += is_asked
        self.told += not is_asked

    async def _open(self) -> trio.SocketStream:
        given = conninfo_to_dict(self.dsn)
        host, port = str(given["host"]), int(given.get("port") or 5432)
        if host.startswith("/"):
            return await trio.open_unix_socket(f"{host}/.s.PGSQL.{port}")
        return await trio.open_tcp_stream(host, port)
