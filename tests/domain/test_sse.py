"""Frames are read back by an independent parser, written from the standard."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.execution import Stream
from rdev.domain.lines import LineSplitter
from rdev.domain.sse import TAGS, EventName, frame, frames, split_events, stored


@dataclass(slots=True)
class Received:
    """What a browser would dispatch."""

    event: str
    data: str
    last_event_id: str


@dataclass(slots=True)
class EventStreamParser:
    """WHATWG HTML, section 9.2.6 "Interpreting an event stream", to the letter."""

    last_event_id: str = ""
    reconnection_ms: int | None = None
    _event: str = ""
    _data: list[str] = field(default_factory=list)

    def parse(self, wire: bytes) -> list[Received]:
        text = wire.decode("utf-8", errors="replace").removeprefix("\ufeff")
        return [event for line in self._lines(text) if (event := self._line(line)) is not None]

    @staticmethod
    def _lines(text: str) -> Iterator[str]:
        """Lines ended by CRLF, LF or CR; an unfinished one is no line."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return iter(text.split("\n")[:-1])

    def _line(self, line: str) -> Received | None:
        if line == "":
            return self._dispatch()
        if not line.startswith(":"):
            name, _, value = line.partition(":")
            self._field(name, value.removeprefix(" "))
        return None

    def _field(self, name: str, value: str) -> None:
        if name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self.last_event_id = value
        elif name == "retry" and value and all(c in "0123456789" for c in value):
            self.reconnection_ms = int(value)

    def _dispatch(self) -> Received | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return Received(event, "\n".join(data), self.last_event_id) if data else None


json_texts = st.recursive(
    st.one_of(st.text(), st.integers(), st.none(), st.booleans()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
).map(lambda value: json.dumps({"v": value}, ensure_ascii=False).encode("utf-8", "replace"))
names = st.sampled_from(list(EventName))
stored_names = st.sampled_from([n for n in EventName if n in TAGS and n is not EventName.GAP])


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ("\ufeffdata: x\n\n", [("message", "x", "")]),
        ("data: a\r\ndata: b\r\n\r\n", [("message", "a\nb", "")]),
        ("data:a\rdata: b\r\r", [("message", "a\nb", "")]),
        ("event: e\n\ndata\n\n", [("message", "", "")]),
        ("id: 1\n\ndata: x\n\n", [("message", "x", "1")]),
        ("id: 1\nid: 2\0\ndata: x\n\n", [("message", "x", "1")]),
        (": comment\ndata:  x\n\ndata: lost\n", [("message", " x", "")]),
        ("retry: 12x\nretry: 5\nunknown: y\ndata: x\n\n", [("message", "x", "")]),
    ],
)
def test_the_parser_of_these_tests_follows_the_standard(
    wire: str, expected: list[tuple[str, str, str]]
) -> None:
    parser = EventStreamParser()
    received = parser.parse(wire.encode())
    assert [(r.event, r.data, r.last_event_id) for r in received] == expected
    assert parser.reconnection_ms in (None, 5)


def test_a_frame_has_its_fields_in_order_and_ends_in_an_empty_line() -> None:
    wire = frame("connected", b'{"a":1}', 7, retry_ms=2000)
    assert wire == b'retry: 2000\nid: 7\nevent: connected\ndata: {"a":1}\n\n'


def test_an_event_without_a_number_leaves_the_last_event_id_alone() -> None:
    parser = EventStreamParser()
    wire = frame("output", b"{}", 3) + frame("heartbeat", b"{}", None)
    assert [r.last_event_id for r in parser.parse(wire)] == ["3", "3"]


@pytest.mark.parametrize("data", [b"{\n}", b"{}\r", b"\r\n"])
def test_data_with_a_raw_line_end_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="raw line end"):
        frame("status", data, 1)


@given(names, json_texts, st.none() | st.integers(1, 2**63), st.none() | st.integers(0, 10**6))
def test_a_frame_is_read_back_as_it_was_written(
    name: EventName, data: bytes, seq: int | None, retry_ms: int | None
) -> None:
    parser = EventStreamParser(last_event_id="before")
    assert parser.parse(frame(name, data, seq, retry_ms)) == [
        Received(name, data.decode(), "before" if seq is None else str(seq))
    ]
    assert parser.reconnection_ms == retry_ms


@given(st.binary(min_size=1, max_size=200), st.integers(1, 10**12), st.integers(-2, 250))
def test_a_chunk_of_outputs_is_framed_in_bulk_as_one_by_one(
    data: bytes, first_seq: int, skipped: int
) -> None:
    payload = LineSplitter(Stream.STDOUT).feed(data + b"\n").payload
    lines = payload.split(b"\n")
    last_seq, after = first_seq + len(lines) - 1, first_seq + skipped
    expected = [
        frame("output", line, seq) for seq, line in enumerate(lines, first_seq) if seq > after
    ]
    assert frames(payload, first_seq, last_seq, after) == b"".join(expected)


@given(
    st.lists(st.tuples(stored_names | st.just(EventName.OUTPUT), json_texts), min_size=1),
    st.integers(1, 10**12),
    st.integers(-2, 20),
)
def test_a_chunk_of_mixed_events_is_read_back_in_order_with_its_numbers(
    events: list[tuple[EventName, bytes]], first_seq: int, skipped: int
) -> None:
    payload = b"\n".join([stored(name, data) for name, data in events])
    last_seq, after = first_seq + len(events) - 1, first_seq + skipped
    expected = [(seq, name, data) for seq, (name, data) in enumerate(events, first_seq)]
    assert split_events(payload, first_seq, last_seq) == expected
    received = EventStreamParser().parse(frames(payload, first_seq, last_seq, after))
    assert received == [Received(n, d.decode(), str(s)) for s, n, d in expected if s > after]


def test_a_gap_takes_the_last_number_of_its_chunk() -> None:
    payload = stored(EventName.GAP, b'{"dropped_bytes":9}')
    assert split_events(payload, 5, 90) == [(90, "gap", b'{"dropped_bytes":9}')]
    assert frames(payload, 5, 90, after=89) == b'id: 90\nevent: gap\ndata: {"dropped_bytes":9}\n\n'
    assert frames(payload, 5, 90, after=90) == b""


@pytest.mark.parametrize(
    ("payload", "first_seq", "last_seq"),
    [
        (b"{}\n{}", 1, 3),
        (b"{}\n{}", 1, 1),
        (b"a{}\n{}", 1, 3),
        (b"{}\n", 1, 2),
        (b"x{}\n{}", 1, 2),
        (b"g{}\n{}", 1, 2),
    ],
)
def test_a_chunk_that_does_not_add_up_is_refused(
    payload: bytes, first_seq: int, last_seq: int
) -> None:
    with pytest.raises(ValueError, match=r"numbered|begins with"):
        frames(payload, first_seq, last_seq)
