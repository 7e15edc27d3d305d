"""The SSE routes, served without Quart: one command's stream, and where the feeds begin.

A reader subscribes before anything is read, replays, and then waits while the hub writes to its
client. Unsubscribing is synchronous, whichever way the request ends.
"""

from dataclasses import replace
from typing import Final

import msgspec
import trio

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import Answer, Described, Description, Parameter, Schema
from rdev.adapters.http.exchange import exchange, hold
from rdev.adapters.http.feed import Feeds
from rdev.adapters.http.following import RETRY_MS, Followers, last_ids
from rdev.adapters.http.plain import Asked, PlainRoute
from rdev.domain.commands import Command
from rdev.domain.errors import ErrorCode, Fault, RdevError, bad_request
from rdev.domain.ids import CommandId, is_command_id
from rdev.domain.sse import EventName, frame
from rdev.domain.stream import ConnectedEvent
from rdev.domain.tickets import is_readable
from rdev.services.stream import Fanout
from rdev.services.stream_views import Views, Watched

# Larger than any sequence number that can be reached.
_SEQ_DIGITS_MAX = 18

_encode = msgspec.json.Encoder().encode


def stream_routes(
    commands: Watched, fanout: Fanout, feeds: Feeds, followers: Followers
) -> list[PlainRoute]:
    """`/commands/{id}/events`, `/projects/{id}/events` and `/events`."""
    streams = _Streams(commands, fanout, feeds, followers)
    return [
        PlainRoute("/commands/{command}/events", streams.of_command),
        PlainRoute("/projects/{project}/events", streams.of_project),
        PlainRoute("/events", feeds.of_all),
    ]


_SEQ: Final[Schema] = {"type": "string", "pattern": f"^[0-9]{{1,{_SEQ_DIGITS_MAX}}}$"}
_ID: Final[Schema] = {"type": "string", "pattern": "^(?:0|[A-Za-z0-9_-]{22})$"}


def _since(schema: Schema, about: str) -> tuple[Parameter, Parameter]:
    """Where to resume, in the query and in the header."""
    return (
        Parameter(name="after", about=f"resume behind this id{about}", schema=schema),
        Parameter(
            name="Last-Event-ID", about="the same, and it wins", schema=schema, where="header"
        ),
    )


_EITHER: Final[Schema] = {"anyOf": [_SEQ, _ID]}
_TOKEN = Parameter(
    name="token",
    about="a stream token, in place of a key",
    schema=schemas.TEXT,
    code=ErrorCode.UNAUTHORIZED,
)
_STREAM_ID = Parameter(
    name="stream_id",
    about="the command",
    schema=schemas.an_id("cmd_"),
    code=ErrorCode.NOT_FOUND,
)
_STREAM = {
    200: Answer(
        about="the events, from the first (or behind the id) to `complete`, live",
        schema=schemas.TEXT,
        content_type="text/event-stream",
        is_enveloped=False,
        events=schemas.STREAM_EVENTS,
    ),
    204: Answer(about="there is nothing behind this id and there never will be"),
}

DESCRIBED: Described = {
    ("GET", "/commands/{command}/events"): Description(
        summary="The stream of a command",
        tag="streams",
        parameters=(*_since(_SEQ, ""), _TOKEN),
        answers=_STREAM,
        errors=(ErrorCode.GONE,),
    ),
    ("GET", "/projects/{project}/events"): Description(
        summary="The stream of a command, or the feed of a project",
        tag="streams",
        about="With `stream_id` that command's stream; without it the life of all its commands.",
        parameters=(
            _STREAM_ID,
            *_since(_EITHER, ": a sequence number of the command's, an id of the feed's"),
            _TOKEN,
        ),
        answers={
            200: replace(_STREAM[200], events=schemas.STREAM_AND_FEED_EVENTS),
            204: _STREAM[204],
        },
        errors=(ErrorCode.GONE,),
    ),
    ("GET", "/events"): Description(
        summary="The feed of all commands that the key sees",
        tag="streams",
        about="No output lines. Ids are opaque and good for 7 days; `0` is the oldest stored.",
        parameters=_since(_ID, ""),
        answers={
            200: Answer(
                about="the events from now on, or from behind the id, without an end",
                schema=schemas.TEXT,
                content_type="text/event-stream",
                is_enveloped=False,
                events=schemas.FEED_EVENTS,
            )
        },
        errors=(ErrorCode.GONE,),
    ),
}


class _Streams:
    """The routes of single commands."""

    def __init__(
        self, commands: Watched, fanout: Fanout, feeds: Feeds, followers: Followers
    ) -> None:
        self._views = Views(commands)
        self._fanout = fanout
        self._feeds = feeds
        self._followers = followers

    async def of_command(self, asked: Asked) -> None:
        """The events of a command."""
        await self._answer(asked, asked.fields["command"], project=None)

    async def of_project(self, asked: Asked) -> None:
        """The same stream, named in the query; without it the feed of the project."""
        stream_id = asked.parameter("stream_id")
        if stream_id is None:
            await self._feeds.of_project(asked)
        else:
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
            _check_token(command)
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
            await self._followers.follow(asked, reader, command.project, first)


def _check_token(command: Command) -> None:
    """Errors: UNAUTHORIZED for a stream token when its command has ended long ago."""
    this = exchange()
    if this.ticket is None or this.ticket.stream is None:
        return
    if not is_readable(this.ticket, command.finished_at, this.now()):
        message = "the command has ended, and so has the token: read its stream with a key"
        raise RdevError(ErrorCode.UNAUTHORIZED, message)


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
    """The last event the client has seen, 0 for none."""
    texts = last_ids(asked)
    if not all(
        text.isascii() and text.isdigit() and len(text) <= _SEQ_DIGITS_MAX for text in texts
    ):
        message = "Last-Event-ID (or the parameter after) must be a sequence number"
        raise bad_request([Fault(pointer="", message=message)])
    return int(texts[0]) if texts else 0


def _unknown(text: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no command {text!r}")
