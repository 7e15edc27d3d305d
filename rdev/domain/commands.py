"""A command: what a client asked to run in a project, its states, and how an outcome is judged.

The transition table is data: the queue's SQL follows it, and docs/states.md is generated from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from rdev.domain.audit import Actor
from rdev.domain.execution import Exit, KillReport, Lost, LostReason, Offsets, Spec, Why
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ATTEMPTS_MAX, CommandId, ProjectId
from rdev.domain.traces import TraceContext


class Kind(StrEnum):
    """What a command runs."""

    CLAUDE = "claude"
    SHELL = "shell"
    GIT = "git"


class Status(StrEnum):
    """Where a command stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        """Whether the command has ended; a terminal status never changes."""
        return not TRANSITIONS[self]


# From each status, the statuses that may follow and what makes it so.
TRANSITIONS: Mapping[Status, Mapping[Status, str]] = {
    Status.QUEUED: {
        Status.RUNNING: "claimed",
        Status.CANCELLED: "cancelled before it was claimed",
        Status.EXPIRED: "not claimed within expires_in_s",
    },
    Status.RUNNING: {
        Status.SUCCEEDED: "exit status 0 was read",
        Status.FAILED: "another exit status or a signal was read, or the agent said is_error",
        Status.CANCELLED: "ended by a cancel",
        Status.TIMED_OUT: "ended by the timeout",
        Status.LOST: "no status can be read",
        Status.QUEUED: "gone without having finished, and `retry` is `safe`",
    },
    Status.SUCCEEDED: {},
    Status.FAILED: {},
    Status.CANCELLED: {},
    Status.TIMED_OUT: {},
    Status.LOST: {},
    Status.EXPIRED: {},
}


class Priority(StrEnum):
    """Three levels. A command may be overtaken by one of a higher level, but only if that was
    accepted less than (difference of levels) × `AGE_STEP_S` after it."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def level(self) -> int:
        """The higher is served first, as long as nobody waits too long."""
        return {Priority.HIGH: 2, Priority.NORMAL: 1, Priority.LOW: 0}[self]


class Retry(StrEnum):
    """Whether rdev may run a command again when it provably did not finish."""

    NEVER = "never"
    SAFE = "safe"


class LaneClass(StrEnum):
    """Commands of one project and class share a cap."""

    AGENT = "agent"
    WORK = "work"


# claude and git share the working tree, so they take turns; shells may run side by side.
LANE_CLASS: Mapping[Kind, LaneClass] = {
    Kind.CLAUDE: LaneClass.AGENT,
    Kind.GIT: LaneClass.AGENT,
    Kind.SHELL: LaneClass.WORK,
}
LANE_CAP: Mapping[LaneClass, int] = {LaneClass.AGENT: 1, LaneClass.WORK: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCommand:
    """An accepted request, not yet stored. `argv` is the redacted form that may be shown;
    `expires_in_s` None means it waits for ever."""

    id: CommandId
    project: ProjectId
    kind: Kind
    spec: Spec
    argv: tuple[str, ...]
    priority: Priority
    retry: Retry
    expires_in_s: int | None
    actor: Actor
    idempotency: Idempotency | None = None
    # Below which its work stands in a trace.
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command as it is known now; this is what clients see. Times are the database's.

    `started_at`, `queue_wait_ms` and all that is said of output (`stdout_bytes`, `truncated` …) are
    the present attempt's, which begins behind the event `attempt_seq`.
    """

    id: CommandId
    project: ProjectId
    kind: Kind
    status: Status
    priority: Priority
    attempt: int
    exit_code: int | None
    signal: int | None
    reason: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None
    queue_wait_ms: int | None
    stdout_bytes: int
    stderr_bytes: int
    dropped_bytes: int
    truncated: bool
    argv: tuple[str, ...]
    key_id: str
    session_id: str | None
    usage: Mapping[str, object] | None
    kill: KillReport | None
    last_seq: int
    attempt_seq: int

    @property
    def may_still_run(self) -> bool:
        """Whether it ended without anybody knowing that its process did."""
        return self.status is Status.LOST and self.reason == LostReason.UNREACHABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to write for one command. `id` comes from a sequence that never resets."""

    command: CommandId
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A command that is ours to run or, after a take-over, to go on observing.

    `instance` is what the project was when the attempt began (None: not recorded yet, so it
    cannot have started). `offsets` and `dropped_bytes` are what the log already holds of the
    attempt, which begins behind the event `attempt_seq`; `last_seq` counts the events of all.
    `running_s`: how long ago, in seconds, the attempt was claimed first. `taken_from`: of a
    take-over, the lease of the former holder. `trace` is what was stored with the command.
    """

    lease: Lease
    project: ProjectId
    kind: Kind
    spec: Spec
    retry: Retry
    attempt: int
    running_s: float
    take_over: bool
    instance: str | None
    offsets: Offsets
    last_seq: int
    attempt_seq: int
    dropped_bytes: int
    queue_wait_ms: int
    cancel_requested: bool
    trace: TraceContext | None = None
    taken_from: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReport:
    """What an agent's own stream said of its run."""

    session_id: str | None = None
    usage: Mapping[str, object] | None = None
    is_error: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended, as it is stored with its last event; or, with `queued`, how its attempt
    did, which another one will follow."""

    status: Status
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    duration_ms: int | None = None
    stdout_bytes: int | None = None
    stderr_bytes: int | None = None
    late_bytes: int = 0
    kill: KillReport | None = None
    agent: AgentReport | None = None

    @property
    def may_still_run(self) -> bool:
        """See `Command.may_still_run`."""
        return self.status is Status.LOST and self.reason == LostReason.UNREACHABLE


def may_run_again(end: Exit | Lost, claimed: Claimed, *, running_s: float) -> bool:
    """Whether `retry: safe` lets a command run again after its attempt ended so.

    1. Only where the attempt provably did not finish: it was never started and never can be, or no
       process of it is left and nothing says that it ended.
    2. Not when its timeout has passed: `running_s` seconds ago the attempt was claimed. By now it
       would have been ended, and nobody waits for it any more.
    3. At most `ATTEMPTS_MAX` attempts in all.
    """
    if claimed.retry is not Retry.SAFE or not isinstance(end, Lost) or end.may_still_run:
        return False
    did_not_finish = end.unfinished or end.reason is LostReason.NOT_STARTED
    in_time = running_s < claimed.spec.timeout_s
    return did_not_finish and in_time and claimed.attempt < ATTEMPTS_MAX


def judge(
    end: Exit | Lost,
    *,
    cancel_requested: bool,
    hung: bool = False,
    agent: AgentReport | None = None,
    kill: KillReport | None = None,
) -> Outcome:
    """The outcome of a command from what was read in its project.

    1. Nothing could be read: `lost`, unless a cancel was asked for and the start was forbidden.
    2. The supervisor ended it: `cancelled`, `timed_out`, or `failed` for its output limit; `failed`
       too where nobody asked for the cancel but rdev itself, because the agent `hung`.
    3. It ended by itself: `succeeded` only with exit status 0 and no `is_error`.

    `kill` is what a cancel of ours saw, where the status file does not say it.
    """
    if isinstance(end, Lost):
        if cancel_requested and end.reason is LostReason.NOT_STARTED:
            return Outcome(status=Status.CANCELLED, reason="cancelled", kill=kill, agent=agent)
        return Outcome(status=Status.LOST, reason=end.reason, kill=kill, agent=agent)
    is_error = agent is not None and agent.is_error
    status, reason = _judge_exit(end, hung=hung and not cancel_requested, is_error=is_error)
    return Outcome(
        status=status,
        exit_code=end.exit_code,
        signal=end.signal,
        reason=reason,
        duration_ms=end.runtime_ms,
        stdout_bytes=end.stdout_bytes,
        stderr_bytes=end.stderr_bytes,
        late_bytes=end.late_bytes,
        kill=end.kill or kill,
        agent=agent,
    )


def _judge_exit(end: Exit, *, hung: bool, is_error: bool) -> tuple[Status, str | None]:
    match end.why:
        case Why.CANCELLED if hung:
            return Status.FAILED, "hung_after_result"
        case Why.CANCELLED:
            return Status.CANCELLED, "cancelled"
        case Why.TIMEOUT:
            return Status.TIMED_OUT, "timeout"
        case Why.OUTPUT_LIMIT:
            return Status.FAILED, "output_limit"
        case None if end.exit_code != 0:
            return Status.FAILED, None
        case None if is_error:
            return Status.FAILED, "agent_error"
        case None:
            return Status.SUCCEEDED, None
