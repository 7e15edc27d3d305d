"""Checkpoints: what a line says, who signed it, and where it is kept."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from rdev.adapters.checkpoints.lines import ForgedLine, Reader, Signer
from rdev.adapters.checkpoints.sinks import FileSink, UrlSink
from rdev.domain.audit_chain import Place
from rdev.domain.errors import ErrorCode, RdevError

AT = datetime(2026, 11, 22, 18, tzinfo=UTC)
SIGNER = Signer(b"s" * 32, server="one")
STAMP = "2026-11-22T18:00:00.000Z"
PLACE = Place(seq=7, hash=bytes(range(32)))


def places(lines: list[bytes], signer: Signer = SIGNER) -> list[Place]:
    return [kept.place for kept in Reader(signer.public_key).checkpoints(lines)]


def test_what_was_signed_is_read_again():
    assert places([SIGNER.line(PLACE, "2026-11-22T18:00:00.000Z")]) == [PLACE]


def test_all_servers_of_a_secret_have_one_key():
    assert Signer(b"s" * 32, server="two").public_key == SIGNER.public_key
    assert Signer(b"t" * 32, server="one").public_key != SIGNER.public_key


@pytest.mark.parametrize(
    ("what", "instead"),
    [(b'"seq":7', b'"seq":8'), (b"000102", b"ff0102"), (b"one", b"two"), (b"18:00", b"19:00")],
)
def test_a_line_that_was_changed_is_forged(what: bytes, instead: bytes):
    line = SIGNER.line(PLACE, "2026-11-22T18:00:00.000Z")
    with pytest.raises(ForgedLine) as caught:
        places([line, line.replace(what, instead)])
    assert caught.value.number == 2


def test_a_line_of_another_key_is_forged():
    with pytest.raises(ForgedLine):
        places([Signer(b"t" * 32, server="one").line(PLACE, "x")])


@pytest.mark.parametrize("text", [b"{}\n", b"x\n", b'{"seq":1}\n', b"\xff\n"])
def test_a_line_that_is_none_is_forged(text: bytes):
    with pytest.raises(ForgedLine):
        places([text])


def test_a_last_line_that_was_torn_is_passed_over():
    line = SIGNER.line(PLACE, STAMP)
    assert places([line, line[:-9]]) == [PLACE]


def test_a_line_that_a_crash_tore_off_spoils_none_behind_it():
    line = SIGNER.line(PLACE, STAMP)
    for length in range(1, len(line) - 2):
        assert places([line[:length] + b"\n", line]) == [PLACE], length


def test_a_line_says_when_it_was_kept():
    (kept,) = Reader(SIGNER.public_key).checkpoints([SIGNER.line(PLACE, STAMP)])
    assert kept.at == AT


def test_what_is_no_public_key_is_refused():
    for text in ("", "rdev_ac_", "rdev_ac_short", "other"):
        with pytest.raises(RdevError) as caught:
            Reader(text)
        assert caught.value.code is ErrorCode.BAD_REQUEST


async def test_a_file_is_appended_to(tmp_path: Path):
    path = tmp_path / "checkpoints"
    sink = FileSink(path, signer=SIGNER)
    await sink.keep(PLACE, at=AT)
    path.write_bytes(path.read_bytes() + b'{"seq":')  # torn by a crash
    await sink.keep(Place(seq=8, hash=PLACE.hash), at=AT)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    assert [place.seq for place in places(lines)] == [7, 8]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_line_that_was_written_in_part_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "checkpoints"
    sink = FileSink(path, signer=SIGNER)
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda file, data: write(file, data[:40]))
        with pytest.raises(RdevError, match="No space left"):
            await sink.keep(PLACE, at=AT)
    await sink.keep(PLACE, at=AT)
    assert places(path.read_bytes().splitlines(keepends=True)) == [PLACE]


async def test_a_file_that_cannot_be_written_is_said(tmp_path: Path):
    sink = FileSink(tmp_path / "no" / "such", signer=SIGNER)
    with pytest.raises(RdevError) as caught:
        await sink.keep(PLACE, at=AT)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE


@pytest.mark.parametrize(("status", "is_kept"), [(b"204 No Content", True), (b"500 No", False)])
async def test_a_url_gets_each_line_by_post(status: bytes, is_kept: bool, nursery: trio.Nursery):
    got: list[bytes] = []

    async def receiver(stream: trio.SocketStream) -> None:
        asked = b""
        while b"}\n" not in asked:
            asked += await stream.receive_some()
        got.append(asked)
        await stream.send_all(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

    (listener,) = await nursery.start(
        lambda task_status: trio.serve_tcp(receiver, 0, host="127.0.0.1", task_status=task_status)
    )
    port = listener.socket.getsockname()[1]
    sink = UrlSink(f"http://127.0.0.1:{port}/kept?token=secret", signer=SIGNER)
    if is_kept:
        await sink.keep(PLACE, at=AT)
        head, _, body = got[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /kept?token=secret ")
        assert places([body]) == [PLACE]
    else:
        with pytest.raises(RdevError) as caught:
            await sink.keep(PLACE, at=AT)
        # The URL may hold a secret of its own.
        assert "secret" not in str(caught.value)
