"""The exec protocol: messages into stdout and a status, however they are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.adapters.execution.channels import Demultiplexer, ExecStatus, parse_status, stdin_message
from rdev.adapters.kubernetes.websocket import MessagePart

EXIT_3 = (
    b'{"metadata":{},"status":"Failure","message":"exit 3","reason":"NonZeroExitCode",'
    b'"details":{"causes":[{"reason":"ExitCode","message":"3"}]}}'
)
NO_SHELL = b'{"status":"Failure","message":"no\\nshell","reason":"InternalError","code":500}'


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b'{"metadata":{},"status":"Success"}', ExecStatus(exit_code=0)),
        (EXIT_3, ExecStatus(exit_code=3, reason="NonZeroExitCode", message="exit 3")),
        (NO_SHELL, ExecStatus(exit_code=None, reason="InternalError", message="no shell")),
        (EXIT_3.replace(b'"3"', b'"0"'), "NonZeroExitCode"),
        (EXIT_3.replace(b'"3"', b'"-1"'), "NonZeroExitCode"),
        (EXIT_3.replace(b'"3"', b'"many"'), "NonZeroExitCode"),
        (EXIT_3.replace(b'"3"', b'"' + b"9" * 5_000 + b'"'), "NonZeroExitCode"),
        (b'{"status":"Failure","reason":"NonZeroExitCode"}', "NonZeroExitCode"),
        (b'{"status":"Failure","details":{"causes":null}}', ""),
        (b'{"status":"Fine"}', ""),
        (b'{"status":', ""),
        (b"\xff\xfe", ""),
        (b'{"status":"\xff"}', ""),
        (b'{"status":"Success","x":' + b"[" * 60_000, ""),
        (b"[]", ""),
        (b"{}", ""),
    ],
)
def test_a_status_is_a_success_only_if_it_says_so(text: bytes, status: ExecStatus | str) -> None:
    parsed = parse_status(text)
    if isinstance(status, ExecStatus):
        assert parsed == status
    else:
        assert (parsed.exit_code, parsed.reason) == (None, status)


@given(st.data())
def test_messages_may_be_cut_anywhere(data: st.DataObject) -> None:
    """Also into parts with nothing in them, the first of a message too."""
    outputs = data.draw(st.lists(st.binary(max_size=8), max_size=5))
    messages = [b"\1", b"\2", b"\3", *(b"\1" + one for one in outputs), b"\2err", b"\3" + EXIT_3]
    channels, read = Demultiplexer(), b""
    for message in messages:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(message)), max_size=3)))
        edges = [0, *cuts, len(message)]
        for number, (start, end) in enumerate(pairwise(edges)):
            assert channels.status is None
            is_last = number == len(edges) - 2
            part = MessagePart(data=message[start:end], is_first=number == 0, is_last=is_last)
            read += channels.feed(part)
    assert read == b"".join(outputs)
    assert channels.status is not None
    assert channels.status.exit_code == 3


def test_a_status_without_an_end_is_held_in_bounds() -> None:
    channels = Demultiplexer()
    for number in range(100):
        whole = b"\3" + b"x" * 65_535
        part = MessagePart(data=whole, is_first=number == 0, is_last=number == 99)
        channels.feed(part)
        assert len(channels._text) <= 65_536
    assert channels.status == ExecStatus(
        exit_code=None, message="the exec's status is not understood"
    )


def test_stdin_goes_to_the_first_channel() -> None:
    assert stdin_message(b"x") == b"\0x"
