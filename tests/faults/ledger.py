"""What the commands themselves, their watchers and the database's witness say; and the verdict.

A command writes `started` and `ended` to a ledger on disk and numbered lines to both streams, so
what must arrive is known without asking rdev. Nothing here believes rdev's own word.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.app.server import Event

# Of lines that come slowly every so-manieth begins with this, shown before the line is complete.
UNFINISHED = b"not yet "
UNFINISHED_EVERY = 7


class Work(StrEnum):
    """What a command does, and how it must end."""

    QUICK = "quick"  # some lines
    BULK = "bulk"  # thousands of lines at once
    SLOW = "slow"  # a line now and then
    FAILING = "failing"  # exit status 3
    ENDLESS = "endless"  # until the gate opens
    CANCELLED = "cancelled"  # endless, and the client cancels it
    NEVER = "never"  # waits behind others until the client cancels it
    EXPIRED = "expired"  # waits behind others until its time is over


LINES = {Work.QUICK: 5, Work.BULK: 3_000, Work.SLOW: 12, Work.FAILING: 3}
STATUS = {Work.FAILING: "failed", Work.CANCELLED: "cancelled", Work.NEVER: "cancelled"}
STATUS |= {Work.EXPIRED: "expired"}
PAUSED = (Work.SLOW, Work.ENDLESS, Work.CANCELLED)

SCRIPT = """
printf 'started {name} %s\\n' $$ >> {folder}/ledger
n=0
while [ $n -lt {lines} ] && [ ! -e {folder}/gate ]; do
  n=$((n+1))
  [ $((n % {unfinished_every})) != 0 ] || {{ printf 'not yet '; {pause}; }}
  echo "{name} $n"; echo "{name} $n" >&2; {pause}
done
printf 'ended {name} %s\\n' $n >> {folder}/ledger
exit {code}
"""


@dataclass(slots=True, kw_only=True)
class Record:
    """One command as its client and its watcher saw it."""

    name: str
    work: Work
    project: str
    command: str | None = None  # its id, once a client was told
    events: list[Event] = field(default_factory=list)
    heard_at_s: float = -math.inf
    ended: bool = False

    def script(self, folder: Path) -> str:
        """What it runs."""
        # A bulk has no pauses; a gate that nobody opens ends nothing.
        return SCRIPT.format(
            name=self.name,
            folder=folder,
            lines=LINES.get(self.work, 1 << 30),
            unfinished_every=UNFINISHED_EVERY if self.work in PAUSED else 1 << 30,
            pause="sleep 0.25" if self.work in PAUSED else ":",
            code=3 if self.work is Work.FAILING else 0,
        ).replace("/gate", "/gate" if self.work is Work.ENDLESS else "/gate.none")

    def written(self, lines: int) -> tuple[bytes, bytes]:
        """What it has written to both streams after so many lines."""
        err = [f"{self.name} {n}\n".encode() for n in range(1, lines + 1)]
        if self.work not in PAUSED:
            return b"".join(err), b"".join(err)
        out = [
            (UNFINISHED if n % UNFINISHED_EVERY == 0 else b"") + line
            for n, line in enumerate(err, start=1)
        ]
        return b"".join(out), b"".join(err)

    def shown(self, stream: str) -> bytes:
        """The bytes its watcher got."""
        return b"".join(e.content for e in self.events if e.data.get("stream") == stream)


# What a shell says on stderr when the TERM reaches the program it waits for before itself; it may
# even come to its next line.
TERMINATED = b"Terminated\n"


@dataclass(slots=True)
class Tally:
    """The sums of a run, and of all runs of a session."""

    injections: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    lost_commands: int = 0
    lost_bytes: int = 0
    doubled_starts: int = 0
    stale_counted: int = 0
    stale_accepted: int = 0
    take_overs: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    measures: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Count what another one counted."""
        self.injections += other.injections
        for name in ("commands", "lost_commands", "lost_bytes", "doubled_starts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("stale_counted", "stale_accepted", "take_overs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recoveries_s += other.recoveries_s
        self.findings += other.findings
        self.measures += other.measures

    def render(self, *, lease_s: float) -> list[str]:
        """The summary, line by line."""
        kinds = Counter[str]()
        for name, count in self.injections.items():
            kinds[name.partition(" ")[0]] += count
        points = {name for name in self.injections if name.startswith("kill_at ")}
        lines = [f"injections      {self.injections.total()} of {len(kinds)} kinds"]
        lines += [f"  {count:6} {kind}" for kind, count in sorted(kinds.items())]
        lines += [f"named points    {len(points)}"] if points else []
        lines += [
            f"commands        {self.commands}",
            f"lost            {self.lost_commands} commands, {self.lost_bytes} bytes",
            f"doubled starts  {self.doubled_starts}",
            f"stale writes    {self.stale_counted} refused, {self.stale_accepted} accepted",
            f"take-overs      {self.take_overs}",
        ]
        if self.recoveries_s:
            times = sorted(self.recoveries_s)
            p50, p99 = (times[min(len(times) - 1, int(len(times) * q))] for q in (0.5, 0.99))
            lines.append(
                f"recovery        p50 {p50:.2f} s, p99 {p99:.2f} s, max {times[-1]:.2f} s "
                f"of {len(times)} kills (at most {lease_s + 5:g} s)"
            )
        return [*lines, *self.measures, *self.findings]


def judge(records: list[Record], folder: Path, tally: Tally) -> None:
    """Compare what was written with what was seen; faults are counted and said in `findings`."""
    file = folder / "ledger"
    started, ended = Counter[str](), dict[str, int]()
    for line in file.read_text().splitlines() if file.exists() else []:
        what, name, number = line.split()
        if what == "started":
            started[name] += 1
        else:
            ended[name] = int(number)
    for record in records:
        tally.commands += 1
        doubled = max(0, started[record.name] - 1)
        lost = _is_lost(record, started, ended)
        missing = _missing_bytes(record, ended)
        tally.doubled_starts += doubled
        tally.lost_commands += lost
        tally.lost_bytes += missing
        if doubled or lost or missing:
            last = record.events[-1].data if record.events else None
            tally.findings.append(
                f"FOUND {record.name} ({record.command}): started {started[record.name]} times, "
                f"lost {lost}, {missing} bytes missing or wrong; last event {last}"
            )


def _is_lost(record: Record, started: Counter[str], ended: dict[str, int]) -> bool:
    """Whether it did not end as it must, exactly once, by the watcher's record."""
    seqs = [event.seq for event in record.events]
    if seqs != list(range(1, len(seqs) + 1)):
        return True
    ends = [event for event in record.events if event.name == "complete"]
    if len(ends) != 1 or ends[0] is not record.events[-1]:
        return True
    if ends[0].data.get("status") != STATUS.get(record.work, "succeeded"):
        return True
    if record.work in (Work.NEVER, Work.EXPIRED):
        return started[record.name] > 0
    # A cancel may come before the start.
    return record.work is not Work.CANCELLED and record.name not in ended


def _missing_bytes(record: Record, ended: dict[str, int]) -> int:
    """How many bytes are not what the command wrote."""
    streams = record.shown("stdout"), record.shown("stderr")
    lines = ended.get(record.name)
    if lines is None:  # killed: what it said last it may not have said whole
        lines = max(stream.count(b"\n") for stream in streams) + 1
        return sum(
            len(seen)
            for seen, all_ in zip(streams, record.written(lines), strict=True)
            if not all_.startswith(seen.replace(TERMINATED, b"", 1).removesuffix(b"\n"))
        )
    return sum(
        max(1, abs(len(all_) - len(seen))) if seen != all_ else 0
        for seen, all_ in zip(streams, record.written(lines), strict=True)
    )
