"""What the contract run asked and what came of it, by operation and status.

Bounded by operations × statuses.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Answers = Counter[tuple[str, int]]


@dataclass(slots=True)
class Tally:
    """Answers by operation ("GET /projects") and status."""

    answers: Answers = field(default_factory=Counter)

    @property
    def cases(self) -> int:
        return self.answers.total()

    def add(self, other: "Tally") -> None:
        self.answers.update(other.answers)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps([[*key, count] for key, count in self.answers.items()]))

    @classmethod
    def read(cls, path: Path) -> "Tally":
        """Nothing where there is no such file: the process was killed."""
        rows = json.loads(path.read_text()) if path.exists() else []
        return cls(Counter({(operation, status): count for operation, status, count in rows}))

    def unreached(self, operations: Iterable[str]) -> list[str]:
        """Those that never answered 2xx."""
        good = {name for name, status in self.answers if 200 <= status < 300}
        return sorted(set(operations) - good)

    def summary(self, operations: Iterable[str]) -> str:
        """A line for each operation, then the statuses, then what was never reached."""
        asked = sorted({*operations, *(name for name, _ in self.answers)})
        lines = [f"{self._count(name):>8,}  {name:<48} {self._statuses(name)}" for name in asked]
        lines.append(f"{self.cases:>8,}  {'in all':<48} {self._statuses(None)}")
        unreached = self.unreached(asked)
        lines.append(
            "every operation answered 2xx"
            if not unreached
            else "never answered 2xx: " + ", ".join(unreached)
        )
        return "\n".join(lines)

    def _count(self, operation: str) -> int:
        return sum(count for (name, _), count in self.answers.items() if name == operation)

    def _statuses(self, operation: str | None) -> str:
        found: Counter[int] = Counter()
        for (name, status), count in self.answers.items():
            if operation in (None, name):
                found[status] += count
        return "  ".join(f"{status}: {count:,}" for status, count in sorted(found.items()))
