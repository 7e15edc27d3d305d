"""Connections to receivers that are kept open between two requests.

A connection belongs to one exchange at a time, also with HTTP/2: an endpoint has few in flight, and
so no receiver's fault can reach another delivery. Its address was judged when it was dialled; it is
not used again after `age_s`, so a name that moved is followed and judged anew. Bounds: `idle_max`
connections in all, the longest unused is closed first; `idle_s` unused. There is no timer: who
comes next closes what is over.
"""

from dataclasses import dataclass

import httpcore2
import trio

from rdev.adapters.webhooks.stream import BoundedStream

# Scheme, host and port.
Origin = tuple[str, str, int]


@dataclass(slots=True, kw_only=True)
class Connection:
    """One connection and the HTTP spoken on it."""

    origin: Origin
    stream: BoundedStream
    http: httpcore2.AsyncHTTP11Connection | httpcore2.AsyncHTTP2Connection
    judged_at_s: float
    idle_since_s: float = 0
    is_reused: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether its last exchange ended cleanly, so that another one may follow."""
        return self.http.is_idle() and self.http.is_available() and not self.stream.has_ended

    def is_stale(self) -> bool:
        """Whether the receiver has closed it, as far as can be told without asking. With HTTP/2
        something to read may be a late window update; the exchange finds out."""
        if isinstance(self.http, httpcore2.AsyncHTTP2Connection):
            return False
        return self.stream.has_news()


class KeptConnections:
    """The idle ones, longest unused first."""

    def __init__(self, *, idle_max: int, idle_s: float, age_s: float) -> None:
        """Keep the bounds."""
        self._idle_max = idle_max
        self._idle_s = idle_s
        self._age_s = age_s
        self._idle: list[Connection] = []

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, origin: Origin) -> Connection | None:
        """The most lately used one of this origin that may still be used; it is the caller's."""
        self._close_what_is_over()
        for index in range(len(self._idle) - 1, -1, -1):
            if self._idle[index].origin == origin:
                found = self._idle.pop(index)
                if not found.is_stale():
                    found.is_reused = True
                    return found
                found.stream.abort()
        return None

    def put(self, connection: Connection) -> None:
        """Keep it, or close it where it cannot serve again."""
        if not connection.is_idle:
            connection.stream.abort()
            return
        connection.idle_since_s = trio.current_time()
        self._idle.append(connection)
        self._close_what_is_over()

    def close(self) -> None:
        """Close all."""
        while self._idle:
            self._idle.pop().stream.abort()

    def _close_what_is_over(self) -> None:
        now_s = trio.current_time()
        kept = []
        for place, one in enumerate(self._idle):
            over = (
                place < len(self._idle) - self._idle_max
                or now_s - one.idle_since_s >= self._idle_s
                or now_s - one.judged_at_s >= self._age_s
            )
            if over:
                one.stream.abort()
            else:
                kept.append(one)
        self._idle = kept
