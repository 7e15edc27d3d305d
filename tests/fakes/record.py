"""What was recorded of changes, in memory: events and audit entries (`rdev/ports/commands.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile

import trio

from rdev.domain.audit import Actor
from rdev.domain.commands import Command, Status
from rdev.domain.ids import CommandId

_TYPES = {Status.RUNNING: "started", Status.SUCCEEDED: "completed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A change of a command's status."""

    type: str
    command: CommandId
    status: Status
    attempt: int
    seq: int
    detail: Mapping[str, object]
    at_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who changed what."""

    actor: str
    actor_name: str
    action: str
    target: str


@dataclass(slots=True, kw_only=True)
class Record:
    """Both, in order."""

    events: list[Event] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def changed(
        self, command: Command, action: str, by: Actor | str, *, reason: str | None = None
    ) -> None:
        """The status is another one; by a request, or by the server of that name. `reason`: why it
        is queued again."""
        event = Event(
            type=f"command.{_TYPES.get(command.status, command.status)}",
            command=command.id,
            status=command.status,
            attempt=command.attempt,
            seq=command.last_seq,
            detail=_end(command) if command.finished_at else {"reason": reason} if reason else {},
            at_s=trio.current_time(),
        )
        self.events.append(event)
        self.did(command, action, by)

    def age(self, seconds: float) -> None:
        """Make all events so much older."""
        self.events = [replace(one, at_s=one.at_s - seconds) for one in self.events]

    def forget(self, older_s: float, limit: int) -> int:
        """Delete old events, all but the newest of them; returns how many."""
        before_s = trio.current_time() - older_s
        old = list(takewhile(lambda one: one.at_s < before_s, self.events))[:-1][:limit]
        self.events = [one for one in self.events if one not in old]
        return len(old)

    def did(self, command: Command, action: str, by: Actor | str) -> None:
        """Something else happened to it."""
        actor, name = ("server", by) if isinstance(by, str) else (by.key_id, by.key_name)
        entry = Entry(actor=actor, actor_name=name, action=action, target=command.id)
        self.entries.append(entry)


def _end(command: Command) -> Mapping[str, object]:
    return {
        "reason": command.reason,
        "exit_code": command.exit_code,
        "signal": command.signal,
        "duration_ms": command.duration_ms,
        "truncated": command.truncated,
        "stdout_bytes": command.stdout_bytes,
        "stderr_bytes": command.stderr_bytes,
    }
