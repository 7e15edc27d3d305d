"""The exec protocol of Kubernetes (v4, v5): streams as channels of one WebSocket. No I/O.

The first byte of a message names its channel; v5 adds `[255, channel]`, the end of one. Parts of
messages are passed on as they come; only a status is held (at most `_STATUS_BYTES`).
Source: KEP-4006; kubernetes staging/src/k8s.io/apimachinery/pkg/util/remotecommand/constants.go.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

V5: Final = "v5.channel.k8s.io"
V4: Final = "v4.channel.k8s.io"
SUBPROTOCOLS: Final = (V5, V4)  # in order of preference

STDIN: Final = 0
_STDOUT: Final = 1
_STATUS: Final = 3
_CLOSE: Final = 255

_STATUS_BYTES: Final = 65_536
_WORDS: Final = 300
# A text that is no UTF-8 and an object that is nested too deeply are none of msgspec's own errors.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_EXIT_CODE: Final = re.compile(r"0*[1-9][0-9]{0,9}")


class Part(Protocol):
    """Bytes of a WebSocket message."""

    @property
    def data(self) -> bytes: ...
    @property
    def is_first(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecStatus:
    """How an exec ended. `exit_code` is None where the process was never one: then `reason` and
    `message` are the runtime's, e.g. of an image without a shell."""

    exit_code: int | None
    reason: str = ""
    message: str = ""


class _Cause(msgspec.Struct):
    reason: str = ""
    message: str = ""


class _Details(msgspec.Struct):
    causes: list[_Cause] | None = None


class _Status(msgspec.Struct):
    status: str
    reason: str | None = None
    message: str | None = None
    details: _Details | None = None


def parse_status(text: bytes) -> ExecStatus:
    """The status object of channel 3. What is not understood is no success: no exit code."""
    try:
        told = msgspec.json.decode(text, type=_Status)
    except _UNREADABLE:
        return ExecStatus(exit_code=None, message="the exec's status is not understood")
    reason, message = told.reason or "", " ".join((told.message or "").split())[:_WORDS]
    if told.status == "Success":
        return ExecStatus(exit_code=0)
    causes = (told.details.causes if told.details is not None else None) or []
    codes = [cause.message for cause in causes if cause.reason == "ExitCode"]
    # 0 with a failure is a contradiction, so not a success.
    if reason == "NonZeroExitCode" and codes and _EXIT_CODE.fullmatch(codes[0]):
        return ExecStatus(exit_code=int(codes[0]), reason=reason, message=message)
    return ExecStatus(exit_code=None, reason=reason, message=message)


def stdin_message(data: bytes) -> bytes:
    """The message that carries bytes to the process."""
    return bytes((STDIN,)) + data


STDIN_END: Final = bytes((_CLOSE, STDIN))  # v5 only


class Demultiplexer:
    """Reads one exec's messages: bytes of stdout, and at the end the status."""

    def __init__(self) -> None:
        """Nothing read yet."""
        self._channel: int | None = None  # of the message that is being read
        self._text = bytearray()
        self.status: ExecStatus | None = None

    def feed(self, part: Part) -> bytes:
        """What this part adds to stdout, often nothing; sets `status` when that is whole.

        An empty message says nothing; unknown channels are nobody's, like stderr.
        """
        data = part.data
        if part.is_first:
            self._channel = None
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if self._channel == _STDOUT:
            return data
        if self._channel == _STATUS and self.status is None:
            self._text += data[: _STATUS_BYTES - len(self._text)]
            # v4 servers open each channel with a message that holds nothing else.
            if part.is_last and self._text:
                self.status = parse_status(bytes(self._text))
        return b""
