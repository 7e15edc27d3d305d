"""How domain values look in JSON.

msgspec writes datetimes with microseconds and asks no hook about them, so values are made plain
first: dataclasses to objects, datetimes to RFC 3339 UTC with milliseconds, sets to sorted arrays.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum

import msgspec

# Values that msgspec writes as the contract wants them; enums go by their value.
_PLAIN = frozenset({str, int, float, bool, type(None)})


def stamp(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds and `Z`. The moment must know its zone."""
    if moment.tzinfo is None:
        raise ValueError(f"a moment without zone cannot be written: {moment!r}")
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"


def encode(value: object) -> bytes:
    """The JSON bytes of a domain value (dataclasses, mappings, sequences, sets, scalars)."""
    return msgspec.json.encode(plain(value), enc_hook=str)


def plain(value: object) -> object:
    """The value in terms of dict, list and scalars, ready for msgspec."""
    if type(value) in _PLAIN or isinstance(value, Enum):
        return value
    if isinstance(value, datetime):
        return stamp(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, AbstractSet):
        return sorted(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value
