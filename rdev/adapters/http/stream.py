"""The SSE routes of one command's stream."""

from collections.abc import AsyncGenerator, Callable
from datetime import datetime

import msgspec
from quart import Blueprint, Response, request

from rdev.adapters.http.envelope import no_content, stream
from rdev.adapters.http.exchange import exchange
from rdev.adapters.http.query import text_of
from rdev.adapters.http.wire import stamp
from rdev.domain.commands import Command
from rdev.domain.errors import ErrorCode, Fault, RdevError, bad_request
from rdev.domain.ids import CommandId, is_command_id
from rdev.domain.sse import EventName, frame
from rdev.domain.stream import ConnectedEvent
from rdev.ports.telemetry import Telemetry
from rdev.services.commands import Commands
from rdev.services.stream import Fanout, Frames, Signal

# How long a client waits before it comes back, in milliseconds (the contract).
RETRY_MS = 2_000
# Larger than any sequence number that can be reached.
_SEQ_DIGITS_MAX = 18

_HEADERS = {
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
    # Nothing of a finished stream's connection is recycled.
    "Connection": "close",
}

_encode = msgspec.json.Encoder().encode


def stream_routes(commands: Commands, fanout: Fanout, telemetry: Telemetry) -> Blueprint:
    """`/commands/{id}/events` and `/projects/{id}/events?stream_id=`."""
    routes = Blueprint("stream", __name__)

    @routes.get("/commands/<command>/events")
    async def command_events(command: str) -> Response:
        return await _events(await _find(commands, command))

    @routes.get("/projects/<project>/events")
    async def project_events(project: str) -> Response:
        stream_id = text_of("stream_id")
        if stream_id is None:
            message = "the parameter stream_id is required"
            raise bad_request([Fault(pointer="", message=message)])
        command = await _find(commands, stream_id)
        if command.project != project:
            raise _unknown(stream_id)
        return await _events(command)

    async def _events(command: Command) -> Response:
        after = _after()
        if command.status.is_terminal and after >= command.last_seq:
            return no_content()
        oldest_seq = await commands.oldest_seq(command.id)
        _check_history(command, after=after, oldest_seq=oldest_seq)
        connected = ConnectedEvent(
            project=command.project,
            stream_id=command.id,
            reconnecting=after > 0,
            oldest_seq=oldest_seq or 1,
            last_seq=command.last_seq,
            status=command.status,
        )
        body = _body(fanout, telemetry, command, connected, after, exchange().now)
        return stream(body, content_type="text/event-stream", headers=_HEADERS)

    return routes


async def _body(
    fanout: Fanout,
    telemetry: Telemetry,
    command: Command,
    connected: ConnectedEvent,
    after: int,
    now: Callable[[], datetime],
) -> AsyncGenerator[bytes, None]:
    """The stream from `connected` to `complete`, or to the reason why it ends earlier."""
    with telemetry.stream(command.project), fanout.subscribe(command.id, after=after) as reader:
        yield frame(EventName.CONNECTED, _encode(connected), None, RETRY_MS)
        while True:
            try:
                item = await reader.receive()
            except RdevError as error:
                # The head is out: what went wrong can only be said in the stream.
                yield _frame(EventName.ERROR, {"code": error.code, "message": error.message})
                return
            match item:
                case Frames():
                    for event_type, count in item.counts.items():
                        telemetry.events_sent(command.project, event_type, count)
                    yield item.data
                case Signal.HEARTBEAT:
                    yield _frame(EventName.HEARTBEAT, {"timestamp": stamp(now())})
                case Signal.DRAINING:
                    yield _frame(EventName.DISCONNECTING, {"reason": "draining"}, RETRY_MS)
                    return
                case Signal.BLOCKED | Signal.END:
                    return


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


def _after() -> int:
    """The last event the client has seen: `Last-Event-ID`, else `?after=`, else 0."""
    text = request.headers.get("Last-Event-ID") or text_of("after") or "0"
    if not text.isascii() or not text.isdigit() or len(text) > _SEQ_DIGITS_MAX:
        message = "Last-Event-ID (or the parameter after) must be a sequence number"
        raise bad_request([Fault(pointer="", message=message)])
    return int(text)


async def _find(commands: Commands, text: str) -> Command:
    if not is_command_id(text):
        raise _unknown(text)
    return await commands.get(CommandId(text))


def _unknown(text: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no command {text!r}")
