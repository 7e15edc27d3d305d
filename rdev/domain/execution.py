"""What is handed to a project to run, and what is read back from it.

A command runs detached in its project and writes stdout and stderr to two journals; an offset is a
count of bytes from the start of a journal. `Exit` is what the supervisor's status file said.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from rdev.domain.errors import ErrorCode, RdevError

# Names that some sh treats as its own: bash has them read-only, dash refuses other values.
_UNSETTABLE = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "OPTIND", "PPID", "SHELLOPTS", "UID"})
# What a POSIX shell can export (POSIX 2024, XBD 3.216 "Name").
_CONTROL = re.compile(r"[^ -~]+")
_WORDS = 200
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Stream(StrEnum):
    """The two output streams of a command."""

    STDOUT = "stdout"
    STDERR = "stderr"


def is_env_name(name: str) -> bool:
    """Whether every POSIX shell can give a command a variable of this name."""
    return ENV_NAME.fullmatch(name) is not None and name not in _UNSETTABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Everything the supervisor needs to start a command; environment and stdin are secrets.

    `argv` is never empty, each element ≤ 131,071 bytes. `env` is added to the executor's base
    environment and is never mixed with the server's. `cwd` is relative to the project's folder,
    "" is the folder itself. `timeout_s` > 0 is enforced in the project; after it TERM, `grace_s`,
    KILL.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    stdin: bytes = b""
    timeout_s: int
    grace_s: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Offsets:
    """How far each journal was taken, in bytes from its start."""

    stdout: int = 0
    stderr: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one journal; `offset` is that of the first byte. Pieces of a stream are in order,
    without hole or overlap."""

    stream: Stream
    offset: int
    data: bytes


class Why(StrEnum):
    """Why the supervisor ended the command; absent where it ended by itself."""

    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    OUTPUT_LIMIT = "output_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The status file, read whole. Exactly one of `exit_code` and `signal` is set, except that a
    command which could not be executed has exit code 126 or 127.

    `stdout_bytes`/`stderr_bytes` are the journals' sizes at the command's own exit: what came
    later (`late_bytes`) is not output. `runtime_ms` is the project's own measure.
    """

    exit_code: int | None
    signal: int | None
    why: Why | None
    stdout_bytes: int
    stderr_bytes: int
    late_bytes: int = 0
    runtime_ms: int | None = None
    kill: "KillReport | None" = None


class LostReason(StrEnum):
    """Why no status could be read. `lost` is never success."""

    POD_GONE = "pod_gone"
    OOM_KILLED = "oom_killed"
    EVICTED = "evicted"
    SUPERVISOR_GONE = "supervisor_gone"
    UNREACHABLE = "unreachable"
    JOURNAL_TRUNCATED = "journal_truncated"
    NOT_STARTED = "not_started"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The outcome cannot be proven. `may_still_run` is true only for `unreachable`.

    `not_started` is proven: the start was forbidden before it happened, and can never happen.
    `unfinished`: the place is another instance than the attempt's, so no process of it is left,
    and nothing there says that it ended, or was being ended.
    `tries`: of `unreachable`, how many calls to the place failed before it was given up.
    """

    reason: LostReason
    may_still_run: bool = False
    unfinished: bool = False
    tries: int = field(default=1, compare=False)


class UnfitProjectError(RdevError):
    """A project in which nothing can run, until somebody changes it: its image has no shell, say.

    SERVICE_UNAVAILABLE; `lacks` says what is missing, in words fit for clients. Whoever raises it
    has started nothing.
    """

    def __init__(self, lacks: str) -> None:
        """`lacks`: at most `_WORDS` characters of it are told."""
        self.lacks = _CONTROL.sub(" ", lacks).strip()[:_WORDS]
        message = f"project cannot run commands: {self.lacks}"
        super().__init__(ErrorCode.SERVICE_UNAVAILABLE, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class KillReport:
    """What was seen after TERM, grace, KILL and another look: `confirmed` when nothing is left,
    else the pids that survived."""

    confirmed: bool
    survivors: tuple[int, ...] = ()
