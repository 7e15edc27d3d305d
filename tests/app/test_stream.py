"""The event stream of a command, byte by byte, from a real server."""

import base64
from contextlib import aclosing

import pytest
import trio

from tests.app.server import (
    DEADLINE_S,
    Api,
    Event,
    Server,
    metric,
    output_of,
    read_events,
    seqs_of,
    until_async,
)

ODD_BYTES = (
    b"plain\nr\rn\r\n\0nul\n\xff\xfe not UTF-8\n\xc3\xa4 \xe2\x82\xac \xf0\x9f\x98\x80\n\n\nno end"
)


async def finished(api: Api, script: str, **fields: object) -> tuple[str, list[Event]]:
    """A command that ended, with its whole stream."""
    command = await api.submit(script, **fields)
    await api.ended(command)
    return command, await api.events(command)


async def test_the_first_bytes_come_at_once(api: Api) -> None:
    command = await api.submit("sleep 60")
    with trio.fail_after(DEADLINE_S):
        async with api.wire(f"/commands/{command}/events", {}) as wire:
            assert wire.status == 200
            assert wire.headers["content-type"] == "text/event-stream"
            assert wire.headers["cache-control"] == "no-store, no-transform"
            assert wire.headers["x-accel-buffering"] == "no"
            async with aclosing(wire.body()) as body:
                first = await anext(body)
    assert first.startswith(b"retry: 2000\nevent: connected\ndata: {")
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_a_stream_is_numbered_without_holes_in_the_order_of_life(api: Api) -> None:
    command, events = await finished(api, "echo one; echo two")
    connected, *rest = events
    assert connected.name == "connected"
    assert connected.seq is None
    assert connected.data == {
        "project": "demo", "stream_id": command, "reconnecting": False, "oldest_seq": 1,
        "last_seq": len(rest), "status": "succeeded",
    }  # fmt: skip
    assert seqs_of(rest) == list(range(1, len(rest) + 1))
    names = [(event.name, event.data.get("status")) for event in rest]
    assert names == [
        ("status", "queued"), ("status", "running"), ("output", None), ("output", None),
        ("status", "succeeded"), ("complete", "succeeded"),
    ]  # fmt: skip
    assert rest[0].data == {"status": "queued", "attempt": 0, "queue_position": 1}
    assert rest[1].data == {"status": "running", "attempt": 1}
    shown = await api.command(command)
    assert rest[-1].data == {
        "status": "succeeded", "exit_code": 0, "signal": None, "truncated": False,
        "duration_ms": shown["duration_ms"], "stdout_bytes": 8, "stderr_bytes": 0, "reason": None,
    }  # fmt: skip


async def test_both_addresses_of_a_stream_give_the_same(api: Api) -> None:
    command, events = await finished(api, "echo one")
    async with api.stream(command, path=f"/projects/demo/events?stream_id={command}") as stream:
        assert [event async for event in stream] == events


async def test_a_stream_of_another_project_is_404(api: Api) -> None:
    await api.project("other")
    command = await api.submit("true")
    missing = await api.get(f"/projects/other/events?stream_id={command}")
    assert missing.status_code == 404
    await api.ended(command)


async def test_prefix_and_rest_are_the_whole_at_every_position(api: Api) -> None:
    command, events = await finished(
        api, "for n in 1 2 3 4 5 6; do echo $n; echo $n >&2; done; printf partial; exit 3"
    )
    whole = events[1:]
    last = whole[-1].seq
    assert last is not None
    for position in range(last):
        connected, *rest = await api.events(command, last_id=position)
        assert connected.data["reconnecting"] is (position > 0)
        assert whole[:position] + rest == whole
        path = f"/commands/{command}/events?after={position}"
        async with api.stream(command, path=path) as stream:
            assert [event async for event in stream][1:] == rest


@pytest.mark.parametrize("beyond", [0, 1, 1_000_000])
async def test_at_or_after_complete_there_is_nothing_more(api: Api, beyond: int) -> None:
    command, events = await finished(api, "echo one")
    last = events[-1].seq
    assert last is not None
    path = f"/commands/{command}/events"
    ended = await api.get(path, headers={"Last-Event-ID": str(last + beyond)})
    assert (ended.status_code, ended.content) == (204, b"")
    assert (await api.get(f"{path}?after={last + beyond}")).status_code == 204


async def test_beyond_the_last_event_of_a_running_command_is_410(api: Api) -> None:
    command = await api.submit("sleep 60")
    await api.running(command)
    gone = await api.get(f"/commands/{command}/events", headers={"Last-Event-ID": "1000"})
    assert gone.status_code == 410
    assert gone.json()["error"]["code"] == "GONE"
    assert gone.json()["oldest_seq"] == 1
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


@pytest.mark.parametrize("position", ["x", "-1", "1.5", "9" * 30, "٣", "1 2"])
async def test_a_position_that_is_no_number_is_400(api: Api, position: str) -> None:
    command = await api.submit("true")
    refused = await api.get(f"/commands/{command}/events", params={"after": position})
    assert refused.status_code == 400
    await api.ended(command)


async def test_head_of_a_stream_ends(api: Api) -> None:
    command = await api.submit("sleep 60")
    with trio.fail_after(DEADLINE_S):
        head = await api.http.head(f"/commands/{command}/events")
    assert (head.status_code, head.content) == (200, b"")
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_a_line_without_its_end_is_shown_after_a_short_silence(
    api: Api, server: Server
) -> None:
    gate = server.state_dir / "partial"
    command = await api.submit(
        f"printf 'name? '; while [ ! -e {gate} ]; do sleep 0.05; done; echo thanks"
    )
    seen = []
    with trio.fail_after(DEADLINE_S):
        async with api.stream(command) as events:
            async for event in events:
                if event.name == "output":
                    seen.append(event.data)
                    gate.touch()
    assert seen == [
        {"stream": "stdout", "line": "name? ", "partial": True},
        {"stream": "stdout", "line": "thanks"},
    ]


async def test_a_prompt_is_shown_while_the_other_stream_is_busy(api: Api, server: Server) -> None:
    """A spinner on stderr must not hold back a question on stdout."""
    gate = server.state_dir / "prompt"
    command = await api.submit(
        f"while [ ! -e {gate} ]; do echo . >&2; sleep 0.02; done &"
        " sleep 0.3; printf 'name? '; wait",
        timeout_s=10,
    )
    with trio.fail_after(DEADLINE_S):
        async with api.stream(command) as events:
            async for event in events:
                if event.data.get("line") == "name? ":
                    gate.touch()
    assert (await api.command(command))["status"] == "succeeded"


async def test_odd_bytes_arrive_as_they_were_written(api: Api, server: Server) -> None:
    (server.projects / "demo" / "odd").write_bytes(ODD_BYTES)
    command, events = await finished(api, "cat odd; cat odd >&2")
    assert output_of(events) == ODD_BYTES
    assert output_of(events, "stderr") == ODD_BYTES
    shown = [event.data for event in events if event.data.get("stream") == "stdout"]
    assert shown[:4] == [
        {"stream": "stdout", "line": "plain"},
        {"stream": "stdout", "line": "r\rn\r"},
        {"stream": "stdout", "line": "\0nul"},
        {"stream": "stdout", "base64": base64.b64encode(b"\xff\xfe not UTF-8").decode()},
    ]
    assert shown[-1] == {"stream": "stdout", "line": "no end", "partial": True}
    assert await api.output(command) == ODD_BYTES
    assert await api.output(command, "stderr") == ODD_BYTES


async def test_a_hundred_thousand_lines_arrive_once_and_in_order(api: Api, server: Server) -> None:
    command = await api.submit(
        "i=0; while [ $i -lt 5 ]; do i=$((i+1)); seq 20000; seq 20000 >&2; done"
    )
    events = await api.events(command)
    assert seqs_of(events) == list(range(1, len(events)))
    for stream, name in (("stdout", "out"), ("stderr", "err")):
        written = (server.projects / ".commands" / command / name).read_bytes()
        assert len(written.splitlines()) == 100_000
        assert output_of(events, stream) == written
        assert await api.output(command, stream) == written


@pytest.mark.slow
async def test_one_line_of_100_mb_costs_the_server_no_memory(api: Api, server: Server) -> None:
    before = server.rss_bytes()
    command = await api.submit(
        "head -c 50000000 /dev/zero | tr '\\0' 'a' >&2; head -c 50000000 /dev/zero | tr '\\0' 'b'"
    )
    received = 0
    with trio.fail_after(100):
        async with api.stream(command) as events:
            async for event in events:
                received += len(event.content) if event.name == "output" else 0
    assert received == 100_000_000
    assert server.rss_bytes(peak=True) - before < 150_000_000
    assert (await api.command(command))["status"] == "succeeded"


async def test_two_clients_see_the_same_at_once(api: Api, server: Server) -> None:
    gate = server.state_dir / "two"
    command = await api.submit(
        f"while [ ! -e {gate} ]; do sleep 0.02; done; seq 3000; sleep 0.1; seq 3000 >&2"
    )
    streams: list[list[Event]] = [[], []]

    async def follow(into: list[Event]) -> None:
        async with api.stream(command) as events:
            async for event in events:
                into.append(event)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for into in streams:
                nursery.start_soon(follow, into)
            await until_async(lambda: all(streams), "both are connected")
            gate.touch()
    assert [event for event in streams[0] if event.seq] == [
        event for event in streams[1] if event.seq
    ]
    assert len(seqs_of(streams[0])) == 6_004


async def test_a_client_that_stops_reading_disturbs_nobody(api: Api) -> None:
    command = await api.submit("seq -f %0250.0f 60000")
    with trio.fail_after(2 * DEADLINE_S):
        async with api.wire(f"/commands/{command}/events", {}) as stalled:
            assert stalled.status == 200
            events = await api.events(command)
            assert output_of(events).splitlines()[-1].endswith(b"60000")
            other = await api.run("echo unhurt")
            assert other["status"] == "succeeded"
            # It wakes up, and has lost nothing.
            async with aclosing(read_events(stalled)) as late:
                assert [event async for event in late if event.seq] == events[1:]


async def test_streams_and_events_are_counted(api: Api, server: Server) -> None:
    await api.project("counted")
    command = await api.submit("seq 10", project="counted")
    await api.ended(command)
    await api.events(command)
    assert metric(server, "rdev_sse_connections_total", project="counted") == 1
    assert metric(server, "rdev_sse_connections_active", project="counted") == 0
    sent = metric(server, "rdev_sse_events_sent_total", project="counted", event_type="output")
    assert sent == 10


@pytest.mark.full
async def test_a_silent_stream_says_that_it_lives(api: Api) -> None:
    command = await api.submit("sleep 100")
    with trio.fail_after(60):
        async with api.stream(command) as events:
            async for event in events:
                if event.name == "heartbeat":
                    break
    assert event.seq is None
    assert str(event.data["timestamp"]).endswith("Z")
    await api.http.delete(f"/commands/{command}")
    await api.ended(command)


async def test_the_header_wins_and_what_stands_beside_it_may_not_be_nonsense(api: Api) -> None:
    command = await api.submit("seq 1 5")
    await api.ended(command)
    events = await api.events(command)
    last = seqs_of(events)[-1]
    path = f"/commands/{command}/events"
    header = {"Last-Event-ID": str(last)}
    assert (await api.get(f"{path}?after=1", headers=header)).status_code == 204
    assert (await api.get(f"{path}?after=nonsense", headers=header)).status_code == 400
