"""Places in the feed, how they look on the wire, and what is told there."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.commands import Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.feed import (
    START,
    Detail,
    Position,
    check_kept,
    cursor_of,
    event_frame,
    parse_cursor,
    position_of,
    row_of,
)
from tests.fakes.feed import new_event

HALF = st.integers(min_value=0, max_value=(1 << 63) - 1)
PLACES = st.builds(position_of, HALF, HALF)


@given(PLACES)
def test_a_cursor_is_read_as_it_was_written(place: Position) -> None:
    text = cursor_of(place)
    assert len(text) == 22
    assert parse_cursor(text) == place
    assert position_of(*row_of(place)) == place


@given(st.tuples(HALF, HALF), st.tuples(HALF, HALF))
def test_places_are_ordered_as_their_rows(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (position_of(*one) < position_of(*other)) == (one < other)


@given(PLACES, st.data())
def test_no_other_text_is_a_cursor(place: Position, data: st.DataObject) -> None:
    text = cursor_of(place)
    at = data.draw(st.integers(min_value=0, max_value=len(text) - 1))
    other = text[:at] + data.draw(st.characters()) + text[at + 1 :]
    found = parse_cursor(other)
    assert found is None or cursor_of(found) == other


@pytest.mark.parametrize("text", ["", "0", "12", "=" * 22, "A" * 21, "A" * 23, "A" * 21 + "B"])
def test_what_is_malformed_is_no_cursor(text: str) -> None:
    assert parse_cursor(text) is None


def test_the_halves_fit_their_columns() -> None:
    assert parse_cursor("_" * 21 + "w") is None


def test_a_change_is_a_status_and_an_end_is_complete() -> None:
    running = new_event(Status.RUNNING, attempt=1)
    name, data = _parts(event_frame(running))
    assert name == "status"
    assert data == {
        "command_id": running.command,
        "project": "demo",
        "kind": "shell",
        "status": "running",
        "attempt": 1,
    }
    detail = Detail(reason="timed_out", exit_code=None, signal=15, duration_ms=7, stdout_bytes=3)
    name, data = _parts(event_frame(replace(running, status=Status.TIMED_OUT, detail=detail)))
    assert name == "complete"
    assert data == {
        "command_id": running.command,
        "project": "demo",
        "kind": "shell",
        "status": "timed_out",
        "exit_code": None,
        "signal": 15,
        "duration_ms": 7,
        "truncated": False,
        "stdout_bytes": 3,
        "stderr_bytes": 0,
        "reason": "timed_out",
    }


def test_the_id_of_an_event_is_its_place() -> None:
    place = position_of(7, 3)
    assert event_frame(replace(new_event(), position=place)).startswith(
        b"id: " + cursor_of(place).encode() + b"\nevent: status\n"
    )


def test_a_place_outside_of_what_is_stored_is_gone() -> None:
    check_kept(START, oldest=START, end=Position(5))
    check_kept(Position(5), oldest=Position(5), end=Position(5))
    for after in (Position(4), Position(6)):
        with pytest.raises(RdevError) as refused:
            check_kept(after, oldest=Position(5), end=Position(5))
        assert refused.value.code is ErrorCode.GONE
        assert refused.value.details == {"oldest": cursor_of(Position(5))}


def _parts(frame: bytes) -> tuple[str, object]:
    _, event, data = frame.decode().strip().split("\n")
    return event.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: "))
