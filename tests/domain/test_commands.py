"""Statuses, lanes, and how an outcome is judged."""

from itertools import product

import pytest

from rdev.domain.commands import (
    LANE_CAP,
    LANE_CLASS,
    TRANSITIONS,
    AgentReport,
    Claimed,
    Kind,
    LaneClass,
    Lease,
    Outcome,
    Priority,
    Retry,
    Status,
    judge,
    may_run_again,
)
from rdev.domain.execution import Exit, KillReport, Lost, LostReason, Offsets, Spec, Why
from rdev.domain.ids import CommandId, ProjectId

OURS = KillReport(confirmed=False, survivors=(7,))
THEIRS = KillReport(confirmed=True)
ENDED = {
    Status.SUCCEEDED,
    Status.FAILED,
    Status.CANCELLED,
    Status.TIMED_OUT,
    Status.LOST,
    Status.EXPIRED,
}


def _exit(
    code: int | None = 0,
    *,
    signal: int | None = None,
    why: Why | None = None,
    kill: KillReport | None = None,
) -> Exit:
    return Exit(
        exit_code=code,
        signal=signal,
        why=why,
        stdout_bytes=10,
        stderr_bytes=20,
        late_bytes=3,
        runtime_ms=44,
        kill=kill,
    )


def test_a_status_that_ends_a_command_never_changes() -> None:
    assert {status for status in Status if status.is_terminal} == ENDED
    assert all(TRANSITIONS[status] == {} for status in ENDED)


def test_only_a_running_command_is_queued_again() -> None:
    before = {status for status, after in TRANSITIONS.items() if Status.QUEUED in after}
    assert before == {Status.RUNNING}


def _claimed(retry: Retry = Retry.SAFE, *, attempt: int = 1, timeout_s: int = 60) -> Claimed:
    return Claimed(
        lease=Lease(command=CommandId("cmd_1"), id=1),
        project=ProjectId("demo"),
        kind=Kind.SHELL,
        spec=Spec(argv=("true",), timeout_s=timeout_s),
        retry=retry,
        attempt=attempt,
        running_s=0.0,
        take_over=True,
        instance="boot-1",
        offsets=Offsets(),
        last_seq=2,
        attempt_seq=0,
        dropped_bytes=0,
        queue_wait_ms=1,
        cancel_requested=False,
    )


GONE = Lost(reason=LostReason.SUPERVISOR_GONE, unfinished=True)
NOT_STARTED = Lost(reason=LostReason.NOT_STARTED)


@pytest.mark.parametrize("reason", LostReason)
def test_what_provably_did_not_finish_may_run_again(reason: LostReason) -> None:
    unfinished, unproven = Lost(reason=reason, unfinished=True), Lost(reason=reason)
    assert may_run_again(unfinished, _claimed(), running_s=1)
    assert may_run_again(unproven, _claimed(), running_s=1) is (unproven == NOT_STARTED)
    assert not may_run_again(unfinished, _claimed(Retry.NEVER), running_s=1)


def test_what_may_still_run_or_finished_does_not_run_again() -> None:
    ends: list[Exit | Lost] = [_exit(code, why=why) for code in (0, 1) for why in (None, *Why)]
    ends += [Lost(reason=reason, may_still_run=True) for reason in LostReason]
    ends += [Lost(reason=reason, may_still_run=True, unfinished=True) for reason in LostReason]
    assert not any(may_run_again(end, _claimed(), running_s=1) for end in ends)


@pytest.mark.parametrize("end", [GONE, NOT_STARTED])
def test_after_its_timeout_nothing_runs_again(end: Lost) -> None:
    assert may_run_again(end, _claimed(timeout_s=60), running_s=59.9)
    assert not may_run_again(end, _claimed(timeout_s=60), running_s=60)


@pytest.mark.parametrize("end", [GONE, NOT_STARTED])
def test_there_are_three_attempts_at_most(end: Lost) -> None:
    allowed = [may_run_again(end, _claimed(attempt=n), running_s=0) for n in (1, 2, 3, 4)]
    assert allowed == [True, True, False, False]


def test_only_what_is_unreachable_may_still_run() -> None:
    for reason in LostReason:
        outcome = judge(Lost(reason=reason), cancel_requested=False)
        assert outcome.may_still_run is (reason is LostReason.UNREACHABLE)
    assert not judge(_exit(0), cancel_requested=False).may_still_run


def test_every_judged_status_may_follow_running() -> None:
    ends: list[Exit | Lost] = [Lost(reason=reason) for reason in LostReason]
    ends += [_exit(code, why=why) for code, why in product((0, 1, None), (None, *Why))]
    for end, cancelled, hung, is_error in product(ends, *[(False, True)] * 3):
        agent = AgentReport(is_error=is_error)
        outcome = judge(end, cancel_requested=cancelled, hung=hung, agent=agent)
        assert outcome.status in TRANSITIONS[Status.RUNNING]
        assert outcome.agent is agent


def test_priorities_are_served_high_first() -> None:
    assert sorted(Priority, key=lambda one: -one.level) == ["high", "normal", "low"]


def test_agents_share_one_place_and_shells_four() -> None:
    assert {kind: LANE_CAP[LANE_CLASS[kind]] for kind in Kind} == {
        Kind.CLAUDE: 1,
        Kind.GIT: 1,
        Kind.SHELL: 4,
    }
    assert set(LANE_CAP) == set(LaneClass)


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        (_exit(0), "succeeded", None),
        (_exit(1), "failed", None),
        (_exit(127), "failed", None),
        (_exit(None, signal=9), "failed", None),
        (_exit(0, why=Why.TIMEOUT), "timed_out", "timeout"),
        (_exit(None, signal=15, why=Why.TIMEOUT), "timed_out", "timeout"),
        (_exit(None, signal=15, why=Why.CANCELLED), "cancelled", "cancelled"),
        (_exit(None, signal=9, why=Why.OUTPUT_LIMIT), "failed", "output_limit"),
        *[(Lost(reason=reason), "lost", reason) for reason in LostReason],
    ],
)
def test_an_end_is_judged_by_what_was_read(
    end: Exit | Lost, status: str, reason: str | None
) -> None:
    outcome = judge(end, cancel_requested=False)
    assert (outcome.status, outcome.reason) == (status, reason)


def test_only_a_status_that_was_read_succeeds() -> None:
    for reason, cancelled in product(LostReason, (False, True)):
        outcome = judge(Lost(reason=reason), cancel_requested=cancelled)
        assert outcome.status is not Status.SUCCEEDED


def test_a_cancel_that_forbade_the_start_has_cancelled() -> None:
    for reason in LostReason:
        outcome = judge(Lost(reason=reason), cancel_requested=True, kill=OURS)
        is_forbidden = reason is LostReason.NOT_STARTED
        assert (outcome.status is Status.CANCELLED) is is_forbidden
        assert outcome.kill == OURS


def test_a_cancel_that_came_too_late_changes_nothing() -> None:
    assert judge(_exit(0), cancel_requested=True).status is Status.SUCCEEDED
    assert judge(_exit(3), cancel_requested=True).status is Status.FAILED


def test_an_agent_that_says_is_error_has_failed() -> None:
    outcome = judge(_exit(0), cancel_requested=False, agent=AgentReport(is_error=True))
    assert (outcome.status, outcome.reason) == (Status.FAILED, "agent_error")
    fine = judge(_exit(0), cancel_requested=False, agent=AgentReport(session_id="s"))
    assert fine.status is Status.SUCCEEDED


def test_an_agent_that_we_ended_because_it_hung_has_failed() -> None:
    killed = _exit(None, signal=15, why=Why.CANCELLED)
    hung = judge(killed, cancel_requested=False, hung=True)
    assert (hung.status, hung.reason) == (Status.FAILED, "hung_after_result")
    asked = judge(killed, cancel_requested=True, hung=True)
    assert asked.status is Status.CANCELLED
    by_itself = judge(_exit(0), cancel_requested=False, hung=True)
    assert by_itself.status is Status.SUCCEEDED


def test_an_outcome_carries_what_the_status_file_said() -> None:
    end = _exit(3, kill=THEIRS)
    assert judge(end, cancel_requested=False, kill=OURS) == Outcome(
        status=Status.FAILED,
        exit_code=3,
        duration_ms=44,
        stdout_bytes=10,
        stderr_bytes=20,
        late_bytes=3,
        kill=THEIRS,
    )
    assert judge(_exit(3), cancel_requested=False, kill=OURS).kill == OURS
