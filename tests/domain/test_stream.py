"""Events of a command's life, and what a chunk knows of itself."""

import json
from uuid import UUID

from rdev.domain.commands import Outcome, Status
from rdev.domain.ids import command_id
from rdev.domain.sse import split_events
from rdev.domain.stream import (
    Chunk,
    GapEvent,
    Source,
    final_lines,
    gap_line,
    queued_line,
    status_line,
)


def _chunk(payload: bytes, events: int, source: Source) -> Chunk:
    return Chunk(
        command=command_id(UUID(int=1)),
        first_seq=5,
        last_seq=4 + events,
        source=source,
        raw_bytes=0,
        payload=payload,
    )


def _final() -> Chunk:
    outcome = Outcome(status=Status.FAILED, exit_code=3, duration_ms=9, reason="agent_error")
    payload = final_lines(outcome, attempt=2, truncated=True, stdout_bytes=10, stderr_bytes=20)
    return _chunk(payload, 2, Source.LIFE)


def test_a_status_tells_only_what_there_is_to_tell() -> None:
    assert status_line(Status.RUNNING, attempt=1) == b's{"status":"running","attempt":1}'
    lost = json.loads(status_line(Status.LOST, attempt=1, reason="oom_killed")[1:])
    assert lost == {"status": "lost", "attempt": 1, "reason": "oom_killed"}
    queued = json.loads(queued_line(queue_position=3)[1:])
    assert queued == {"status": "queued", "attempt": 0, "queue_position": 3}


def test_a_command_ends_with_its_status_and_everything_about_it() -> None:
    [status, complete] = split_events(_final().payload, 5, 6)
    assert status[1] == "status"
    assert json.loads(status[2]) == {"status": "failed", "attempt": 2, "reason": "agent_error"}
    assert complete[:2] == (6, "complete")
    assert json.loads(complete[2]) == {
        "status": "failed",
        "exit_code": 3,
        "signal": None,
        "duration_ms": 9,
        "truncated": True,
        "stdout_bytes": 10,
        "stderr_bytes": 20,
        "reason": "agent_error",
    }


def test_only_the_end_is_final() -> None:
    assert _final().is_final
    assert not _chunk(queued_line(queue_position=1), 1, Source.LIFE).is_final
    # A program that prints what an end looks like ends nothing.
    assert not _chunk(_final().payload, 2, Source.STDOUT).is_final


def test_events_are_counted_by_type() -> None:
    output = b'{"line":"a"}\n{"line":"b"}\na{"type":"result"}'
    gap = gap_line(GapEvent(stream="stdout", dropped_bytes=9, first_seq=5, last_seq=9))
    assert _chunk(output[:25], 2, Source.STDOUT).event_counts == {"output": 2}
    assert _chunk(output, 3, Source.STDOUT).event_counts == {"output": 2, "agent": 1}
    assert _chunk(gap, 5, Source.STDOUT).event_counts == {"gap": 1}
    assert _chunk(gap, 5, Source.STDOUT).is_gap
    assert _chunk(queued_line(queue_position=1), 1, Source.LIFE).event_counts == {"status": 1}
    assert _final().event_counts == {"status": 1, "complete": 1}
