"""How domain values look in JSON."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum

import pytest

from rdev.adapters.http.wire import encode, stamp


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    color: Color
    inner: Inner
    many: tuple[Inner, ...]
    scopes: frozenset[str]


def test_times_are_utc_with_milliseconds():
    east = timezone(timedelta(hours=2))

    assert stamp(datetime(2026, 1, 15, 12, tzinfo=UTC)) == "2026-01-15T12:00:00.000Z"
    assert stamp(datetime(2026, 1, 15, 12, 0, 0, 999_999, east)) == "2026-01-15T10:00:00.999Z"


def test_a_time_without_zone_is_a_fault_of_ours():
    with pytest.raises(ValueError, match="without zone"):
        stamp(datetime(2026, 1, 15))


def test_a_dataclass_is_written_as_it_is_all_the_way_down():
    inner = Inner(at=datetime(2026, 1, 15, 12, 0, 0, 1_000, UTC))
    value = Outer(
        name="a", color=Color.RED, inner=inner, many=(Inner(at=None),), scopes=frozenset("cab")
    )

    assert json.loads(encode({"x": [value]})) == {
        "x": [
            {
                "name": "a",
                "color": "red",
                "inner": {"at": "2026-01-15T12:00:00.001Z"},
                "many": [{"at": None}],
                "scopes": ["a", "b", "c"],
            }
        ]
    }
