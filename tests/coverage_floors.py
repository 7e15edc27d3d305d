"""Holds a floor of branch coverage for each room; called by `make coverage` with coverage's JSON.

Prints one line for each room and exits 1 when one is below its floor.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FLOORS_PERCENT: Mapping[str, float] = {"rdev/domain/": 100, "rdev/services/": 95, "rdev/": 90}
COUNTS = ("covered_lines", "covered_branches", "num_statements", "num_branches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Lines and branches of one room together, as coverage itself counts a percentage."""

    prefix: str
    covered: int
    all: int

    @property
    def percent(self) -> float:
        return 100 * self.covered / self.all if self.all else 100.0

    @property
    def is_held(self) -> bool:
        return self.percent >= FLOORS_PERCENT[self.prefix]


def rooms(files: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[Room]:
    """One room for each floor, from the `files` of the JSON report."""
    return [_room(prefix, files) for prefix in FLOORS_PERCENT]


def _room(prefix: str, files: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Room:
    summaries = [file["summary"] for name, file in files.items() if name.startswith(prefix)]
    lines, branches, statements, all_branches = (_total(summaries, name) for name in COUNTS)
    return Room(prefix=prefix, covered=lines + branches, all=statements + all_branches)


def _total(summaries: Iterable[Mapping[str, int]], name: str) -> int:
    return sum(summary.get(name, 0) for summary in summaries)


def main() -> None:
    """Read the report named by the first argument."""
    found = rooms(json.loads(Path(sys.argv[1]).read_text())["files"])
    for room in found:
        verdict = "" if room.is_held else "  too low"
        floor = FLOORS_PERCENT[room.prefix]
        print(f"{room.prefix:16}{room.percent:7.2f} %  floor {floor:g} %{verdict}")
    sys.exit(0 if all(room.is_held for room in found) else 1)


if __name__ == "__main__":
    main()
