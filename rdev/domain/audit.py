"""The audit log: who did what, when, from where, and with what outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum

from rdev.domain.ids import ProjectId

# What an entry's detail may hold of a text that is as long as a client likes.
DETAIL_BYTES = 4_096
# How many seals behind its cursor one page looks at, at most, whatever it filters.
PAGE_LOOK_MAX = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asked for a change, in the words of an audit entry. `ip` is the client's address behind
    trusted proxies."""

    key_id: str
    key_name: str
    ip: str
    request_id: str


class Action(StrEnum):
    """What the log tells of, apart from commands."""

    KEY_CREATED = "key.created"
    KEY_ROTATED = "key.rotated"
    KEY_REVOKED = "key.revoked"
    PROJECT_CREATED = "project.created"
    PROJECT_STARTED = "project.started"
    PROJECT_STOPPED = "project.stopped"
    PROJECT_DELETED = "project.deleted"
    # By the server: its pod was found; its place is gone.
    PROJECT_ADOPTED = "project.adopted"
    PROJECT_REMOVED = "project.removed"
    WEBHOOK_CREATED = "webhook.created"
    WEBHOOK_CHANGED = "webhook.changed"
    WEBHOOK_DELETED = "webhook.deleted"
    WEBHOOK_ROTATED = "webhook.rotated"
    WEBHOOK_TESTED = "webhook.tested"
    WEBHOOK_REDELIVERED = "webhook.redelivered"
    # By the server: its receiver is gone or fails for days, or its owner's key has ended.
    WEBHOOK_DISABLED = "webhook.disabled"
    ACCESS_DENIED = "access.denied"
    # A day was dropped after its time; the database was restored into another cluster.
    DAY_DROPPED = "audit.day_dropped"
    RESUMED = "audit.resumed"


class Outcome(StrEnum):
    """What came of it."""

    OK = "ok"
    DENIED = "denied"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry as it is stored. `day` is that of its transaction's begin (UTC), `xid` the place of
    its transaction among others; `detail` holds nothing secret."""

    day: date
    id: int
    xid: int
    at: datetime
    actor: str
    actor_name: str
    ip: str | None
    request_id: str | None
    action: str
    target: str
    project: str | None
    outcome: str
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedEntry:
    """An entry with its place in the chain."""

    seq: int
    entry: Entry
    hash: bytes
    # None for the first that is stored, where the one before it was dropped.
    prev_hash: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which entries are asked for. `within` None: of all projects and of none; else only entries of
    these. `since` ≤ at < `until`."""

    actor: str | None = None
    action: str | None = None
    project: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    within: frozenset[ProjectId] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPage:
    """Entries, newest first; `before` is where the next page goes on, None where there is none. A
    page may hold less than was asked for, and even nothing, and still not be the last."""

    entries: tuple[SealedEntry, ...]
    before: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """Refusals to one address for one reason: the first one, or how many more there were within its
    minute. `actor` is the key's id, or `anonymous`."""

    actor: str
    actor_name: str
    ip: str | None
    request_id: str | None
    reason: str
    route: str
    project: str | None = None
    # None: this is the first; else how many followed it.
    repeated: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What one sealing did. `lag_s`: the age of the oldest entry that is not sealed, None where all
    are; `last_seq` and `last_hash` None where there is no seal at all."""

    count: int
    lag_s: float | None
    last_seq: int | None
    last_hash: bytes | None


def shortened(argv: Sequence[str], most_bytes: int) -> list[str]:
    """The arguments from the first on, as far as `most_bytes` of UTF-8 hold them; what was cut off
    ends in `…`, arguments that are missing are one `…`."""
    kept: list[str] = []
    left_bytes = most_bytes
    for argument in argv:
        encoded = argument.encode("utf-8", "replace")
        if len(encoded) > left_bytes:
            return [*kept, encoded[:left_bytes].decode("utf-8", "ignore") + "…"]
        kept.append(argument)
        left_bytes -= len(encoded)
    return kept
