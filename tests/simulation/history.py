"""What happened in a simulated run, in order: the only thing the checker reads.

Written by those who can see it: the database's side of every statement that was committed, the
processes themselves, the clients, and the one who makes the faults. `at` is virtual seconds.
"""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Accepted:
    """A command was stored as queued. `lane` is `project/class`; `level`: the higher is first."""

    at: float
    command: str
    lane: str
    level: int
    key: str | None
    expires_at: float
    retry: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """A queued command became running, under a lease that ends at `until`."""

    at: float
    command: str
    lease: int
    holder: str
    until: float


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A running command was put under another lease."""

    at: float
    command: str
    lease: int
    holder: str
    until: float


@dataclass(frozen=True, slots=True)
class Renewed:
    """A heartbeat was granted."""

    at: float
    command: str
    lease: int
    until: float


@dataclass(frozen=True, slots=True)
class Released:
    """A lease was given back: the command may be taken over at once."""

    at: float
    command: str
    lease: int


@dataclass(frozen=True, slots=True)
class Appended:
    """Events were committed. `lease` None: by a statement that needs none (accept, cancel …)."""

    at: float
    command: str
    lease: int | None
    first_seq: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class QueuedAgain:
    """A running command's attempt is over, and another one will follow (`retry: safe`)."""

    at: float
    command: str
    lease: int | None


@dataclass(frozen=True, slots=True)
class Ended:
    """A command's final status was committed."""

    at: float
    command: str
    lease: int | None
    status: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """A cancel was committed."""

    at: float
    command: str


@dataclass(frozen=True, slots=True)
class Touched:
    """Lanes were put where they stand; None: all that stood too late."""

    at: float
    lanes: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Started:
    """A process of a command lives from now on."""

    at: float
    command: str
    process: int


@dataclass(frozen=True, slots=True)
class Wrote:
    """A process wrote to its journal."""

    at: float
    command: str
    process: int
    stream: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Exited:
    """A process is gone; `code` is None where it was killed or its place went down."""

    at: float
    command: str
    process: int
    code: int | None


@dataclass(frozen=True, slots=True)
class PlaceFault:
    """A project's place was restarted or could not be reached for a while."""

    at: float
    project: str
    kind: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A client was told that its request (with this key) is this command."""

    at: float
    client: int
    key: str | None
    command: str


@dataclass(frozen=True, slots=True)
class Awaited:
    """A client that waited for a command's end was told of this status."""

    at: float
    command: str
    status: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A client follows a command from the event after `after`."""

    at: float
    connection: int
    command: str
    after: int


@dataclass(frozen=True, slots=True)
class Saw:
    """A client received an event."""

    at: float
    connection: int
    command: str
    seq: int
    event: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """A connection is over."""

    at: float
    connection: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Something was broken on purpose."""

    at: float
    kind: str
    whom: str


@dataclass(frozen=True, slots=True)
class Calm:
    """No fault from now on; all servers and places are up."""

    at: float


@dataclass(frozen=True, slots=True)
class FellOver:
    """A server ended by itself."""

    at: float
    server: str
    error: str


@dataclass(frozen=True, slots=True)
class Overdue:
    """What had not ended when the bound after the last fault was reached."""

    at: float
    what: str


Event = (
    Accepted
    | Claimed
    | TakenOver
    | Renewed
    | Released
    | Appended
    | QueuedAgain
    | Ended
    | CancelAsked
    | Touched
    | Started
    | Wrote
    | Exited
    | PlaceFault
    | Answered
    | Awaited
    | Opened
    | Saw
    | Closed
    | Fault
    | Calm
    | FellOver
    | Overdue
)


@dataclass(slots=True)
class History:
    """Events in the order in which they took effect."""

    events: list[Event] = field(default_factory=list)

    def digest(self) -> str:
        """The same for two runs in which the same things happened in the same order."""
        text = "\n".join(map(repr, self.events))
        return hashlib.sha256(text.encode()).hexdigest()
