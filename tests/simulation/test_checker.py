"""The checker itself: a good history passes, and each thing that must not happen is told."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.simulation.checker import check
from tests.simulation.history import (
    Accepted,
    Answered,
    Appended,
    Calm,
    CancelAsked,
    Claimed,
    Closed,
    Ended,
    Event,
    Exited,
    Opened,
    QueuedAgain,
    Renewed,
    Saw,
    Started,
    TakenOver,
    Touched,
    Wrote,
)

INF = float("inf")
ONE, TWO = "cmd_1", "cmd_2"
STATUS = b'{"status":"running","attempt":1}'
OUTPUT = b'{"stream":"stdout","line":"hi"}'
COMPLETE = b'{"status":"succeeded"}'
# Queued, claimed, run, read, ended: what each test spoils.
GOOD: Sequence[Event] = (
    Accepted(1.0, ONE, "p/agent", 1, "key", INF, "never"),
    Appended(1.0, ONE, None, 1, 1),
    Answered(1.1, 0, "key", ONE),
    Touched(1.2, ("p/agent",)),
    Claimed(2.0, ONE, 7, "a", 4.0),
    Appended(2.0, ONE, 7, 2, 2),
    Started(2.1, ONE, 1),
    Wrote(2.2, ONE, 1, "stdout", b"hi\n"),
    Renewed(2.5, ONE, 7, 4.5),
    Exited(2.6, ONE, 1, 0),
    Appended(2.7, ONE, 7, 3, 5),
    Ended(2.7, ONE, 7, "succeeded", None),
    Opened(3.0, -1, ONE, 0),
    Saw(3.0, -1, ONE, 1, "status", STATUS),
    Saw(3.0, -1, ONE, 2, "status", STATUS),
    Saw(3.0, -1, ONE, 3, "output", OUTPUT),
    Saw(3.0, -1, ONE, 4, "status", STATUS),
    Saw(3.0, -1, ONE, 5, "complete", COMPLETE),
    Closed(3.0, -1),
)


def test_the_checker_knows_no_code_of_rdev() -> None:
    for name in ("checker.py", "history.py"):
        source = (Path(__file__).parent / name).read_text()
        imported = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
        ours = [module for module in imported if module.startswith(("rdev", "tests"))]
        assert set(ours) <= {"tests.simulation.history"}


def test_a_good_history_passes() -> None:
    assert check(GOOD) == []


@pytest.mark.parametrize(
    ("after", "event", "sentence"),
    [
        (Claimed, Claimed(2.0, ONE, 8, "b", 4.0), "was not queued"),
        (Claimed, TakenOver(3.9, ONE, 8, "b", 9.0), "before its lease had run out"),
        (Started, Started(2.2, ONE, 2), "a second process"),
        (Exited, Renewed(2.6, ONE, 6, 5.0), "renewed lease 6"),
        (Exited, Appended(2.65, ONE, 6, 3, 3), "a stale write: lease 6"),
        (Exited, QueuedAgain(2.65, ONE, 7), "was queued again"),
        (Ended, Ended(2.8, ONE, 7, "lost", "unreachable"), "ended twice"),
        (Ended, Appended(2.8, ONE, 7, 6, 6), "after its end"),
        (Ended, Accepted(3.0, TWO, "p/work", 1, "key", INF, "never"), "two commands for key"),
        (Answered, Answered(1.1, 0, None, TWO), "which is not stored"),
        (Claimed, Accepted(2.0, TWO, "p/agent", 1, None, INF, "never"), "never ended"),
    ],
)
def test_what_must_not_happen_is_told(after: type, event: Event, sentence: str) -> None:
    at = next(number for number, one in enumerate(GOOD, 1) if isinstance(one, after))
    assert sentence in " ".join(check([*GOOD[:at], event, *GOOD[at:]]))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (Exited, Exited(2.6, ONE, 1, 3), "its exit codes were [3]"),
        (Wrote, Wrote(2.2, ONE, 1, "stdout", b"ho\n"), "not what its process wrote"),
        (Wrote, Wrote(2.2, ONE, 1, "stdout", b"hi\nho"), "not whole"),
        (Ended, Ended(2.7, ONE, 7, "cancelled", None), "nobody had asked for it"),
        (Ended, Ended(2.7, ONE, 7, "lost", "not_started"), "its place was well"),
        (Saw, Saw(3.0, -1, ONE, 2, "status", STATUS), "saw event 2 of cmd_1 after 0"),
    ],
)
def test_what_does_not_fit_is_told(old: type, new: Event, sentence: str) -> None:
    at = next(number for number, one in enumerate(GOOD) if isinstance(one, old))
    assert sentence in " ".join(check([*GOOD[:at], new, *GOOD[at + 1 :]]))


def _queued(at: float, command: str, lane: str, level: int) -> list[Event]:
    return [
        Accepted(at, command, lane, level, None, INF, "never"),
        Appended(at, command, None, 1, 1),
        CancelAsked(at, command),
        Touched(at, None),
    ]


def _claimed(at: float, command: str, lease: int) -> list[Event]:
    return [
        Claimed(at, command, lease, "a", at + 9),
        Appended(at, command, lease, 2, 4),
        Ended(at, command, lease, "cancelled", None),
        Touched(at, None),
    ]


@pytest.mark.parametrize(("waited_s", "is_told"), [(29.0, False), (31.0, True)])
def test_a_higher_level_overtakes_what_came_less_than_a_step_before(
    waited_s: float, is_told: bool
) -> None:
    events = [*_queued(1.0, ONE, "p/work", 0), *_queued(1.0 + waited_s, TWO, "p/work", 1)]
    told = " ".join(check([*events, *_claimed(50.0, TWO, 1)]))
    assert ("overtook" in told) is is_told


def test_a_lane_that_was_served_stands_behind_what_waited_before() -> None:
    events = [
        *_queued(1.0, ONE, "p/work", 1),
        *_queued(1.1, TWO, "p/work", 1),
        *_queued(1.2, "cmd_3", "q/work", 1),
        *_claimed(2.0, ONE, 1),
    ]
    assert "whose turn it was" in " ".join(check([*events, *_claimed(3.0, TWO, 2)]))
    assert "whose turn it was" not in " ".join(check([*events, *_claimed(3.0, "cmd_3", 2)]))


@pytest.mark.parametrize(("seen_at", "is_told"), [(6.5, False), (7.5, True)])
def test_an_event_reaches_a_client_within_two_seconds_when_it_is_calm(
    seen_at: float, is_told: bool
) -> None:
    events = [
        Calm(0.0),
        Opened(1.0, 1, ONE, 0),
        *_queued(5.0, ONE, "p/work", 1),
        Saw(seen_at, 1, ONE, 1, "status", STATUS),
        Closed(seen_at, 1),
    ]
    assert ("late" in " ".join(check(events))) is is_told
