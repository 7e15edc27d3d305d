"""Following a stream to its end: what every event stream over HTTP has in common.

The head and `connected`, then what the hub does not write itself: replayed events, heartbeats, and
why the stream ends. Bounded by the client's patience and the key's life; what a slow client is
given is the writers' business.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import partial

import msgspec
import trio
from hypercorn.typing import HTTPScope

from rdev.adapters.http.connection import EXTENSION, HURRY, Connection
from rdev.adapters.http.exchange import exchange, principal
from rdev.adapters.http.guards import announced
from rdev.adapters.http.plain import Asked
from rdev.adapters.http.wire import stamp
from rdev.adapters.http.writers import (
    Chunked,
    ClientLeftError,
    DirectWriter,
    SendWriter,
    SlowClientError,
    Writer,
)
from rdev.domain.errors import RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.keys import KeyEnd, Principal
from rdev.domain.sse import EventName, frame
from rdev.ports.telemetry import Telemetry
from rdev.services.key_watch import Watch
from rdev.services.stream import Frames, Signal
from rdev.services.stream_reader import Key, Subscription

# How long a client waits before it comes back, in milliseconds (the contract).
RETRY_MS = 2_000
# Clients that are sent away together come back one after the other, this far apart at most.
RETRY_SPREAD_MS = 2_000
# A client that takes nothing for so long is cut; of HTTP/1.1 the connection's own time holds.
STALL_S = 30.0
# What a client may take before it goes when its key has ended: it leaves within the contract's 5 s.
FAREWELL_S = 0.5
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]
# Nothing of a finished stream's connection is used again. HTTP/2 has no such header.
_CLOSE = (b"connection", b"close")

_encode = msgspec.json.Encoder().encode


# Watches the key of a request for the length of the block (`KeyWatch.watch`).
WatchKey = Callable[[Principal, Callable[[KeyEnd], None]], AbstractContextManager[Watch]]
# Watches what a stream is about; what is called takes the reason why there is no more of it.
WatchSubject = Callable[[Callable[[str], None]], AbstractContextManager[None]]


def for_ever(_: Callable[[str], None]) -> AbstractContextManager[None]:
    """Of what lasts as long as its stream."""
    return nullcontext()


class Followers:
    """Everybody who follows a stream here."""

    def __init__(self, watch_key: WatchKey, telemetry: Telemetry) -> None:
        """Nobody does yet."""
        self._watch_key = watch_key
        self._telemetry = telemetry
        self._chunked = Chunked()
        self._sent_away = 0

    async def follow(
        self,
        asked: Asked,
        reader: Subscription[Key],
        project: ProjectId,
        first: bytes,
        *,
        beat_id: Callable[[], str | None] = lambda: None,
        watch_subject: WatchSubject = for_ever,
    ) -> None:
        """The answer: the stream from `first` to its end, or to the reason why it ends earlier.

        `project` is the label under which it is counted; `beat_id` gives heartbeats their ids;
        `watch_subject` tells when there is nothing more to follow.
        """
        with self._telemetry.stream(project):
            reader.topic.tally = partial(self._telemetry.events_sent, project)
            await self._stream(asked, reader, project, first, beat_id, watch_subject)

    async def _stream(
        self,
        asked: Asked,
        reader: Subscription[Key],
        project: ProjectId,
        first: bytes,
        beat_id: Callable[[], str | None],
        watch_subject: WatchSubject,
    ) -> None:
        headers = [*_HEADERS, _CLOSE] if _is_http_1(asked.scope) else _HEADERS
        await asked.send({"type": "http.response.start", "status": 200, "headers": headers})
        if asked.scope["method"] == "HEAD":
            await asked.send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await asked.send({"type": "http.response.body", "body": first, "more_body": True})
        async with _writer(asked, self._chunked) as writer:
            why: list[str] = []
            with trio.CancelScope() as staying:

                def leave(reason: str) -> None:
                    why.append(reason)
                    staying.deadline = trio.current_time() + FAREWELL_S
                    writer.hurry(FAREWELL_S)
                    reader.dismiss()

                with self._watch_key(principal(), leave), watch_subject(leave):
                    try:
                        await self._write(reader, writer, project, why, beat_id)
                        await writer.end()
                        return
                    except SlowClientError:  # what is left to say to it follows
                        self._telemetry.slow_reader_cut(project)
            reason = why[0] if why else "slow_consumer"
            await writer.part(_frame(EventName.DISCONNECTING, {"reason": reason}, RETRY_MS))

    async def _write(
        self,
        reader: Subscription[Key],
        writer: Writer,
        project: ProjectId,
        why: Sequence[str],
        beat_id: Callable[[], str | None],
    ) -> None:
        """Write what the hub does not write itself, until there is nothing more to say; `why` is
        not empty where it must leave."""
        now = exchange().now
        while True:
            try:
                item = await reader.receive(writer.outlet)
            except RdevError as error:
                # The head is out: what went wrong can only be said in the stream.
                told = {"code": error.code, "message": error.message}
                await writer.write(_frame(EventName.ERROR, told))
                return
            match item:
                case Frames():
                    self._count(project, item, is_replay=reader.from_log)
                    if item.data:  # a stretch in which nothing concerns it has none
                        await writer.write(item.data)
                case Signal.BLOCKED:
                    await writer.flush()
                case Signal.HEARTBEAT:
                    told = {"timestamp": stamp(now())}
                    await writer.write(frame(EventName.HEARTBEAT, _encode(told), beat_id()))
                case Signal.DISMISSED:
                    told = {"reason": why[0] if why else "draining"}
                    await writer.write(_frame(EventName.DISCONNECTING, told, self._retry_ms()))
                    return
                case Signal.END:
                    return

    def _count(self, project: ProjectId, given: Frames, *, is_replay: bool) -> None:
        for event_type, events in given.counts.items():
            self._telemetry.events_sent(project, event_type, events)
        if is_replay:
            self._telemetry.events_replayed(project, sum(given.counts.values()))

    def _retry_ms(self) -> int:
        """When a client that is sent away comes back: spread evenly, whoever they are."""
        self._sent_away += 1
        # Multiples of the golden ratio fill an interval evenly, however many there are.
        return RETRY_MS // 2 + int(self._sent_away * 0.618_034 % 1 * RETRY_SPREAD_MS)


def last_ids(asked: Asked) -> list[str]:
    """What the client says of the last event it has seen: `Last-Event-ID`, and `?after=` behind it.
    The first counts; the other may be wrong no more than it."""
    return [text for text in (asked.header(b"last-event-id"), asked.parameter("after")) if text]


@asynccontextmanager
async def _writer(asked: Asked, chunked: Chunked) -> AsyncIterator[Writer]:
    """Who writes from now on; the block is left when the client goes."""
    if EXTENSION in asked.scope["extensions"] and not announced(asked.scope)[1]:
        connection = asked.scope["extensions"][EXTENSION]["connection"]
        assert isinstance(connection, Connection)
        with _until_left(), trio.CancelScope() as here:
            yield DirectWriter(connection, connection.take(here.cancel), chunked)
            await trio.lowlevel.checkpoint()  # those of the block are not in sight of the linter
    else:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_left, asked, nursery.cancel_scope)
            with _until_left():
                hurry = asked.scope["extensions"].get(HURRY, {}).get("hurry")
                yield SendWriter(asked.send, write_timeout_s=STALL_S, hurry=hurry)
            nursery.cancel_scope.cancel()


@contextmanager
def _until_left() -> Iterator[None]:
    """A client may go at any time; that is no fault."""
    try:
        yield
    except ClientLeftError:
        pass


async def _cancel_when_left(asked: Asked, scope: trio.CancelScope) -> None:
    while (await asked.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _is_http_1(scope: HTTPScope) -> bool:
    return scope["http_version"] in ("1.0", "1.1")


def _frame(name: EventName, data: object, retry_ms: int | None = None) -> bytes:
    """An event without id."""
    return frame(name, _encode(data), None, retry_ms)
