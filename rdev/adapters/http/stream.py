"""The SSE routes of one command's stream, served without Quart.

A reader subscribes before anything is read, replays, and then waits while the hub writes to its
client. Unsubscribing is synchronous, whichever way the request ends.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial

import msgspec
import trio
from hypercorn.typing import HTTPScope

from rdev.adapters.http.connection import EXTENSION, Connection
from rdev.adapters.http.exchange import exchange, hold, principal
from rdev.adapters.http.guards import announced
from rdev.adapters.http.plain import Asked, PlainRoute
from rdev.adapters.http.wire import stamp
from rdev.adapters.http.writers import (
    Chunked,
    ClientLeftError,
    DirectWriter,
    SendWriter,
    SlowClientError,
    Writer,
)
from rdev.domain.commands import Command
from rdev.domain.errors import ErrorCode, Fault, RdevError, bad_request
from rdev.domain.ids import CommandId, is_command_id
from rdev.domain.keys import KeyEnd, Principal
from rdev.domain.sse import EventName, frame
from rdev.domain.stream import ConnectedEvent
from rdev.ports.telemetry import Telemetry
from rdev.services.key_watch import Watch
from rdev.services.stream import Fanout, Frames, Signal, Subscription
from rdev.services.stream_views import Views, Watched

# How long a client waits before it comes back, in milliseconds (the contract).
RETRY_MS = 2_000
# Clients that are sent away together come back one after the other, this far apart at most.
RETRY_SPREAD_MS = 2_000
# A client that takes nothing for so long is cut; of HTTP/1.1 the connection's own time holds.
STALL_S = 30.0
# What a client may take before it goes when its key has ended: it leaves within the contract's 5 s.
FAREWELL_S = 0.5
# Larger than any sequence number that can be reached.
_SEQ_DIGITS_MAX = 18

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


def stream_routes(
    commands: Watched, fanout: Fanout, watch_key: WatchKey, telemetry: Telemetry
) -> list[PlainRoute]:
    """`/commands/{id}/events` and `/projects/{id}/events?stream_id=`."""
    streams = _Streams(commands, fanout, watch_key, telemetry)
    return [
        PlainRoute("/commands/{command}/events", streams.of_command),
        PlainRoute("/projects/{project}/events", streams.of_project),
    ]


class _Streams:
    """The two routes."""

    def __init__(
        self, commands: Watched, fanout: Fanout, watch_key: WatchKey, telemetry: Telemetry
    ) -> None:
        self._views = Views(commands)
        self._fanout = fanout
        self._watch_key = watch_key
        self._telemetry = telemetry
        self._chunked = Chunked()
        self._sent_away = 0

    async def of_command(self, asked: Asked) -> None:
        """The events of a command."""
        await self._answer(asked, asked.fields["command"], project=None)

    async def of_project(self, asked: Asked) -> None:
        """The same stream, named in the query."""
        stream_id = asked.parameter("stream_id")
        if stream_id is None:
            message = "the parameter stream_id is required"
            raise bad_request([Fault(pointer="", message=message)])
        await self._answer(asked, stream_id, project=asked.fields["project"])

    async def _answer(self, asked: Asked, text: str, *, project: str | None) -> None:
        """Check, then stream. Errors: NOT_FOUND, GONE, BAD_REQUEST, SERVICE_UNAVAILABLE; none
        after the head."""
        after = _after(asked)
        if not is_command_id(text):
            raise _unknown(text)
        # Before the command is read: what is published from here on is not missed.
        with self._fanout.subscribe(CommandId(text), after=after) as reader:
            asked_at_s = trio.current_time()
            view = await self._views.of(CommandId(text), after=after)
            command = view.command
            if project is not None and command.project != project:
                raise _unknown(text)
            if command.status.is_terminal and after >= command.last_seq:
                await asked.send({"type": "http.response.start", "status": 204, "headers": []})
                await asked.send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            _check_history(command, after=after, oldest_seq=view.oldest_seq)
            hold()
            reader.log_reaches(command.last_seq)
            if view.read_at_s >= asked_at_s:
                reader.log_ends(command.last_seq)
            connected = ConnectedEvent(
                project=command.project,
                stream_id=command.id,
                reconnecting=after > 0,
                oldest_seq=view.oldest_seq or 1,
                last_seq=command.last_seq,
                status=command.status,
            )
            first = frame(EventName.CONNECTED, _encode(connected), None, RETRY_MS)
            with self._telemetry.stream(command.project):
                await self._stream(asked, reader, command, first)

    async def _stream(
        self, asked: Asked, reader: Subscription, command: Command, first: bytes
    ) -> None:
        """The stream from `connected` to `complete`, or to the reason why it ends earlier."""
        count = partial(self._telemetry.events_sent, command.project)
        reader.topic.tally = count
        headers = [*_HEADERS, _CLOSE] if _is_http_1(asked.scope) else _HEADERS
        await asked.send({"type": "http.response.start", "status": 200, "headers": headers})
        if asked.scope["method"] == "HEAD":
            await asked.send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await asked.send({"type": "http.response.body", "body": first, "more_body": True})
        async with _writer(asked, self._chunked) as writer:
            with trio.CancelScope() as staying:

                def leave(reason: KeyEnd) -> None:
                    staying.deadline = trio.current_time() + FAREWELL_S
                    reader.dismiss()

                with self._watch_key(principal(), leave) as key:
                    try:
                        await self._follow(reader, writer, count, key)
                        await writer.end()
                        return
                    except SlowClientError:
                        pass  # what is left to say to it follows
            reason = key.reason or "slow_consumer"
            await writer.part(_frame(EventName.DISCONNECTING, {"reason": reason}, RETRY_MS))

    async def _follow(
        self, reader: Subscription, writer: Writer, count: Callable[[str, int], None], key: Watch
    ) -> None:
        """Write what the hub does not write itself, until there is nothing more to say."""
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
                    for event_type, events in item.counts.items():
                        count(event_type, events)
                    await writer.write(item.data)
                case Signal.BLOCKED:
                    await writer.flush()
                case Signal.HEARTBEAT:
                    beat = _frame(EventName.HEARTBEAT, {"timestamp": stamp(now())})
                    await writer.write(beat)
                case Signal.DISMISSED:
                    told = {"reason": key.reason or "draining"}
                    await writer.write(_frame(EventName.DISCONNECTING, told, self._retry_ms()))
                    return
                case Signal.END:
                    return

    def _retry_ms(self) -> int:
        """When a client that is sent away comes back: spread evenly, whoever they are."""
        self._sent_away += 1
        # Multiples of the golden ratio fill an interval evenly, however many there are.
        return RETRY_MS // 2 + int(self._sent_away * 0.618_034 % 1 * RETRY_SPREAD_MS)


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
                yield SendWriter(asked.send, write_timeout_s=STALL_S)
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


def _check_history(command: Command, *, after: int, oldest_seq: int | None) -> None:
    """Errors: GONE where the events after `after` are pruned, or were never there."""
    if oldest_seq is None or after + 1 < oldest_seq:
        details: dict[str, int | str] = {} if oldest_seq is None else {"oldest_seq": oldest_seq}
        message = "the events after this id are no longer stored"
        raise RdevError(ErrorCode.GONE, message, details=details)
    if after > command.last_seq:
        message = f"the stream has no event {after} yet; its last is {command.last_seq}"
        raise RdevError(ErrorCode.GONE, message, details={"oldest_seq": oldest_seq})


def _after(asked: Asked) -> int:
    """The last event the client has seen: `Last-Event-ID`, else `?after=`, else 0."""
    text = asked.header(b"last-event-id") or asked.parameter("after") or "0"
    if not text.isascii() or not text.isdigit() or len(text) > _SEQ_DIGITS_MAX:
        message = "Last-Event-ID (or the parameter after) must be a sequence number"
        raise bad_request([Fault(pointer="", message=message)])
    return int(text)


def _unknown(text: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no command {text!r}")
