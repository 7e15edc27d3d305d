"""Every sentence of `ports/output.py`, on the fake and on PostgreSQL."""

from dataclasses import replace

import msgspec
import pytest

from rdev.domain.commands import AgentReport, Claimed, Kind, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import KillReport, LostReason, Offsets
from rdev.domain.ids import CommandId
from rdev.domain.stream import Chunk, GapEvent, Source
from rdev.ports.output import Append, AppendState, NewChunk
from tests.ports.conftest import World, append_to, following, last_chunk, lines

UNKNOWN = CommandId("cmd_" + "f" * 32)
# No database has an integer this large for the raw bytes of one chunk.
GUILTY = NewChunk(source=Source.STDOUT, events=1, raw_bytes=2**31, payload=b"{}")


def _numbers(chunks: list[Chunk] | tuple[Chunk, ...]) -> list[tuple[int, int]]:
    return [(chunk.first_seq, chunk.last_seq) for chunk in chunks]


async def _ended(world: World, outcome: Outcome, kind: Kind = Kind.SHELL) -> CommandId:
    claimed = await world.running(kind)
    append = append_to(claimed, lines(2), last_chunk(outcome), outcome=outcome)
    [result] = await world.output.append([append])
    assert result.state is AppendState.APPLIED
    return claimed.lease.command


# Appending


async def test_an_append_moves_the_log_and_returns_the_stored_chunks(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, lines(3), lines(2, source=Source.STDERR))
    [result] = await world.output.append([append])
    assert (result.command, result.state) == (claimed.lease.command, AppendState.APPLIED)
    assert _numbers(result.chunks) == [(3, 5), (6, 7)]
    assert (await world.log(claimed.lease.command))[2:] == list(result.chunks)
    command = await world.commands.get(claimed.lease.command)
    assert command is not None
    assert (command.stdout_bytes, command.stderr_bytes, command.last_seq) == (30, 20, 7)
    assert command.status is Status.RUNNING


async def test_results_come_in_the_order_of_the_batch(world: World) -> None:
    first, second, third = [await world.running() for _ in range(3)]
    batch = [append_to(claimed, lines(1)) for claimed in (third, first, second)]
    results = await world.output.append(batch)
    assert [one.command for one in results] == [append.lease.command for append in batch]
    assert {one.state for one in results} == {AppendState.APPLIED}


async def test_chunks_keep_their_bytes(world: World) -> None:
    claimed = await world.running()
    payload = bytes(range(256)) * 256
    chunk = NewChunk(source=Source.STDERR, events=1, raw_bytes=7, payload=payload)
    await world.output.append([append_to(claimed, chunk)])
    [*_, stored] = await world.log(claimed.lease.command)
    assert (stored.payload, stored.source, stored.raw_bytes) == (payload, Source.STDERR, 7)


@pytest.mark.parametrize(
    ("start", "start_seq"),
    [
        (Offsets(stdout=1), None),
        (Offsets(stderr=1), None),
        (None, 1),
        (None, 3),
    ],
)
async def test_an_append_that_starts_elsewhere_changes_nothing(
    world: World, start: Offsets | None, start_seq: int | None
) -> None:
    claimed = await world.running()
    before = await world.commands.get(claimed.lease.command)
    append = append_to(claimed, lines(1), start=start, start_seq=start_seq)
    [result] = await world.output.append([append])
    assert (result.state, result.chunks) == (AppendState.STALE, ())
    assert await world.commands.get(claimed.lease.command) == before
    assert len(await world.log(claimed.lease.command)) == 2


async def test_a_stale_lease_is_refused_after_a_take_over(world: World) -> None:
    first = await world.running()
    second = await world.taken_over(first)
    [stale] = await world.output.append([append_to(first, lines(1))])
    [applied] = await world.output.append([append_to(second, lines(2))])
    [again] = await world.output.append([append_to(first, lines(2))])
    assert [one.state for one in (stale, applied, again)] == ["stale", "applied", "stale"]
    assert _numbers((await world.log(first.lease.command))[2:]) == [(3, 4)]


async def test_an_append_to_an_unknown_command_is_stale(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, lines(1))
    [result] = await world.output.append(
        [replace(append, lease=replace(append.lease, command=UNKNOWN))]
    )
    assert result.state is AppendState.STALE


async def test_a_repeated_append_is_applied_with_the_same_numbers(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, lines(3), lines(1, source=Source.STDERR))
    first = await world.output.append([append])
    assert await world.output.append([append]) == first
    assert _numbers((await world.log(claimed.lease.command))[2:]) == [(3, 5), (6, 6)]


async def test_a_repeated_append_of_events_without_bytes_is_not_doubled(world: World) -> None:
    """An agent event at the end of a journal stands for no byte of it: the offsets stay."""
    claimed = await world.running()
    append = append_to(claimed, lines(1, raw_bytes=0))
    first = await world.output.append([append])
    assert await world.output.append([append]) == first
    assert _numbers((await world.log(claimed.lease.command))[2:]) == [(3, 3)]


async def test_a_repeated_end_is_applied_with_the_same_numbers(world: World) -> None:
    claimed = await world.running()
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    append = append_to(claimed, last_chunk(outcome), outcome=outcome)
    first = await world.output.append([append])
    assert first[0].state is AppendState.APPLIED
    assert await world.output.append([append]) == first
    assert _numbers(await world.log(claimed.lease.command)) == [(1, 1), (2, 2), (3, 4)]


async def test_a_repeat_after_the_next_append_is_stale(world: World) -> None:
    claimed = await world.running()
    first = append_to(claimed, lines(1))
    await world.output.append([first])
    await world.output.append([following(first, lines(1))])
    [result] = await world.output.append([first])
    assert result.state is AppendState.STALE
    assert len(await world.log(claimed.lease.command)) == 4


async def test_a_locked_command_does_not_hold_up_the_others(world: World) -> None:
    locked, free = await world.running(), await world.running()
    batch = [append_to(locked, lines(1)), append_to(free, lines(1))]
    async with world.hold(locked.lease.command):
        first, second = await world.output.append(batch)
        assert (first.state, first.chunks) == (AppendState.LOCKED, ())
        assert second.state is AppendState.APPLIED
        assert len(await world.log(locked.lease.command)) == 2
    [again] = await world.output.append(batch[:1])
    assert again.state is AppendState.APPLIED
    assert _numbers((await world.log(locked.lease.command))[2:]) == [(3, 3)]


async def test_a_stale_command_does_not_hold_up_the_others(world: World) -> None:
    stale, free = await world.running(), await world.running()
    await world.taken_over(stale)
    batch = [append_to(stale, lines(1)), append_to(free, lines(1))]
    assert [one.state for one in await world.output.append(batch)] == ["stale", "applied"]


async def test_a_guilty_append_refuses_its_batch_as_a_whole(world: World) -> None:
    good, guilty = await world.running(), await world.running()
    batch = [append_to(good, lines(1)), append_to(guilty, GUILTY)]
    with pytest.raises(RdevError) as caught:
        await world.output.append(batch)
    assert caught.value.code is ErrorCode.INTERNAL_ERROR
    assert len(await world.log(good.lease.command)) == 2
    [applied] = await world.output.append(batch[:1])
    assert applied.state is AppendState.APPLIED
    with pytest.raises(RdevError) as caught:
        await world.output.append(batch[1:])
    assert caught.value.code is ErrorCode.INTERNAL_ERROR


# Ending


async def test_an_outcome_ends_the_command_with_its_last_events(world: World) -> None:
    outcome = Outcome(
        status=Status.FAILED,
        exit_code=3,
        reason="agent_error",
        duration_ms=1_234,
        kill=KillReport(confirmed=False, survivors=(7, 8)),
        agent=AgentReport(session_id="s-1", usage={"usage": {"input_tokens": 5}}, is_error=True),
    )
    command = await world.commands.get(await _ended(world, outcome, Kind.CLAUDE))
    assert command is not None
    assert (command.status, command.exit_code, command.signal) == (Status.FAILED, 3, None)
    assert (command.reason, command.duration_ms) == ("agent_error", 1_234)
    assert command.kill == outcome.kill
    assert command.session_id == "s-1"
    assert command.usage == {"usage": {"input_tokens": 5}}
    assert command.finished_at is not None
    assert (await world.log(command.id))[-1].is_final


@pytest.mark.parametrize("reason", list(LostReason))
async def test_every_reason_can_be_stored(world: World, reason: LostReason) -> None:
    """Reasons are texts and members of enumerations, also in one batch."""
    outcomes = [
        Outcome(status=Status.LOST, reason=reason),
        Outcome(status=Status.CANCELLED, reason="cancelled", signal=15),
        Outcome(status=Status.SUCCEEDED, exit_code=0),
    ]
    claimed = [await world.running() for _ in outcomes]
    batch = [
        append_to(one, last_chunk(outcome), outcome=outcome)
        for one, outcome in zip(claimed, outcomes, strict=True)
    ]
    assert {one.state for one in await world.output.append(batch)} == {AppendState.APPLIED}
    found = [await world.commands.get(one.lease.command) for one in claimed]
    assert [(one.status, one.reason, one.signal) for one in found if one is not None] == [
        ("lost", reason.value, None),
        ("cancelled", "cancelled", 15),
        ("succeeded", None, None),
    ]


async def test_a_text_with_nul_does_not_make_an_outcome_unstorable(world: World) -> None:
    report = AgentReport(session_id="a\0b", usage={"k\0": "\\u0000 \0"})
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0, agent=report)
    command = await world.commands.get(await _ended(world, outcome, Kind.CLAUDE))
    assert command is not None
    assert command.status is Status.SUCCEEDED


async def test_an_ended_command_takes_no_further_append(world: World) -> None:
    claimed = await world.running()
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    end = append_to(claimed, last_chunk(outcome), outcome=outcome)
    await world.output.append([end])
    [result] = await world.output.append([following(end, lines(1))])
    assert result.state is AppendState.STALE
    assert await world.claim() == []


# Reading


async def test_reading_pages_by_bytes_without_hole_or_double(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, *[lines(number % 5 + 1) for number in range(40)])
    [result] = await world.output.append([append])
    for limit_bytes in (0, 1, 100, 500, 1_000_000):
        seen: list[Chunk] = []
        after = 2
        while page := await world.output.read(
            claimed.lease.command, after=after, limit_bytes=limit_bytes
        ):
            sizes = [len(chunk.payload) for chunk in page]
            assert len(page) == 1 or sum(sizes[:-1]) < limit_bytes
            seen += page
            after = page[-1].last_seq
        assert seen == list(result.chunks)


async def test_one_page_brings_all_small_chunks_that_fit(world: World) -> None:
    claimed = await world.running()
    await world.output.append([append_to(claimed, *[lines(1) for _ in range(100)])])
    page = await world.output.read(claimed.lease.command, after=0, limit_bytes=1_048_576)
    assert len(page) == 102


async def test_a_page_has_at_most_a_thousand_chunks(world: World) -> None:
    claimed = await world.running()
    await world.output.append([append_to(claimed, *[lines(1) for _ in range(1_100)])])
    page = await world.output.read(claimed.lease.command, after=0, limit_bytes=10_000_000)
    assert len(page) == 1_000


async def test_reading_inside_a_chunk_begins_with_that_chunk(world: World) -> None:
    claimed = await world.running()
    await world.output.append([append_to(claimed, lines(4), lines(4))])
    for after, first in ((2, 3), (3, 3), (5, 3), (6, 7), (9, 7)):
        page = await world.output.read(claimed.lease.command, after=after, limit_bytes=1)
        assert page[0].first_seq == first
    assert await world.output.read(claimed.lease.command, after=10, limit_bytes=1) == []
    assert await world.output.read(claimed.lease.command, after=99, limit_bytes=1) == []


async def test_nothing_is_read_of_an_unknown_command(world: World) -> None:
    assert await world.output.read(UNKNOWN, after=0, limit_bytes=1) == []
    assert await world.output.read_tail(UNKNOWN, Source.STDOUT, tail_bytes=1) == []
    assert await world.output.oldest_seq(UNKNOWN) is None


async def test_the_tail_covers_the_last_bytes_of_one_source(world: World) -> None:
    claimed = await world.running()
    append = append_to(
        claimed,
        lines(1),
        lines(2),
        lines(9, source=Source.STDERR),
        lines(3),
    )
    await world.output.append([append])
    command = claimed.lease.command

    async def tail(tail_bytes: int) -> list[tuple[int, int]]:
        return _numbers(await world.output.read_tail(command, Source.STDOUT, tail_bytes=tail_bytes))

    assert await tail(1) == [(15, 17)]
    assert await tail(30) == [(15, 17)]
    assert await tail(31) == [(4, 5), (15, 17)]
    assert await tail(50) == [(4, 5), (15, 17)]
    assert await tail(1_000) == [(3, 3), (4, 5), (15, 17)]
    assert await tail(0) == []


async def test_the_oldest_number_is_the_first_of_the_log(world: World) -> None:
    claimed = await world.running()
    assert await world.output.oldest_seq(claimed.lease.command) == 1


async def test_heads_are_of_what_others_write(world: World) -> None:
    claimed = await world.running()
    command = claimed.lease.command
    append = append_to(claimed, lines(3))
    await world.output.append([append])
    asked = [command, UNKNOWN]
    heads = await world.output.heads(asked, written_by_others_than="two")
    assert heads == {command: append.start_seq + 3}
    assert await world.output.heads(asked, written_by_others_than="one") == {}


async def test_a_queued_command_is_written_by_nobody_here(world: World) -> None:
    await world.project()
    command = await world.queued()
    assert await world.output.heads([command], written_by_others_than="one") == {command: 1}


# Trimming


async def _trimmable(world: World) -> tuple[Claimed, Append]:
    """Ten chunks of stdout, 10 bytes each, and two of stderr between the sixth and the seventh."""
    claimed = await world.running()
    errors = [lines(1, source=Source.STDERR)] * 2
    chunks = [*[lines(1)] * 6, *errors, *[lines(1)] * 4]
    append = append_to(claimed, *chunks)
    await world.output.append([append])
    return claimed, append


async def test_trimming_keeps_head_and_tail_and_marks_the_gaps(world: World) -> None:
    claimed, _ = await _trimmable(world)
    command = claimed.lease.command
    dropped = await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=20, tail_bytes=20)
    assert dropped == 60
    chunks = await world.log(command)
    # 3, 4 | gap 5–8 | stderr 9, 10 | gap 11–12 | 13, 14
    numbers = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 9), (10, 10), (11, 12), (13, 13)]
    assert _numbers(chunks) == [*numbers, (14, 14)]
    gaps = [chunk for chunk in chunks if chunk.is_gap]
    assert [msgspec.json.decode(gap.payload[1:], type=GapEvent) for gap in gaps] == [
        GapEvent(stream="stdout", dropped_bytes=40, first_seq=5, last_seq=8),
        GapEvent(stream="stdout", dropped_bytes=20, first_seq=11, last_seq=12),
    ]
    assert [gap.raw_bytes for gap in gaps] == [40, 20]
    found = await world.commands.get(command)
    assert found is not None
    assert (found.dropped_bytes, found.truncated) == (60, True)
    assert (found.stdout_bytes, found.last_seq) == (100, 14)


async def test_the_next_trim_merges_neighbouring_gaps(world: World) -> None:
    claimed, append = await _trimmable(world)
    await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=20, tail_bytes=20)
    await world.output.append([following(append, lines(1), lines(1), lines(1))])
    dropped = await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=20, tail_bytes=20)
    assert dropped == 90
    chunks = await world.log(claimed.lease.command)
    gaps = [chunk for chunk in chunks if chunk.is_gap]
    assert _numbers(gaps) == [(5, 8), (11, 15)]
    assert [gap.raw_bytes for gap in gaps] == [40, 50]
    found = await world.commands.get(claimed.lease.command)
    assert found is not None
    assert found.dropped_bytes == 90


async def test_a_trim_of_one_source_leaves_the_other(world: World) -> None:
    claimed, _ = await _trimmable(world)
    dropped = await world.output.trim(claimed.lease, Source.STDERR, head_bytes=0, tail_bytes=0)
    assert dropped == 20
    gaps = [chunk for chunk in await world.log(claimed.lease.command) if chunk.is_gap]
    assert _numbers(gaps) == [(9, 10)]
    assert gaps[0].source is Source.STDERR


async def test_a_trim_of_little_output_drops_nothing(world: World) -> None:
    claimed, _ = await _trimmable(world)
    dropped = await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=50, tail_bytes=50)
    assert dropped == 0
    assert not any(chunk.is_gap for chunk in await world.log(claimed.lease.command))


async def test_a_trim_says_again_what_was_dropped_before(world: World) -> None:
    claimed, _ = await _trimmable(world)
    for _ in range(2):
        dropped = await world.output.trim(
            claimed.lease, Source.STDOUT, head_bytes=20, tail_bytes=20
        )
        assert dropped == 60
    found = await world.commands.get(claimed.lease.command)
    assert found is not None
    assert found.dropped_bytes == 60


async def test_a_stale_lease_trims_nothing(world: World) -> None:
    claimed, _ = await _trimmable(world)
    taken = await world.taken_over(claimed)
    dropped = await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=0, tail_bytes=0)
    assert dropped == 0
    assert not any(chunk.is_gap for chunk in await world.log(claimed.lease.command))
    assert taken.dropped_bytes == 0
    await world.output.trim(taken.lease, Source.STDOUT, head_bytes=0, tail_bytes=0)
    assert (await world.taken_over(taken)).dropped_bytes == 100


async def test_reading_after_a_number_inside_a_gap_brings_the_gap(world: World) -> None:
    claimed, _ = await _trimmable(world)
    await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=20, tail_bytes=20)
    page = await world.output.read(claimed.lease.command, after=6, limit_bytes=1)
    assert _numbers(page) == [(5, 8)]
    assert page[0].is_gap


async def test_the_tail_of_a_trimmed_source_counts_its_gaps(world: World) -> None:
    claimed, _ = await _trimmable(world)
    await world.output.trim(claimed.lease, Source.STDOUT, head_bytes=20, tail_bytes=20)
    tail = await world.output.read_tail(claimed.lease.command, Source.STDOUT, tail_bytes=21)
    assert _numbers(tail) == [(11, 12), (13, 13), (14, 14)]


# The log as a whole


async def test_events_are_numbered_without_holes(world: World) -> None:
    claimed = await world.running()
    append = append_to(claimed, lines(2))
    await world.output.append([append])
    for events in ([1], [5, 2], [3, 3, 3]):
        append = following(append, *[lines(count) for count in events])
        await world.output.append([append])
    outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
    append = following(append, last_chunk(outcome), outcome=outcome)
    await world.output.append([append])
    expected = 1
    for chunk in await world.log(claimed.lease.command):
        assert chunk.first_seq == expected
        expected = chunk.last_seq + 1
    found = await world.commands.get(claimed.lease.command)
    assert found is not None
    assert expected == found.last_seq + 1


async def test_appends_of_all_running_commands_go_in_one_batch(world: World) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await world.project(name)
        for _ in range(4):
            await world.queued(name)
    claimed = await world.claim(20)
    results = await world.output.append([append_to(one, lines(2), lines(1)) for one in claimed])
    assert len(results) == 20
    for one in claimed:
        assert _numbers((await world.log(one.lease.command))[2:]) == [(3, 4), (5, 5)]
