"""`make test-simulation`: many seeds on all cores, or one again with its whole history."""

import argparse
import faulthandler
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.simulation.chance import FaultKind
from tests.simulation.planted import PLANTED, found_at
from tests.simulation.world import simulate

SEEDS_AT_ONCE = 100
# Far more than so many seeds take; what hangs is shown.
HANGS_AFTER_S = 300
SHOWN_MAX = 10


@dataclass(slots=True)
class Tally:
    """What some seeds came to."""

    seeds: int = 0
    virtual_s: float = 0.0
    commands: int = 0
    events: int = 0
    faults: Counter[FaultKind] = field(default_factory=Counter)
    # Seed → its first violation.
    violations: dict[int, str] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Both together."""
        self.seeds += other.seeds
        self.virtual_s += other.virtual_s
        self.commands += other.commands
        self.events += other.events
        self.faults += other.faults
        self.violations |= other.violations


def run_some(seeds: Iterable[int]) -> Tally:
    """One seed after another."""
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    tally = Tally()
    for seed in seeds:
        result = simulate(seed)
        one = Tally(1, result.virtual_s, result.commands, len(result.history.events), result.faults)
        if result.violations:
            one.violations[seed] = result.violations[0]
        tally.add(one)
    faulthandler.cancel_dump_traceback_later()
    return tally


def run_many(first: int, count: int, jobs: int) -> int:
    """Print what was found; the exit code."""
    began_s = time.monotonic()
    os.nice(5)
    end = first + count
    parts = [
        range(start, min(start + SEEDS_AT_ONCE, end)) for start in range(first, end, SEEDS_AT_ONCE)
    ]
    tally = Tally()
    with ProcessPoolExecutor(jobs) as pool:
        for part in pool.map(run_some, parts):
            tally.add(part)
        _print_tally(tally, time.monotonic() - began_s)
        found = _print_planted(pool)
    return 1 if tally.violations or not found else 0


def _print_planted(pool: ProcessPoolExecutor) -> bool:
    """Whether each bug is found."""
    seeds = list(pool.map(found_at, PLANTED))
    print(f"planted    {len(PLANTED)} bugs, found at the seeds")
    for name, seed in zip(PLANTED, seeds, strict=True):
        print(f"  {name:<26} {'not found' if seed is None else seed}")
    return None not in seeds


def _print_tally(tally: Tally, wall_s: float) -> None:
    rate = tally.seeds / wall_s
    print(f"seeds      {tally.seeds}   {wall_s:.0f} s, {rate:.0f} a second")
    print(f"virtual    {tally.virtual_s:.0f} s")
    print(f"commands   {tally.commands}   events {tally.events}")
    for kind in FaultKind:
        print(f"  {kind:<16} {tally.faults[kind]}")
    print(f"faults     {tally.faults.total()}")
    print(f"violations {len(tally.violations)} seeds")
    for seed, sentence in sorted(tally.violations.items())[:SHOWN_MAX]:
        print(f"  seed {seed}: {sentence}\n    again: make test-simulation SEED={seed}")


def show(seed: int) -> int:
    """Everything that happened in one run; the exit code."""
    result = simulate(seed)
    for event in result.history.events:
        print(event)
    print(f"seed {seed}: {result.history.digest()}")
    for sentence in result.violations:
        print(sentence)
    return 1 if result.violations else 0


def main() -> int:
    """The exit code: 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="simulation")
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.seed is not None:
        return show(given.seed)
    return run_many(given.first, given.seeds, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
