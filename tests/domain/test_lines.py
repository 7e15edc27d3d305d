"""Journal bytes become output events and come back exactly, however they were cut."""

import json
import tracemalloc
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.execution import Stream
from rdev.domain.lines import Encoded, LineSplitter, decode, joined

LIMIT = 8

# Bytes in which lines, characters of every width, and broken characters are likely.
crumbs = st.sampled_from(
    [
        "\n",
        "\r\n",
        "\0",
        "\ufeff",
        "a",
        '"',
        "\\",
        "{",
        "ß",
        "漢",
        "😀",
        "plain text",
        "\u2028",
        "\x7f",
    ]
).map(str.encode) | st.sampled_from([b"\xff", b"\x80", b"\xf0"])
journals = st.one_of(st.binary(max_size=80), st.lists(crumbs, max_size=30).map(b"".join))
idle_flush, final_flush = "idle", "final"


def events_of(encoded: Encoded) -> list[dict[str, object]]:
    return [json.loads(line) for line in encoded.payload.split(b"\n")] if encoded.payload else []


def split(*feeds: bytes, limit: int = 16_384) -> list[dict[str, object]]:
    splitter = LineSplitter(Stream.STDOUT, piece_max_bytes=limit)
    return [e for data in feeds for e in events_of(splitter.feed(data))] + events_of(
        splitter.flush()
    )


def out(line: str, **more: object) -> dict[str, object]:
    return {"stream": "stdout", "line": line} | more


def test_a_line_is_one_event_without_its_newline() -> None:
    encoded = LineSplitter(Stream.STDERR).feed(b"one\ntwo\n")
    assert encoded.payload == b'{"stream":"stderr","line":"one"}\n{"stream":"stderr","line":"two"}'
    assert (encoded.events, encoded.consumed_bytes) == (2, 8)


def test_an_unfinished_rest_is_held_back_and_not_consumed() -> None:
    splitter = LineSplitter(Stream.STDOUT)
    assert splitter.feed(b"one\ntw").consumed_bytes == 4
    encoded = splitter.feed(b"o\n")
    assert events_of(encoded) == [out("two")]
    assert encoded.consumed_bytes == 4


def test_an_empty_line_is_an_event_and_an_empty_feed_is_none() -> None:
    assert split(b"\n\n") == [out(""), out("")]
    assert LineSplitter(Stream.STDOUT).feed(b"") == Encoded()
    assert LineSplitter(Stream.STDOUT).flush() == Encoded()


def test_a_flush_gives_the_rest_as_a_partial_piece_and_the_line_goes_on() -> None:
    splitter = LineSplitter(Stream.STDOUT)
    splitter.feed(b"Password: ")
    assert splitter.flush() == Encoded(
        payload=b'{"stream":"stdout","line":"Password: ","partial":true}',
        events=1,
        consumed_bytes=10,
    )
    assert events_of(splitter.feed(b"\n")) == [out("")]


def test_only_a_newline_ends_a_line() -> None:
    text = "\ufeffa\rb\0c\x0b\x0c\x1c\x85\u2028d\u2029"
    assert split(text.encode() + b"\r\n") == [out(text + "\r")]


def test_bytes_that_are_not_utf8_come_as_base64_and_the_lines_around_them_as_text() -> None:
    assert split(b"ok\n\xff\xfe\nok\n") == [
        out("ok"),
        {"stream": "stdout", "base64": "//4="},
        out("ok"),
    ]


def test_a_line_of_exactly_the_limit_is_one_event() -> None:
    assert split(b"x" * 8 + b"\n", limit=8) == [out("x" * 8)]
    assert split(b"x" * 8, b"\n", limit=8) == [out("x" * 8)]


def test_a_longer_line_is_cut_into_partial_pieces() -> None:
    pieces = [out("x" * 8, partial=True), out("x" * 8, partial=True), out("yz")]
    assert split(b"x" * 16 + b"yz\n", limit=8) == pieces
    assert split(b"x" * 16 + b"y", b"z\n", limit=8) == pieces


def test_a_cut_never_splits_a_character() -> None:
    assert split(("abcdefg" + "😀" * 3 + "\n").encode(), limit=8) == [
        out("abcdefg", partial=True),
        out("😀😀", partial=True),
        out("😀"),
    ]


def test_the_limit_counts_bytes_not_characters() -> None:
    assert split("漢漢漢\nß\n".encode(), limit=8) == [
        out("漢漢", partial=True),
        out("漢"),
        out("ß"),
    ]


def test_a_cut_among_stray_continuation_bytes_still_makes_progress() -> None:
    assert split(b"\x80" * 9 + b"\n", limit=8) == [
        {"stream": "stdout", "base64": "gICAgICAgIA=", "partial": True},
        {"stream": "stdout", "base64": "gA=="},
    ]


def test_an_idle_flush_keeps_an_unfinished_character_back() -> None:
    splitter = LineSplitter(Stream.STDOUT)
    splitter.feed("größe 😀".encode()[:-1])
    assert events_of(splitter.flush(idle=True)) == [out("größe ", partial=True)]
    assert splitter.flush(idle=True) == Encoded()
    assert events_of(splitter.feed("😀\n".encode()[3:])) == [out("😀")]


def test_a_final_flush_gives_up_an_unfinished_character_as_base64() -> None:
    assert split("😀".encode()[:-1]) == [
        {"stream": "stdout", "base64": "8J+Y", "partial": True},
    ]


def test_a_limit_below_one_character_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        LineSplitter(Stream.STDOUT, piece_max_bytes=3)


def test_decode_can_pick_one_stream_and_passes_over_other_events() -> None:
    stdout = LineSplitter(Stream.STDOUT).feed(b"one\n")
    stderr = LineSplitter(Stream.STDERR).feed(b"two\n")
    payload = b'a{"type":"x"}\n' + joined(stdout, stderr).payload
    assert decode(payload) == b"one\ntwo\n"
    assert decode(payload, Stream.STDERR) == b"two\n"
    assert decode(b"") == b""


def test_decode_refuses_what_is_no_payload() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(b'{"stream":"stdout",')


@given(
    st.lists(st.one_of(journals, st.sampled_from([idle_flush, final_flush]))),
    st.sampled_from([4, 5, LIMIT, 16_384]),
)
def test_no_byte_is_lost_or_added_and_no_piece_is_too_long(
    steps: list[bytes | str], limit: int
) -> None:
    splitter = LineSplitter(Stream.STDOUT, piece_max_bytes=limit)
    fed, payloads, consumed = b"", [], 0
    for step in [*steps, final_flush]:
        if isinstance(step, bytes):
            fed += step
            encoded = splitter.feed(step)
        else:
            encoded = splitter.flush(idle=step == idle_flush)
        assert encoded.events == len(events_of(encoded))
        assert decode(encoded.payload) == fed[consumed : consumed + encoded.consumed_bytes]
        consumed += encoded.consumed_bytes
        payloads += [encoded.payload] if encoded.events else []
        assert len(fed) - consumed <= limit, "more than one piece was held back"
    whole = b"\n".join(payloads)
    assert decode(whole) == fed
    for line in whole.split(b"\n") if whole else []:
        content = decode(line)
        assert len(content.removesuffix(b"\n") if b"partial" not in line else content) <= limit


@given(journals, st.lists(st.integers(0, 80)), st.sampled_from([4, LIMIT, 16_384]))
def test_the_events_do_not_depend_on_how_the_bytes_were_fed(
    data: bytes, cuts: list[int], limit: int
) -> None:
    places = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    feeds = [data[a:b] for a, b in pairwise(places)]
    assert split(*feeds, limit=limit) == split(data, limit=limit)


@given(journals, st.integers(0, 80), st.sampled_from([4, LIMIT]))
def test_a_fresh_splitter_at_the_consumed_offset_continues_exactly(
    data: bytes, cut: int, limit: int
) -> None:
    first = LineSplitter(Stream.STDOUT, piece_max_bytes=limit).feed(data[:cut])
    rest = data[first.consumed_bytes :]
    assert events_of(first) + split(rest, limit=limit) == split(data, limit=limit)


@given(st.text(max_size=60).map(str.encode), st.lists(st.integers(0, 80)))
def test_text_is_never_base64_even_when_the_command_pauses_inside_a_character(
    data: bytes, cuts: list[int]
) -> None:
    splitter = LineSplitter(Stream.STDOUT, piece_max_bytes=LIMIT)
    places = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    payloads = []
    for a, b in pairwise(places):
        payloads += [splitter.feed(data[a:b]).payload, splitter.flush(idle=True).payload]
    assert b"base64" not in b"".join(payloads)
    assert splitter.flush() == Encoded()


@pytest.mark.slow
def test_a_line_of_100_megabytes_passes_in_bounded_memory() -> None:
    splitter = LineSplitter(Stream.STDOUT)
    block = b"x" * 65_536
    tracemalloc.start()
    covered = sum(splitter.feed(block).consumed_bytes for _ in range(1600))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert covered + splitter.flush().consumed_bytes == 1600 * 65_536
    assert peak_bytes < 2_000_000
