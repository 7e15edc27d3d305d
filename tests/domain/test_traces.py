"""W3C Trace Context: what is taken from a client, and what is handed on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.traces import (
    STATE_MAX_CHARACTERS,
    STATE_MEMBERS_MAX,
    TraceContext,
    parse_stored,
    parse_trace,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"


def test_a_valid_traceparent_is_handed_on_as_it_came() -> None:
    found = parse_trace(GIVEN)

    assert found == TraceContext(trace_id=TRACE, span_id=PARENT, is_sampled=True)
    assert found.traceparent == GIVEN


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00-" + "0" * 32 + f"-{PARENT}-01",
        f"00-{TRACE}-" + "0" * 16 + "-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f" {GIVEN}",
        f"{GIVEN}\n",
        f"00-{TRACE}-{PARENT}",
    ],
)
def test_an_invalid_traceparent_is_no_trace(traceparent: str) -> None:
    assert parse_trace(traceparent) is None


def test_a_later_version_of_traceparent_may_say_more_and_is_handed_on_as_ours() -> None:
    found = parse_trace(f"01-{TRACE}-{PARENT}-03-more")

    assert found is not None
    assert found.traceparent == f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("fe", False)])
def test_only_the_sampled_flag_is_heeded(flags: str, is_sampled: bool) -> None:
    found = parse_trace(f"00-{TRACE}-{PARENT}-{flags}")

    assert found is not None
    assert found.is_sampled is is_sampled


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("a=1 , ,b=2", "a=1,b=2"),
        ("tenant@system=x", "tenant@system=x"),
        ("a=1,a=2", ""),
        ("A=1", ""),
        ("a", ""),
        ("a=é", ""),
        ("a=1\r\nx-evil: 1", ""),
        ("a=" + "x" * 257, ""),
        (",".join(f"k{n}=1" for n in range(STATE_MEMBERS_MAX + 1)), ""),
        ("a=" + "x" * 255 + ",b=" + "x" * STATE_MAX_CHARACTERS, ""),
    ],
)
def test_a_tracestate_is_valid_or_left_out(given: str, kept: str) -> None:
    found = parse_trace(GIVEN, given)

    assert found is not None
    assert found.state == kept


@given(st.text(), st.text())
def test_whatever_is_taken_is_stored_and_read_alike(traceparent: str, tracestate: str) -> None:
    for text in (traceparent, GIVEN):
        found = parse_trace(text, tracestate)
        assert found is None or parse_stored(found.stored) == found


def test_nothing_stored_is_no_trace_and_so_is_what_cannot_be_read() -> None:
    assert parse_stored(None) is None
    assert parse_stored("") is None
    assert parse_stored("later and different") is None
