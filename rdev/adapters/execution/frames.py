"""The attach protocol as rdev reads it: bytes of the exec's stdout in, frames out. No I/O.

Bounded: keeps at most one header line (64 bytes) or one status (8 KiB); output is passed on as it
comes, however long its frame.
"""

import re
from dataclasses import dataclass
from typing import Final

from rdev.domain.execution import (
    Exit,
    KillReport,
    Lost,
    LostReason,
    Offsets,
    Piece,
    Stream,
    Why,
)

_MAX_HEADER_BYTES: Final = 64
_MAX_STATUS_BYTES: Final = 8192
_HEADER: Final = re.compile(
    rb"(?P<kind>[hkosel])(?: (?P<first>[a-z_]+|\d+)(?: (?P<second>\d+|unfinished))?)?"
)


class ProtocolError(Exception):
    """The stream is not what the script writes: a cut, or an exec that failed."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The command was started, or never can be."""


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing new."""


Frame = Hello | Alive | Piece | Exit | Lost


class FrameDecoder:
    """Decodes one exec's stdout, from the offsets it was asked for."""

    def __init__(self, offsets: Offsets) -> None:
        """Start at `offsets`: the first piece of each stream must begin there."""
        self._at = {Stream.STDOUT: offsets.stdout, Stream.STDERR: offsets.stderr}
        self._buffer = bytearray()
        self._stream: Stream | None = None  # whose bytes come next
        self._left = 0  # so many of them
        self._status_bytes = 0  # a status of this length comes next

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now; bytes of output at once. Errors: ProtocolError."""
        self._buffer += data
        frames: list[Frame] = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        while True:
            if self._left:
                return self._piece()
            if self._status_bytes:
                return self._status()
            if (header := self._line()) is None:
                return None
            if (frame := self._begin(header)) is not None:
                return frame

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n", 0, _MAX_HEADER_BYTES)
        if end < 0:
            if len(self._buffer) >= _MAX_HEADER_BYTES:
                raise ProtocolError("a header without an end")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _begin(self, header: bytes) -> Frame | None:
        """A whole frame, or None where its bytes are to follow."""
        match = _HEADER.fullmatch(header)
        if match is None:
            raise ProtocolError(f"not a header: {header[:20]!r}")
        first, second = match["first"], match["second"]
        match match["kind"], first, second:
            case b"h", None, None:
                return Hello()
            case b"k", None, None:
                return Alive()
            case b"l", reason, (None | b"unfinished") as mark if reason:
                return Lost(reason=_reason(reason), unfinished=mark is not None)
            case b"s", length, None if length:
                self._status_bytes = _number(length, _MAX_STATUS_BYTES)
                return None
            case (b"o" | b"e") as kind, offset, length if length:
                self._expect(Stream.STDOUT if kind == b"o" else Stream.STDERR, offset, length)
                return None
        raise ProtocolError(f"not a header: {header[:20]!r}")

    def _expect(self, stream: Stream, offset: bytes, length: bytes) -> None:
        if _number(offset) != self._at[stream]:
            raise ProtocolError(f"{stream} continues at the wrong offset")
        self._stream, self._left = stream, _number(length)

    def _piece(self) -> Piece | None:
        if not self._buffer or self._stream is None:
            return None
        data = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        offset = self._at[self._stream]
        self._left -= len(data)
        self._at[self._stream] += len(data)
        return Piece(stream=self._stream, offset=offset, data=data)

    def _status(self) -> Exit | None:
        if len(self._buffer) < self._status_bytes:
            return None
        text = bytes(self._buffer[: self._status_bytes])
        del self._buffer[: self._status_bytes]
        self._status_bytes = 0
        outcome = parse_status(text)
        if (outcome.stdout_bytes, outcome.stderr_bytes) != tuple(self._at.values()):
            raise ProtocolError("the status came before all output")
        return outcome


def _number(digits: bytes, limit: int | None = None) -> int:
    if not digits.isdigit() or (limit is not None and int(digits) > limit):
        raise ProtocolError(f"not a length: {digits[:20]!r}")
    return int(digits)


def _reason(text: bytes) -> LostReason:
    try:
        return LostReason(text.decode())
    except ValueError as error:
        raise ProtocolError(f"not a reason: {text!r}") from error


def parse_status(text: bytes) -> Exit:
    """The outcome in a status file that ends with its `end` line. Errors: ProtocolError."""
    fields = dict(line.partition(" ")[::2] for line in text.decode("ascii", "replace").splitlines())
    try:
        return Exit(
            exit_code=_optional(fields["code"]),
            signal=_optional(fields["signal"]),
            why=Why(fields["why"]) if fields["why"] else None,
            stdout_bytes=int(fields["out_bytes"]),
            stderr_bytes=int(fields["err_bytes"]),
            late_bytes=int(fields["late_bytes"]),
            runtime_ms=int(fields["runtime_ms"]),
            kill=parse_kill(fields["kill"]),
        )
    except (KeyError, ValueError) as error:
        raise ProtocolError("not a status") from error


def _optional(digits: str) -> int | None:
    return int(digits) if digits else None


def parse_kill(text: str) -> KillReport | None:
    """`confirmed`, `survivors PID…`; `unknown` (the one who killed died) is not confirmed."""
    word, *pids = text.split() or [""]
    if not word:
        return None
    if word not in ("confirmed", "survivors", "unknown"):
        raise ValueError(text)
    return KillReport(confirmed=word == "confirmed", survivors=tuple(int(pid) for pid in pids))
