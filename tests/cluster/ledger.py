"""What was done to the cluster, and what it cost: one line for each fault, printed at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One fault: how often, on how many commands, and what was wrong afterwards."""

    fault: str
    times: int = 1
    commands: int = 1
    wrong_bytes: int = 0
    false_successes: int = 0
    outcome: str = ""


@dataclass(slots=True)
class Ledger:
    """Of one session. Tests add before they assert: what was found is printed either way."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Count a fault."""
        self.entries.append(entry)

    def render(self) -> list[str]:
        """Line by line, and the sums."""
        lines = [
            f"{one.times:6} × {one.fault:44} {one.commands:3} commands, "
            f"{one.wrong_bytes} bytes wrong, {one.false_successes} false successes: {one.outcome}"
            for one in self.entries
        ]
        times, commands = (
            sum(getattr(one, name) for one in self.entries) for name in ("times", "commands")
        )
        wrong, false = (
            sum(getattr(one, name) for one in self.entries)
            for name in ("wrong_bytes", "false_successes")
        )
        return [
            *lines,
            f"{times:6} faults, {commands} commands, {wrong} bytes wrong, {false} false successes",
        ]


def quantiles(times_s: Sequence[float]) -> str:
    """p50, p99 and the longest, in words."""
    ordered = sorted(times_s)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.99))
    return f"p50 {p50:.3f} s, p99 {p99:.3f} s, max {ordered[-1]:.3f} s of {len(ordered)}"


def wrong_bytes(seen: bytes, written: bytes) -> int:
    """How many are missing, too many or not the same."""
    same = sum(a == b for a, b in zip(seen, written, strict=False)) if seen != written else 0
    return 0 if seen == written else max(len(seen), len(written)) - same
