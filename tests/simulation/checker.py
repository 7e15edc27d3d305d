"""Reads a history and says which promises were broken. Knows the promises, and no code of rdev.

The numbers are stated again on purpose: a wrong constant in the product must show here.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.simulation.history import (
    Accepted,
    Answered,
    Appended,
    Awaited,
    Calm,
    CancelAsked,
    Claimed,
    Closed,
    Ended,
    Event,
    Exited,
    Fault,
    FellOver,
    Opened,
    Overdue,
    PlaceFault,
    QueuedAgain,
    Released,
    Renewed,
    Saw,
    Started,
    TakenOver,
    Touched,
    Wrote,
)

# What one level of priority is worth, in seconds of waiting.
AGE_STEP_S = 30.0
CAPS = {"agent": 1, "work": 4}
# Between a commit and its arrival at every client that is connected, when nothing is broken.
LATE_S = 2.0
# Two things so close are at the same time.
SAME_S = 1e-3
READ_ENDS = ("succeeded", "failed", "cancelled", "timed_out")
ENDS = (*READ_ENDS, "lost", "expired")


@dataclass(slots=True)
class Process:
    """One process that was started, in an attempt counted from 1."""

    attempt: int
    code: int | None = None
    is_alive: bool = True
    journal: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Told:
    """One command, as far as the history tells."""

    accepted: Accepted
    claimed_at: float | None = None
    # How often it was claimed: the number of its attempt.
    attempts: int = 0
    # The last event before each attempt.
    attempt_seqs: list[int] = field(default_factory=list)
    lease: int = 0
    until: float = 0.0
    released: bool = False
    last_seq: int = 0
    committed_at: list[float] = field(default_factory=list)
    ended: Ended | None = None
    cancel_asked: bool = False
    processes: dict[int, Process] = field(default_factory=dict)
    events: dict[int, tuple[str, bytes]] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.claimed_at is not None and self.ended is None

    @property
    def is_queued(self) -> bool:
        return self.claimed_at is None and self.ended is None

    @property
    def alive(self) -> int:
        return sum(process.is_alive for process in self.processes.values())


@dataclass(slots=True)
class LaneTold:
    """One lane. `moved`: something since its last touch may have brought it forward."""

    last_start_at: float = float("-inf")
    moved: bool = False


@dataclass(slots=True)
class Line:
    """One connection of a client."""

    command: str
    after: int
    opened_at: float


class Checker:
    """Goes through a history once. `violations` are sentences."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._commands: dict[str, Told] = {}
        self._lanes: dict[str, LaneTold] = {}
        self._keys: dict[str, str] = {}
        self._lines: dict[int, Line] = {}
        self._shaken: set[str] = set()
        # A server was told to end what it runs.
        self._interrupted = False
        self._calm_at = float("inf")
        self._now = 0.0

    def check(self, events: Iterable[Event]) -> Sequence[str]:
        """All violations, in order."""
        for event in events:
            self._now = event.at
            self._see(event)
        for command, told in self._commands.items():
            self._finish(command, told)
        return self.violations

    def _see(self, event: Event) -> None:  # noqa: C901
        match event:
            case Appended():
                self._appended(event)
            case Saw():
                self._saw(event)
            case Touched():
                self._touched(event)
            case Renewed():
                self._renewed(event)
            case Claimed():
                self._claimed(event)
            case TakenOver():
                self._taken_over(event)
            case Accepted():
                self._accepted(event)
            case Ended():
                self._ended(event)
            case QueuedAgain():
                self._queued_again(event)
            case Awaited():
                self._awaited(event)
            case Fault(kind="interrupt"):
                self._interrupted = True
            case Started():
                self._started(event)
            case Wrote():
                journal = self._commands[event.command].processes[event.process].journal
                journal[event.stream] = journal.get(event.stream, b"") + event.data
            case Exited():
                process = self._commands[event.command].processes[event.process]
                process.code, process.is_alive = event.code, False
            case Opened():
                self._lines[event.connection] = Line(event.command, event.after, event.at)
            case Closed():
                self._late(self._lines.pop(event.connection), event.connection)
            case Released():
                told = self._commands[event.command]
                told.released = told.released or told.lease == event.lease
            case CancelAsked():
                self._commands[event.command].cancel_asked = True
            case Answered():
                self._answered(event)
            case PlaceFault():
                self._shaken.add(event.project)
            case Calm():
                self._calm_at = event.at
            case FellOver():
                self._break(f"{event.server} ended by itself: {event.error}")
            case Overdue():
                self._break(f"not over in time: {event.what}")
            case _:
                pass

    def _break(self, sentence: str) -> None:
        self.violations.append(f"{self._now:.3f} s: {sentence}")

    # Accepting

    def _accepted(self, event: Accepted) -> None:
        if event.command in self._commands:
            self._break(f"{event.command} was accepted twice")
        self._commands[event.command] = Told(accepted=event)
        self._lanes.setdefault(event.lane, LaneTold()).moved = True
        if (
            event.key is not None
            and self._keys.setdefault(event.key, event.command) != event.command
        ):
            self._break(f"two commands for {event.key}")

    def _answered(self, event: Answered) -> None:
        """What a client was told is stored, and a key stands for one command."""
        if event.command not in self._commands:
            self._break(f"client {event.client} was promised {event.command}, which is not stored")
        if event.key is not None and self._keys.get(event.key) != event.command:
            self._break(f"client {event.client} was told of another command than its key's")

    # Claims: each once, in order, no more than the cap

    def _claimed(self, event: Claimed) -> None:
        told = self._commands[event.command]
        lane = told.accepted.lane
        if not told.is_queued:
            self._break(f"{event.command} was claimed, but it was not queued")
        if not told.attempts and told.accepted.expires_at <= event.at - SAME_S:
            self._break(f"{event.command} was claimed after it had expired")
        self._check_order(told, lane)
        self._check_lanes(told, lane)
        told.claimed_at = event.at
        told.attempts += 1
        told.attempt_seqs.append(told.last_seq)
        self._lease(told, event)
        running = [one for one in self._of_lane(lane) if one.is_running]
        if len(running) > CAPS[lane.rpartition("/")[2]]:
            self._break(f"{len(running)} commands run in {lane}")
        self._lanes[lane].last_start_at = event.at

    def _check_order(self, told: Told, lane: str) -> None:
        """Bound 1: overtaken only by what was accepted less than (levels × step) after it."""
        for other in self._of_lane(lane):
            if other is told or not other.is_queued:
                continue
            step_s = (told.accepted.level - other.accepted.level) * AGE_STEP_S
            if told.accepted.at - other.accepted.at > step_s + SAME_S:
                self._break(f"{told.accepted.command} overtook {other.accepted.command}")

    def _check_lanes(self, told: Told, lane: str) -> None:
        """Bound 2: a lane served at t stands behind what waited before t - (levels × step). Only
        for lanes that were touched since something last brought them forward, and that gave
        nothing in this turn: a claim takes at most one command of each lane."""
        mine = self._lanes[lane]
        for name, other in self._lanes.items():
            if name == lane or other.moved or other.last_start_at >= self._now - SAME_S:
                continue
            head = self._head(name)
            if head is None:
                continue
            step_s = (told.accepted.level - head.accepted.level) * AGE_STEP_S
            before = mine.last_start_at - step_s - SAME_S
            if head.accepted.at < before and other.last_start_at < before:
                self._break(f"{lane} was served before {name}, whose turn it was")

    def _head(self, lane: str) -> Told | None:
        """What is next in a lane that could be served."""
        commands = self._of_lane(lane)
        running = sum(one.is_running for one in commands)
        queued = [one for one in commands if one.is_queued]
        if not queued or running >= CAPS[lane.rpartition("/")[2]]:
            return None
        if any(one.accepted.expires_at <= self._now and not one.attempts for one in queued):
            return None
        return min(queued, key=lambda one: one.accepted.at - one.accepted.level * AGE_STEP_S)

    def _touched(self, event: Touched) -> None:
        for lane in self._lanes if event.lanes is None else event.lanes:
            if lane in self._lanes:
                self._lanes[lane].moved = False

    def _of_lane(self, lane: str) -> list[Told]:
        return [told for told in self._commands.values() if told.accepted.lane == lane]

    # Leases: every write is fenced, nothing is taken over early

    def _lease(self, told: Told, event: Claimed | TakenOver) -> None:
        if event.lease <= told.lease:
            self._break(f"{event.command} got lease {event.lease} after {told.lease}")
        told.lease, told.until, told.released = event.lease, event.until, False

    def _taken_over(self, event: TakenOver) -> None:
        told = self._commands[event.command]
        if not told.is_running:
            self._break(f"{event.command} was taken over, but it did not run")
        if not told.released and event.at < told.until:
            self._break(f"{event.command} was taken over before its lease had run out")
        self._lease(told, event)

    def _renewed(self, event: Renewed) -> None:
        told = self._commands[event.command]
        if not told.is_running or told.lease != event.lease:
            self._break(f"a heartbeat renewed lease {event.lease}, which is not {event.command}'s")
        told.until, told.released = event.until, False

    def _appended(self, event: Appended) -> None:
        told = self._commands[event.command]
        if told.ended is not None:
            self._break(f"events of {event.command} after its end")
        if event.lease is not None and event.lease != told.lease:
            self._break(f"a stale write: lease {event.lease} to {event.command}")
        if event.first_seq != told.last_seq + 1:
            self._break(f"events {event.first_seq}… of {event.command} after {told.last_seq}")
        told.last_seq = event.last_seq
        told.committed_at += [event.at] * (event.last_seq - event.first_seq + 1)

    # Processes: at most one, and what is said of it is true

    def _started(self, event: Started) -> None:
        told = self._commands[event.command]
        again = told.accepted.retry == "safe" and not told.alive
        if told.processes and not again:
            self._break(f"a second process of {event.command}")
        told.processes[event.process] = Process(told.attempts)
        lane = told.accepted.lane
        # What was given up as unreachable may still run; it holds no place.
        alive = [one for one in self._of_lane(lane) if one.alive and not _given_up(one)]
        if len(alive) > CAPS[lane.rpartition("/")[2]]:
            self._break(f"processes of {len(alive)} commands live in {lane}")

    def _ended(self, event: Ended) -> None:
        told = self._commands[event.command]
        if told.ended is not None:
            self._break(f"{event.command} ended twice")
        told.ended = event
        self._lanes[told.accepted.lane].moved = True
        problem = self._judge(event, told)
        if problem is not None:
            self._break(f"{event.command} ended {event.status} ({event.reason}), but {problem}")
        if told.alive and not _given_up(told):
            self._break(f"{event.command} ended {event.status}, but its process lives")

    def _queued_again(self, event: QueuedAgain) -> None:
        """Only what may run twice, and of which nothing is left."""
        told = self._commands[event.command]
        if told.accepted.retry != "safe" or told.alive or not told.is_running:
            self._break(f"{event.command} was queued again")
        if any(process.code is not None for process in told.processes.values()):
            self._break(f"{event.command} was queued again, but it had finished")
        told.claimed_at = None
        self._lanes[told.accepted.lane].moved = True

    def _awaited(self, event: Awaited) -> None:
        ended = self._commands[event.command].ended
        if ended is None or ended.status != event.status:
            self._break(f"a client was told that {event.command} had ended {event.status}")

    def _judge(self, event: Ended, told: Told) -> str | None:
        """Why a status cannot be."""
        codes = [process.code for process in told.processes.values() if process.code is not None]
        if event.status not in ENDS:
            return "that is no end"
        if told.attempts == 0 and event.status not in ("cancelled", "expired"):
            return "nobody had claimed it"
        match event.status:
            case "succeeded" if 0 not in codes[-1:]:
                return f"its exit codes were {codes}"
            case "failed" if codes[-1:] in ([], [0]):
                return f"its exit codes were {codes}"
            case "cancelled" if not told.cancel_asked and not self._interrupted:
                return "nobody had asked for it"
            case "expired" if event.at < told.accepted.expires_at or told.processes:
                return "it had not"
            case "timed_out" if not told.processes or codes:
                return f"its exit codes were {codes}"
            case "lost" if not self._may_be_lost(told):
                return "its place was well"
        return None

    def _may_be_lost(self, told: Told) -> bool:
        """Its place had a fault; or an interrupted server forbade the start and died before it
        could say so."""
        return told.accepted.lane.partition("/")[0] in self._shaken or self._interrupted

    # Streams: what clients see is what was committed, without hole or double, and in time

    def _saw(self, event: Saw) -> None:
        told, line = self._commands[event.command], self._lines[event.connection]
        if event.seq > told.last_seq:
            self._break(f"a client saw event {event.seq} of {event.command} before its commit")
        if event.seq != line.after + 1:
            self._break(f"a client saw event {event.seq} of {event.command} after {line.after}")
        if told.events.setdefault(event.seq, (event.event, event.data)) != (
            event.event,
            event.data,
        ):
            self._break(f"event {event.seq} of {event.command} was seen in two forms")
        while line.after < min(event.seq, told.last_seq):
            line.after += 1
            since = max(told.committed_at[line.after - 1], line.opened_at)
            if since > self._calm_at and event.at - since > LATE_S:
                self._break(
                    f"event {line.after} of {event.command} was seen {event.at - since:.1f} s late"
                )

    def _late(self, line: Line, connection: int) -> None:
        """What a client had not seen when it was cut."""
        committed_at = self._commands[line.command].committed_at[line.after :]
        since = max([*committed_at[:1], line.opened_at])
        waited_s = self._now - since if committed_at and since > self._calm_at else 0.0
        if connection > 0 and waited_s > LATE_S:
            self._break(f"event {line.after + 1} of {line.command} was not seen in time")

    # At the end

    def _finish(self, command: str, told: Told) -> None:
        if told.ended is None:
            self._break(f"{command} never ended")
            return
        names = [told.events[seq][0] for seq in sorted(told.events)]
        if names.count("complete") != 1 or names[-1] != "complete":
            self._break(f"the events of {command} do not end with one complete")
            return
        complete = json.loads(told.events[len(names)][1])
        if complete["status"] != told.ended.status:
            self._break(
                f"{command} ended {told.ended.status}, its stream says {complete['status']}"
            )
        for stream in ("stdout", "stderr"):
            self._check_output(command, told, stream)

    def _check_output(self, command: str, told: Told, stream: str) -> None:
        """The log of each attempt is a prefix of the journal of its process, and all of it when it
        was read to its end."""
        assert told.ended is not None
        ends = [*told.attempt_seqs[1:], told.last_seq]
        for attempt, (first, last) in enumerate(zip(told.attempt_seqs, ends, strict=False), 1):
            seen = b"".join(_contents(told.events, stream, first, last))
            journal = b"".join(
                process.journal.get(stream, b"")
                for process in told.processes.values()
                if process.attempt == attempt
            )
            is_read = attempt == told.attempts and told.ended.status in READ_ENDS
            if not journal.startswith(seen):
                self._break(f"{stream} of {command} is not what its process wrote")
            elif is_read and seen != journal:
                self._break(f"{stream} of {command} is not whole: {len(seen)} of {len(journal)}")


def _given_up(told: Told) -> bool:
    return told.ended is not None and told.ended.reason == "unreachable"


def _contents(
    events: dict[int, tuple[str, bytes]], stream: str, after: int, last: int
) -> Iterable[bytes]:
    """The bytes that some output events of one stream stand for (docs/api.md)."""
    for seq in range(after + 1, last + 1):
        name, data = events.get(seq, ("unread", b""))
        if name != "output":
            continue
        fields = json.loads(data)
        if fields["stream"] != stream:
            continue
        body = fields["line"].encode() if "line" in fields else base64.b64decode(fields["base64"])
        yield body if fields.get("partial") else body + b"\n"


def check(events: Iterable[Event]) -> Sequence[str]:
    """What was broken, as sentences; empty when every promise was kept."""
    return Checker().check(events)
