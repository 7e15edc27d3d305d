import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.adapters.execution.frames import (
    Alive,
    Frame,
    FrameDecoder,
    Hello,
    ProtocolError,
    parse_kill,
    parse_status,
)
from rdev.domain.execution import Exit, KillReport, Lost, LostReason, Offsets, Piece, Stream, Why

STATUS = (
    b"code 3\nsignal \nwhy timeout\nout_bytes 8\nerr_bytes 2\nlate_bytes 1\n"
    b"runtime_ms 40\nkill survivors 12 34\nend \n"
)
WIRE = b"h\no 5 3\na\nck\ne 0 2\n\x00\xffs %d\n" % len(STATUS) + STATUS
AT = Offsets(stdout=5)


def together(frames: list[Frame]) -> list[Frame]:
    """Neighbouring pieces of one stream as one."""
    joined: list[Frame] = []
    for frame in frames:
        last = joined[-1] if joined else None
        if isinstance(frame, Piece) and isinstance(last, Piece) and last.stream is frame.stream:
            assert frame.offset == last.offset + len(last.data)
            joined[-1] = Piece(stream=last.stream, offset=last.offset, data=last.data + frame.data)
        else:
            joined.append(frame)
    return joined


@given(st.lists(st.integers(1, 20), max_size=40))
def test_frames_are_the_same_however_the_stream_is_cut(lengths: list[int]) -> None:
    decoder, wire, frames = FrameDecoder(AT), WIRE, []
    for length in [*lengths, len(WIRE)]:
        frames += decoder.feed(wire[:length])
        wire = wire[length:]
    assert together(frames) == [
        Hello(),
        Piece(stream=Stream.STDOUT, offset=5, data=b"a\nc"),
        Alive(),
        Piece(stream=Stream.STDERR, offset=0, data=b"\x00\xff"),
        Exit(
            exit_code=3,
            signal=None,
            why=Why.TIMEOUT,
            stdout_bytes=8,
            stderr_bytes=2,
            late_bytes=1,
            runtime_ms=40,
            kill=KillReport(confirmed=False, survivors=(12, 34)),
        ),
    ]


@pytest.mark.parametrize(
    "wire",
    [
        b"x\n",
        b"h 1\n",
        b"o 6 1\na",  # a hole
        b"o 4 1\na",  # an overlap
        b"o 5\n",
        b"o five 1\n",
        b"l no_such_reason\n",
        b"s 99999\n",
        b"s 5\nend \n",
        b"sh: 1: not found, and a line that does not end within the bound of a header",
        b"s %d\n" % len(STATUS) + STATUS,  # before all output
    ],
)
def test_what_is_no_frame_is_refused(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameDecoder(AT).feed(wire)


def test_lost_carries_its_reason() -> None:
    assert FrameDecoder(AT).feed(b"l supervisor_gone\n") == [
        Lost(reason=LostReason.SUPERVISOR_GONE)
    ]


def test_a_status_with_a_missing_field_is_refused() -> None:
    with pytest.raises(ProtocolError):
        parse_status(STATUS.replace(b"err_bytes 2\n", b""))


def test_a_kill_nobody_reported_is_not_confirmed() -> None:
    assert parse_kill("unknown") == KillReport(confirmed=False)
    assert parse_kill("confirmed") == KillReport(confirmed=True)
    assert parse_kill("") is None
