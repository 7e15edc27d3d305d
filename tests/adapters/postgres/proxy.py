"""A TCP port in front of a database that can go silent, the way a dead network does."""

import trio
from psycopg.conninfo import conninfo_to_dict, make_conninfo

# Of a connection's first bytes so many are kept, of both directions: its startup packet is there.
FIRST_BYTES = 1_024


class TcpProxy:
    """Forwards 127.0.0.1:`port` to the database; `dsn` is the way through it."""

    def __init__(self, dsn: str) -> None:
        self._target = conninfo_to_dict(dsn)
        self._heard: trio.Event = trio.Event()
        self._heard.set()
        self.accepted = 0
        self.refusing = False  # hang up on whoever connects
        # Whose first words hold this gets no answer any more, while it is set.
        self.silenced: bytes | None = None
        self.port = 0

    @property
    def dsn(self) -> str:
        params = {k: v for k, v in self._target.items() if k not in ("host", "hostaddr", "port")}
        return make_conninfo("", **{**params, "host": "127.0.0.1", "port": self.port})

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    def black_hole(self) -> None:
        """From now on nothing passes, in either direction, and nothing is closed."""
        self._heard = trio.Event()

    def open_again(self) -> None:
        """New connections pass; those of before stay silent for ever."""
        self._heard = trio.Event()
        self._heard.set()

    async def _serve(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        if self.refusing:
            await client.aclose()
            return
        heard = self._heard
        await heard.wait()
        async with client, await self._connect() as server, trio.open_nursery() as nursery:
            said = bytearray()
            nursery.start_soon(self._pump, client, server, heard, said)
            nursery.start_soon(self._pump, server, client, heard, said)

    async def _connect(self) -> trio.SocketStream:
        host = str(self._target.get("host") or "127.0.0.1")
        port = int(self._target.get("port") or 5432)
        if host.startswith("/"):
            return await trio.open_unix_socket(f"{host}/.s.PGSQL.{port}")
        return await trio.open_tcp_stream(host, port)

    async def _pump(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        heard: trio.Event,
        said: bytearray,
    ) -> None:
        try:
            async for data in source:
                if heard is not self._heard:
                    await trio.sleep_forever()
                if len(said) < FIRST_BYTES:
                    said += data
                if self.silenced is None or self.silenced not in said:
                    await sink.send_all(data)
            if heard is not self._heard:
                await trio.sleep_forever()
            await sink.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await source.aclose()
