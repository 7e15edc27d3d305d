"""The feed: every change of every command's status, in one order, and where a reader stands in it.

A place in the order is (xid, position) of `sql/0009_events.sql`. Here it is one whole number,
`Position`, so that places compare as numbers do; on the wire it is an opaque text of 22 characters.
An event's id is its own place; "from the beginning" is `START`. Bounded: 126 bits.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from typing import NewType

import msgspec

from rdev.domain.commands import Kind, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.sse import EventName, frame
from rdev.domain.stream import CompleteEvent, StatusEvent

# A place in the order of all events.
Position = NewType("Position", int)
# Before everything that is stored.
START = Position(0)

# Both numbers are below 2^63: transactions are counted from 1, and `position` is a bigint.
_HALF_BITS = 63
_HALF_MAX = (1 << _HALF_BITS) - 1
_HALF_BYTES = 8
_TEXT_CHARACTERS = 22


def position_of(xid: int, position: int) -> Position:
    """The place of a row; `position` 0 is the place before the first row of the transaction."""
    return Position(xid << _HALF_BITS | position)


def row_of(place: Position) -> tuple[int, int]:
    """The xid and the position of a place."""
    return place >> _HALF_BITS, place & _HALF_MAX


def cursor_of(place: Position) -> str:
    """The place as clients see it: opaque, and safe in headers and queries."""
    halves = b"".join(half.to_bytes(_HALF_BYTES, "big") for half in row_of(place))
    return urlsafe_b64encode(halves).decode().rstrip("=")


def parse_cursor(text: str) -> Position | None:
    """The place that `cursor_of` wrote like this; None for every other text."""
    if len(text) != _TEXT_CHARACTERS or not text.isascii():
        return None
    try:
        halves = urlsafe_b64decode(text + "==")
    except Base64Error:
        return None
    xid = int.from_bytes(halves[:_HALF_BYTES], "big")
    position = int.from_bytes(halves[_HALF_BYTES:], "big")
    if xid > _HALF_MAX or position > _HALF_MAX:
        return None
    place = position_of(xid, position)
    # Base64 reads more than it writes (spare bits, foreign characters).
    return place if cursor_of(place) == text else None


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """What else a change says: of most the reason, of an end what `complete` says."""

    reason: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: int | None = None
    truncated: bool = False
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    may_still_run: bool | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedEvent:
    """One change of one command's status."""

    position: Position
    command: CommandId
    project: ProjectId
    kind: Kind
    status: Status
    attempt: int
    detail: Detail


class FeedStatus(StatusEvent, frozen=True, kw_only=True, omit_defaults=True):
    """`status` of a feed: that of the command's own stream, and whose it is."""

    command_id: CommandId
    project: ProjectId
    kind: Kind


class FeedComplete(CompleteEvent, frozen=True, kw_only=True):
    """`complete` of a feed: that of the command's own stream, and whose it is."""

    command_id: CommandId
    project: ProjectId
    kind: Kind


class FeedConnected(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`connected` of a feed; `project` where it is one project's."""

    reconnecting: bool
    project: ProjectId | None = None


_encode = msgspec.json.Encoder().encode


def event_name(event: FeedEvent) -> EventName:
    """What the change is called on the wire: an end is `complete`, any other `status`."""
    return EventName.COMPLETE if event.status.is_terminal else EventName.STATUS


def event_frame(event: FeedEvent) -> bytes:
    """The change as bytes on the wire."""
    return frame(event_name(event), _encode(_data(event)), cursor_of(event.position))


def _data(event: FeedEvent) -> FeedStatus | FeedComplete:
    detail = event.detail
    if not event.status.is_terminal:
        return FeedStatus(
            command_id=event.command,
            project=event.project,
            kind=event.kind,
            status=event.status,
            attempt=event.attempt,
            reason=detail.reason,
        )
    return FeedComplete(
        command_id=event.command,
        project=event.project,
        kind=event.kind,
        status=event.status,
        exit_code=detail.exit_code,
        signal=detail.signal,
        duration_ms=detail.duration_ms,
        truncated=detail.truncated,
        stdout_bytes=detail.stdout_bytes,
        stderr_bytes=detail.stderr_bytes,
        reason=detail.reason,
        may_still_run=detail.may_still_run,
    )


def check_kept(after: Position, *, oldest: Position, end: Position) -> None:
    """Whether everything after a place can still be read, and the place was ever given.

    Errors: GONE, with `oldest` as clients write it, from where on they can read.
    """
    details = {"oldest": cursor_of(oldest)}
    if after < oldest:
        message = "the events after this id are no longer stored"
        raise RdevError(ErrorCode.GONE, message, details=details)
    if after > end:
        raise RdevError(ErrorCode.GONE, "the feed has not come as far as this id", details=details)
