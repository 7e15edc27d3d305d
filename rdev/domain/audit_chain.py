"""The chain of the audit log: hash(n) = SHA-256(hash(n - 1) ‖ bytes of entry n).

The bytes of an entry are a version byte and its fields, each with its type and length before it, as
PostgreSQL's `record_send` writes them: the database makes them at a tenth of the cost, `canonical`
says what they are. Before the first entry stand 32 zero bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from struct import pack

from rdev.domain.audit import Entry

VERSION = b"\x01"
HASH_BYTES = 32
GENESIS = bytes(HASH_BYTES)

# Types as PostgreSQL numbers them (pg_type.dat), which never change.
_DATE, _INT8, _XID8, _TIMESTAMPTZ, _TEXT, _JSONB = 1082, 20, 5069, 1184, 25, 3802
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Where `xid` and `id` stand in the bytes of an entry: what comes before them has a fixed length.
_XID = slice(41, 49)
_ID = slice(25, 33)


class FaultKind(StrEnum):
    """How a log was tampered with, as far as it shows."""

    EDITED = "edited"
    DELETED = "deleted"
    INSERTED = "inserted"
    REORDERED = "reordered"
    # Seals are missing from the beginning or the middle.
    SEAL_MISSING = "seal_missing"
    PARTITION_LOST = "partition_lost"
    # These two show in checkpoints alone.
    TAIL_CUT = "tail_cut"
    RECOMPUTED = "recomputed"
    # A checkpoint that was not signed by this installation's key.
    CHECKPOINT_FORGED = "checkpoint_forged"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainFault:
    """The first thing that is wrong. `seq` is the first seal that does not hold."""

    kind: FaultKind
    seq: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point of the chain: the seal's number and hash."""

    seq: int
    hash: bytes


ORIGIN = Place(seq=0, hash=GENESIS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was kept outside: the chain's end at a time."""

    place: Place
    at: datetime


@dataclass(frozen=True, slots=True)
class Link:
    """One seal with the bytes of its entry; None where the entry is not there."""

    seq: int
    hash: bytes
    day: date
    content: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verification found. `checked` seals hold, up to `last`; with `more` it goes on behind
    that. `fault` None: nothing is wrong with them. `dropped`: up to this seal entries are gone that
    the log says were dropped after their time; 0: none are."""

    checked: int
    last: Place
    more: bool = False
    fault: ChainFault | None = None
    dropped: int = 0


def canonical(entry: Entry) -> bytes:
    """The bytes of an entry that are hashed. Source: docs/api/audit.md."""
    micros = (entry.at - _EPOCH) // _MICROSECOND
    days = (entry.day - _EPOCH.date()).days
    fields = [
        (_DATE, pack("!i", days)),
        (_INT8, pack("!q", entry.id)),
        (_XID8, pack("!Q", entry.xid)),
        (_TIMESTAMPTZ, pack("!q", micros)),
        (_TEXT, entry.actor.encode()),
        (_TEXT, entry.actor_name.encode()),
        (_TEXT, None if entry.ip is None else entry.ip.encode()),
        (_TEXT, None if entry.request_id is None else entry.request_id.encode()),
        (_TEXT, entry.action.encode()),
        (_TEXT, entry.target.encode()),
        (_TEXT, None if entry.project is None else entry.project.encode()),
        (_TEXT, entry.outcome.encode()),
        (_JSONB, b"\x01" + _json(entry.detail).encode()),
    ]
    return VERSION + pack("!i", len(fields)) + b"".join(_field(*one) for one in fields)


def next_hash(before: bytes, content: bytes) -> bytes:
    """The hash of the entry that follows."""
    return sha256(before + content).digest()


def check_links(after: Place, links: Sequence[Link], following: Link | None) -> Verdict:
    """Whether these seals, in order of `seq`, follow `after`. An entry that is not there is
    DELETED: whether its whole day is gone, and rightly so, is the caller's to ask. `following` is
    the seal behind them, where there is one: it tells what is reordered from what is edited."""
    seq, before = after.seq, after.hash
    found = None
    # A few hundred nanoseconds a link: no call and no object but the hash's.
    hash_ = sha256
    for link in links:
        content, hashed = link.content, link.hash
        if link.seq != seq + 1 or content is None or hash_(before + content).digest() != hashed:
            number = seq - after.seq
            behind = links[number + 1] if number + 1 < len(links) else following
            found = _what_is_wrong(seq + 1, link, behind)
            break
        seq, before = seq + 1, hashed
    last = Place(seq=seq, hash=before)
    return Verdict(checked=seq - after.seq, last=last, fault=found)


def order_of(content: bytes) -> tuple[int, int]:
    """Where an entry stands: its `xid` and its `id`. Entries are sealed in this order."""
    return int.from_bytes(content[_XID]), int.from_bytes(content[_ID])


def _what_is_wrong(expected: int, link: Link, behind: Link | None) -> ChainFault:
    """Of a link that does not follow."""
    if link.seq != expected:
        return _fault(FaultKind.SEAL_MISSING, expected, f"the next seal is {link.seq}")
    if link.content is None:
        return _fault(FaultKind.DELETED, expected, f"its entry of {link.day} is not there")
    follows = None if behind is None else behind.content
    if follows is not None and order_of(follows) <= order_of(link.content):
        return _fault(FaultKind.REORDERED, link.seq, "its entry belongs behind the next one")
    return _fault(FaultKind.EDITED, link.seq, "its hash is not that of its entry")


def _fault(kind: FaultKind, seq: int, why: str) -> ChainFault:
    return ChainFault(kind=kind, seq=seq, message=f"seal {seq}: {why}")


def _field(type_: int, value: bytes | None) -> bytes:
    if value is None:
        return pack("!ii", type_, -1)
    return pack("!ii", type_, len(value)) + value


def _json(value: object) -> str:
    """JSON as PostgreSQL writes `jsonb`: keys by length, then by bytes; `", "` and `": "` between.
    Numbers are whole ones here."""
    return json.dumps(_ordered(value), ensure_ascii=False, separators=(", ", ": "))


def _ordered(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _ordered(item) for key, item in sorted(value.items(), key=_rank)}
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    return value


def _rank(item: tuple[str, object]) -> tuple[int, bytes]:
    name = item[0].encode()
    return len(name), name
