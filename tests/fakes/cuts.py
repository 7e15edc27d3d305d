"""A TCP port in front of a server that cuts, splits or silences what the server sends."""

from dataclasses import dataclass, field

import trio


@dataclass
class CuttingProxy:
    """Forwards 127.0.0.1:`port` to `target`. Fields are read for each piece, so they may change.

    `cut_after_bytes`: a connection that carried so many from the server is dropped, in mid-frame or
    not. `piece_bytes`: at most so many at a time. `is_silent`: nothing passes, nothing is closed.
    """

    target: int
    cut_after_bytes: int | None = None
    piece_bytes: int = 65_536
    pause_s: float = 0
    is_silent: bool = False
    is_refusing: bool = False
    port: int = 0
    accepted: int = 0
    cuts: int = 0
    passed_bytes: int = 0  # from the server, all connections
    _open: list[trio.CancelScope] = field(default_factory=list)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    def cut_all(self) -> None:
        """Drop every connection now."""
        for scope in self._open:
            scope.cancel()

    async def _serve(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        if self.is_refusing:
            await client.aclose()
            return
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:  # nobody is there: nor are we
            await client.aclose()
            return
        async with client, server, trio.open_nursery() as nursery:
            self._open.append(nursery.cancel_scope)
            nursery.start_soon(self._up, client, server, nursery.cancel_scope)
            await self._down(server, client)
            nursery.cancel_scope.cancel()
        self._open.remove(nursery.cancel_scope)

    async def _up(
        self, client: trio.SocketStream, server: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            async for data in client:
                if self.is_silent:
                    await trio.sleep_forever()
                await server.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()

    async def _down(self, server: trio.SocketStream, client: trio.SocketStream) -> None:
        carried = 0
        try:
            while data := await server.receive_some(self.piece_bytes):
                if self.is_silent:
                    await trio.sleep_forever()
                if self.cut_after_bytes is not None and carried + len(data) > self.cut_after_bytes:
                    await client.send_all(data[: self.cut_after_bytes - carried])
                    self.cuts += 1
                    return
                await client.send_all(data)
                carried += len(data)
                self.passed_bytes += len(data)
                if self.pause_s:
                    await trio.sleep(self.pause_s)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
