"""The one connection that hears NOTIFY: wakeups from other processes.

It is a hint, never the truth: what was missed while disconnected cannot be known, so `on_connect`
fires after each (re)connection and whoever listens looks at the tables once. What bounds it: a
connection that does not hear its own ping within `pong_within_s` is closed and opened again (a
half-open TCP connection would be silent for ever); reconnecting pauses with jitter, up to 5 s.
"""

from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

import psycopg
import trio
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from rdev.adapters.postgres.connection import (
    ConnectionSettings,
    TrioConnection,
    open_connection,
    retry_delay_s,
)

_NOTIFY = "select pg_notify(%s, %s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerStatistics:
    """Whether it hears now; since the start: connections made and lost, notifications, pongs."""

    connected: bool
    connections: int
    losses: int
    notifications: int
    pongs: int


async def notify(connection: AsyncConnection[object], channel: str, payload: str = "") -> None:
    """Send a notification; in a transaction it goes out at COMMIT. `payload` < 8000 bytes."""
    await connection.execute(_NOTIFY, (channel, payload))


class Listener:
    """Subsystem: calls `channels[channel](payload)` for each notification, in order.

    The callbacks are synchronous and quick; one that raises takes the listener down.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        channels: Mapping[str, Callable[[str], None]],
        *,
        on_connect: Callable[[], None],
        ping_every_s: float = 5.0,
        pong_within_s: float = 5.0,
    ) -> None:
        """Opens nothing yet."""
        self._settings = settings.named("listen")
        self._channels = dict(channels)
        self._on_connect = on_connect
        self._ping_every_s, self._pong_within_s = ping_every_s, pong_within_s
        self._stopping = trio.CancelScope()
        self._failures = 0
        self._connected = False
        self._connections = self._losses = self._notifications = self._pongs = 0

    @property
    def name(self) -> str:
        """For supervision and logs."""
        return "listener"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until `stop`. Started at once: without it the queue still has its 1 s tick.

        Survives every `psycopg.Error`: the database gone, restarted, on standby.
        """
        task_status.started()
        with self._stopping:
            while True:
                try:
                    await self._listen_once()
                except psycopg.Error:
                    self._failures += 1
                await trio.sleep(retry_delay_s(self._failures))

    def stop(self) -> None:
        """End `run` now: nothing is in hand that could be lost."""
        self._stopping.cancel()

    def statistics(self) -> ListenerStatistics:
        """What is and what was."""
        return ListenerStatistics(
            connected=self._connected,
            connections=self._connections,
            losses=self._losses,
            notifications=self._notifications,
            pongs=self._pongs,
        )

    async def _listen_once(self) -> None:
        """One connection, from opening to its loss. Errors: `psycopg.Error`, always at the end."""
        connection = await open_connection(self._settings)
        connection.cleanup_s = 0.0  # nothing on it is worth asking the server to cancel
        try:
            with trio.fail_after(self._pong_within_s):
                own = await self._subscribe(connection)
            self._begun()
            while True:
                await self._hear(connection, self._ping_every_s)
                await self._ping(connection, own)
        except trio.TooSlowError:
            raise psycopg.OperationalError("the listening connection is silent") from None
        finally:
            self._losses += self._connected
            self._connected = False
            connection.abort()

    async def _subscribe(self, connection: TrioConnection[TupleRow]) -> str:
        """LISTEN to every channel and to one of its own, whose name it returns."""
        own = f"rdev_ping_{connection.info.backend_pid}"
        for channel in (*self._channels, own):
            await connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        return own

    def _begun(self) -> None:
        self._failures = 0
        self._connected = True
        self._connections += 1
        self._on_connect()

    async def _hear(
        self, connection: TrioConnection[TupleRow], seconds: float, *, at_least: int | None = None
    ) -> None:
        """Pass on what comes for `seconds`, or until `at_least` notifications came.

        Never leaves the iteration early: psycopg would drop the rest of what it has read.
        """
        async with aclosing(connection.notifies(timeout=seconds, stop_after=at_least)) as incoming:
            async for notification in incoming:
                self._pass_on(notification)

    def _pass_on(self, notification: psycopg.Notify) -> None:
        callback = self._channels.get(notification.channel)
        if callback is None:
            self._pongs += 1  # the only other channel listened to
        else:
            self._notifications += 1
            callback(notification.payload)

    async def _ping(self, connection: TrioConnection[TupleRow], own: str) -> None:
        """Errors: `trio.TooSlowError` when it is not heard within `pong_within_s`."""
        pongs = self._pongs
        with trio.fail_after(self._pong_within_s):
            await notify(connection, own)
            while self._pongs == pongs:
                await self._hear(connection, self._pong_within_s, at_least=1)
