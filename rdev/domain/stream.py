"""The events of a command's stream, and the chunks they are stored in.

An event's id is its sequence number within the command: 1, 2, 3 … A chunk is a run of events of
one source; its payload holds one event a line. A line that begins with `{` is an `output` event;
any other begins with one tag byte: `a` agent, `s` status, `c` complete, `g` gap. A gap stands alone
in its chunk, covers the chunk's whole range, and its id is the range's last number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from rdev.domain.commands import Outcome, Status
from rdev.domain.ids import CommandId

# A stored chunk's payload is at most this (architecture, "Append and fence").
CHUNK_MAX_BYTES = 65_536


class Source(IntEnum):
    """Where the events of a chunk come from."""

    LIFE = 0
    STDOUT = 1
    STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A committed run of events `first_seq`…`last_seq` of one command.

    `raw_bytes` is how many bytes of the journal the events stand for (0 for LIFE).
    """

    command: CommandId
    first_seq: int
    last_seq: int
    source: Source
    raw_bytes: int
    payload: bytes

    @property
    def is_final(self) -> bool:
        """Whether this chunk ends the stream (it holds `complete`)."""
        return self.source is Source.LIFE and b"\nc{" in self.payload

    @property
    def event_counts(self) -> Mapping[str, int]:
        """How many events of each type the chunk holds, without decoding them."""
        events = self.last_seq - self.first_seq + 1
        if self.is_gap:
            return {"gap": 1}
        if self.source is Source.LIFE:
            return {"status": 1, "complete": 1} if self.is_final else {"status": events}
        agents = self.payload.count(b"\na{")
        return {"output": events - agents, "agent": agents} if agents else {"output": events}

    @property
    def is_gap(self) -> bool:
        """Whether this chunk stands for output that was dropped."""
        return self.payload.startswith(b"g{")


class StatusEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`status`: at every change; `queue_position` in the first only."""

    status: Status
    attempt: int
    reason: str | None = None
    queue_position: int | None = None


class CompleteEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`complete`: the last event of a command. `may_still_run` stands there only where it is so."""

    status: Status
    exit_code: int | None
    signal: int | None
    duration_ms: int | None
    truncated: bool
    stdout_bytes: int
    stderr_bytes: int
    reason: str | None
    may_still_run: bool | msgspec.UnsetType = msgspec.UNSET


class GapEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`gap`: output over the cap was dropped here."""

    stream: str
    dropped_bytes: int
    first_seq: int
    last_seq: int


class ConnectedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`connected`: the first event of every connection; it has no id."""

    project: str
    stream_id: str
    reconnecting: bool
    oldest_seq: int
    last_seq: int
    status: Status


_encode = msgspec.json.Encoder().encode


def status_line(status: Status, *, attempt: int, reason: str | None = None) -> bytes:
    """The payload line of a `status` event."""
    return b"s" + _encode(StatusEvent(status=status, attempt=attempt, reason=reason))


def queued_line(*, queue_position: int) -> bytes:
    """The payload line of the first event of every command."""
    event = StatusEvent(status=Status.QUEUED, attempt=0, queue_position=queue_position)
    return b"s" + _encode(event)


def final_lines(
    outcome: Outcome,
    *,
    attempt: int,
    truncated: bool,
    stdout_bytes: int,
    stderr_bytes: int,
) -> bytes:
    """The payload of the last chunk: `status` and `complete`."""
    complete = CompleteEvent(
        status=outcome.status,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        duration_ms=outcome.duration_ms,
        truncated=truncated,
        stdout_bytes=stdout_bytes,
        stderr_bytes=stderr_bytes,
        reason=outcome.reason,
        may_still_run=outcome.may_still_run or msgspec.UNSET,
    )
    status = status_line(outcome.status, attempt=attempt, reason=outcome.reason)
    return status + b"\nc" + _encode(complete)


def gap_line(event: GapEvent) -> bytes:
    """The payload of a chunk that stands for dropped output."""
    return b"g" + _encode(event)
