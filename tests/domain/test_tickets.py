"""Tickets: what was sealed is read, and nothing else is."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.ids import CommandId, KeyId, command_id, key_id
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.tickets import (
    AFTER_END_S,
    STREAM_TOKEN_S,
    Seals,
    Ticket,
    TicketKind,
    is_readable,
)

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
SEALS = Seals(b"s" * 32)
OTHER = Seals(b"t" * 32)

keys = st.one_of(st.uuids().map(key_id), st.just(ADMIN_KEY_ID))
public_ids = st.from_regex(r"[0-9A-Za-z]{8,16}", fullmatch=True)
seconds = st.integers(min_value=1, max_value=10**9)
streams = st.one_of(st.none(), st.uuids().map(command_id))


@st.composite
def tickets(draw: st.DrawFn) -> Ticket:
    return Ticket(
        key_id=draw(keys),
        public_id=draw(public_ids),
        ends_at=NOON + timedelta(seconds=draw(seconds)),
        stream=draw(streams),
    )


SESSION = Ticket(
    key_id=key_id(UUID(int=7)), public_id="aB345678", ends_at=NOON + timedelta(seconds=60)
)
STREAM = Ticket(
    key_id=SESSION.key_id,
    public_id=SESSION.public_id,
    ends_at=NOON + timedelta(seconds=STREAM_TOKEN_S),
    stream=command_id(UUID(int=9)),
)


@given(tickets())
def test_a_ticket_is_read_as_it_was_written(ticket: Ticket) -> None:
    text = SEALS.written(ticket)
    assert SEALS.read(text, ticket.kind, NOON) == ticket
    assert Seals(b"s" * 32).read(text, ticket.kind, NOON) == ticket


@given(tickets())
def test_a_ticket_is_of_one_kind(ticket: Ticket) -> None:
    (other,) = set(TicketKind) - {ticket.kind}
    text = SEALS.written(ticket)
    assert SEALS.read(text, other, NOON) is None
    renamed = text.replace(f"rdev_{ticket.kind}_", f"rdev_{other}_")
    assert renamed != text
    assert [SEALS.read(renamed, kind, NOON) for kind in TicketKind] == [None, None]


def test_the_kinds_are_sealed_with_different_keys() -> None:
    """Also where the text that is sealed says the same, one seal is not good as the other."""
    session, stream = (SEALS._seal(kind, "the same") for kind in TicketKind)
    assert session != stream


@given(tickets())
def test_a_ticket_of_another_secret_is_none(ticket: Ticket) -> None:
    assert OTHER.read(SEALS.written(ticket), ticket.kind, NOON) is None


@given(tickets(), st.data())
def test_one_bit_more_or_less_makes_it_none(ticket: Ticket, data: st.DataObject) -> None:
    raw = bytearray(SEALS.written(ticket).encode())
    place = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[place // 8] ^= 1 << place % 8
    assert SEALS.read(raw.decode("latin-1"), ticket.kind, NOON) is None


@given(tickets(), st.data())
def test_a_piece_of_it_is_none(ticket: Ticket, data: st.DataObject) -> None:
    text = SEALS.written(ticket)
    first = data.draw(st.integers(0, len(text)))
    last = data.draw(st.integers(first, len(text)))
    if (first, last) != (0, len(text)):
        assert SEALS.read(text[first:last], ticket.kind, NOON) is None
    assert SEALS.read(text + text[first:] or "x", ticket.kind, NOON) is None or first == len(text)


@given(tickets(), tickets())
def test_the_parts_of_two_make_no_third(one: Ticket, two: Ticket) -> None:
    """The words of one under the seal of the other."""
    words, _, _ = SEALS.written(one).rpartition(".")
    _, _, seal = SEALS.written(two).rpartition(".")
    forged = SEALS.read(f"{words}.{seal}", one.kind, NOON)
    assert forged is None or one == two


@given(st.text(max_size=300), st.sampled_from(TicketKind))
def test_what_nobody_sealed_is_none(text: str, kind: TicketKind) -> None:
    assert SEALS.read(text, kind, NOON) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "rdev_session_",
        "rdev_session_key_admin.x.1." + "A" * 43,
        "x" * 10**6,
        "\0",
        "٣" * 99,
    ],
)
def test_what_looks_like_one_is_none(text: str) -> None:
    assert [SEALS.read(text, kind, NOON) for kind in TicketKind] == [None, None]


def test_the_last_digit_of_a_seal_has_one_reading() -> None:
    """Its two spare bits decode to nothing: text is compared, not what it decodes to."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    text = SEALS.written(SESSION)
    good = [digit for digit in digits if SEALS.read(text[:-1] + digit, SESSION.kind, NOON)]
    assert good == [text[-1]]


@pytest.mark.parametrize(
    ("after_s", "is_good"), [(0, True), (59, True), (59.999, True), (60, False), (61, False)]
)
def test_a_ticket_ends_on_the_second(after_s: float, is_good: bool) -> None:
    found = SEALS.read(SEALS.written(SESSION), SESSION.kind, NOON + timedelta(seconds=after_s))
    assert (found is not None) is is_good


def test_an_end_between_two_seconds_is_the_earlier_one() -> None:
    ticket = Ticket(
        key_id=SESSION.key_id,
        public_id=SESSION.public_id,
        ends_at=NOON + timedelta(seconds=59.9),
    )
    text = SEALS.written(ticket)
    assert SEALS.read(text, ticket.kind, NOON + timedelta(seconds=58.9)) is not None
    assert SEALS.read(text, ticket.kind, NOON + timedelta(seconds=59)) is None


def test_a_clock_that_was_set_back_lengthens_nothing_that_it_did_not_write() -> None:
    """The end is absolute: on a clock that is an hour behind it is an hour further away."""
    text = SEALS.written(SESSION)
    hour = timedelta(hours=1)
    assert SEALS.read(text, SESSION.kind, NOON - hour) == SESSION
    assert SEALS.read(text, SESSION.kind, NOON + hour) is None


@pytest.mark.parametrize(
    ("finished_s", "asked_s", "is_good"),
    [
        # It runs.
        (None, 0, True),
        (None, STREAM_TOKEN_S - 1, True),
        (None, STREAM_TOKEN_S, False),
        # It ended: some minutes more, from its end.
        (600, 600 + 90, True),
        (600, 600 + AFTER_END_S - 1, True),
        (600, 600 + AFTER_END_S, False),
        # It had ended before the token was made: some minutes from then.
        (-600, 0, True),
        (-600, AFTER_END_S - 1, True),
        (-600, AFTER_END_S, False),
        # Never beyond the token's own end.
        (STREAM_TOKEN_S - 1, STREAM_TOKEN_S, False),
    ],
)
def test_a_stream_is_read_until_some_minutes_after_the_commands_end(
    finished_s: int | None, asked_s: int, is_good: bool
) -> None:
    finished_at = None if finished_s is None else NOON + timedelta(seconds=finished_s)
    assert is_readable(STREAM, finished_at, NOON + timedelta(seconds=asked_s)) is is_good


def test_the_mark_of_a_key_tells_nothing_of_it() -> None:
    assert SEALS.mark_of("one") == Seals(b"s" * 32).mark_of("one")
    assert len({SEALS.mark_of("one"), SEALS.mark_of("two"), OTHER.mark_of("one")}) == 3
    assert SEALS.mark_of("schlüssel \ud800").isalnum()


def test_a_ticket_names_no_more_than_ids() -> None:
    text = SEALS.written(STREAM)
    assert text.startswith(f"rdev_stream_{STREAM.key_id}.aB345678.")
    assert isinstance(STREAM.stream, str)
    assert CommandId(text.split(".")[3]) == STREAM.stream
    assert KeyId(text.removeprefix("rdev_stream_").split(".")[0]) == STREAM.key_id
