"""The stored output of a command: exact bytes, NDJSON, tails, and the cap."""

import json

import pytest
import trio

from tests.app.server import Api, Event, Server, output_of, seqs_of

# Above what is kept of one stream (head and tail of 32 MiB) and the stride of trimming.
OVER_CAP_LINES = 1_600_000
LINE_BYTES = 50


async def test_stdout_is_the_default_and_the_type_is_text(api: Api) -> None:
    command = await api.submit("echo out; echo error >&2")
    await api.ended(command)
    response = await api.get(f"/commands/{command}/output")
    assert response.content == b"out\n"
    assert response.headers["Content-Type"].startswith("text/plain")


async def test_the_output_of_a_running_command_is_what_is_stored_now(api: Api) -> None:
    command = await api.submit("echo begun; sleep 60")
    with trio.fail_after(30):
        while await api.output(command) != b"begun\n":
            await trio.sleep(0.02)
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_a_tail_is_the_last_bytes(api: Api) -> None:
    command = await api.submit("seq 1 20000")
    await api.ended(command)
    whole = await api.output(command)
    for tail_bytes in (1, 5, 70_000, len(whole), len(whole) + 1):
        assert await api.output(command, tail_bytes=tail_bytes) == whole[-tail_bytes:]


@pytest.mark.parametrize(
    "query", ["stream=both", "tail_bytes=0", "tail_bytes=x", "tail_bytes=-1", "tail_bytes=1.5"]
)
async def test_a_bad_question_is_400(api: Api, query: str) -> None:
    command = await api.submit("true")
    await api.ended(command)
    assert (await api.get(f"/commands/{command}/output?{query}")).status_code == 400


async def test_all_is_one_json_object_a_line(api: Api) -> None:
    command = await api.submit("echo out; sleep 0.1; echo error >&2; sleep 0.1; printf '\\377'")
    await api.ended(command)
    response = await api.get(f"/commands/{command}/output?stream=all")
    assert response.headers["Content-Type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines == [
        {"seq": 3, "event": "output", "data": {"stream": "stdout", "line": "out"}},
        {"seq": 4, "event": "output", "data": {"stream": "stderr", "line": "error"}},
        {
            "seq": 5,
            "event": "output",
            "data": {"stream": "stdout", "base64": "/w==", "partial": True},
        },
    ]


async def test_no_output_is_an_empty_answer(api: Api) -> None:
    command = await api.submit("true")
    await api.ended(command)
    for stream in ("stdout", "stderr", "all"):
        assert await api.output(command, stream) == b""


@pytest.mark.slow
async def test_output_over_the_cap_keeps_head_and_tail(api: Api, server: Server) -> None:
    """80 MB: the middle becomes one gap in the log; who watched live has lost nothing."""
    command = await api.submit(f"seq -f %0{LINE_BYTES - 1}.0f {OVER_CAP_LINES}")
    seen_bytes, seen = 0, []
    with trio.fail_after(110):
        async with api.stream(command) as live:
            async for event in live:
                if event.name == "output":
                    seen_bytes += len(event.content)
                elif event.seq is not None:
                    seen.append(event)
    written = (server.projects / ".commands" / command / "out").read_bytes()
    assert len(written) == OVER_CAP_LINES * LINE_BYTES
    gaps = [event for event in seen if event.name == "gap"]
    assert seen_bytes + sum(int(str(gap.data["dropped_bytes"])) for gap in gaps) == len(written)

    shown = await api.command(command)
    assert shown["truncated"] is True
    assert shown["stdout_bytes"] == len(written)
    assert shown["dropped_bytes"] > 0
    assert seen[-1].data["truncated"] is True

    kept = await api.output(command)
    assert len(kept) == len(written) - shown["dropped_bytes"]
    assert kept[: 32 << 20] == written[: 32 << 20]
    assert kept[-(32 << 20) :] == written[-(32 << 20) :]

    replay = await api.events(command)
    assert_contiguous(replay[1:])
    gaps = [event for event in replay if event.name == "gap"]
    assert sum(int(str(gap.data["dropped_bytes"])) for gap in gaps) == shown["dropped_bytes"]
    assert output_of(replay) == kept


def assert_contiguous(events: list[Event]) -> None:
    """Ids count up by one, except that a gap's id is the last one it stands for."""
    expected = 1
    for event in events:
        if event.name == "gap":
            assert event.data["first_seq"] == expected
            assert event.data["last_seq"] == event.seq
            assert event.seq is not None
            expected = event.seq + 1
        else:
            assert event.seq == expected
            expected += 1
    assert seqs_of(events)[-1] == expected - 1
