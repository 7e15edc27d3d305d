"""`make test-contract`: 100,000 invented requests, or as many as fit in the minutes given.

Each lane has a server of its own (what one deletes is not missed by another) and runs round after
round, each with a seed of its own: inventing a request takes ten times the server's work on it.
Goes on after a finding, so that one run shows all of them, and ends with a summary.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from rdev.adapters.http.openapi import DESCRIBED
from tests.contract.run import ENDLESS, Found, contract_run, recording_server

ROUND_S = 240
LANES = 2
REPORTS_MAX = 20
OPERATIONS = [" ".join(route) for route in DESCRIBED if route[1] not in ENDLESS]


@dataclass(slots=True, kw_only=True)
class Campaign:
    """What is wanted, and what all lanes have come to."""

    cases: int
    ends_at_s: float
    first_seed: int
    total: Found = field(default_factory=Found.nothing)
    failed: int = 0

    @property
    def is_over(self) -> bool:
        return self.total.cases >= self.cases or time.monotonic() >= self.ends_at_s

    def lane(self, number: int) -> None:
        """Rounds until there are enough, each with a seed that no lane has had."""
        with recording_server(Path(tempfile.gettempdir())) as server:
            for seed in count(self.first_seed + number, LANES):
                if self.is_over:
                    return
                left_s = max(10, min(ROUND_S, int(self.ends_at_s - time.monotonic())))
                self.heed(contract_run(server, "--max-time", str(left_s), seed=seed), seed)

    def heed(self, found: Found, seed: int) -> None:
        self.total.tally.add(found.tally)
        print(f"seed {seed}: {found.cases:,} cases, {self.total.cases:,} in all", flush=True)
        if not found.is_clean:
            self.failed += 1
            if self.failed <= REPORTS_MAX:
                print(found.report, flush=True)


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--cases", type=int, default=100_000)
    asked.add_argument("--minutes", type=float, default=60)
    asked.add_argument("--seed", type=int, default=1)
    options = asked.parse_args()
    began_s = time.monotonic()
    campaign = Campaign(
        cases=options.cases,
        ends_at_s=began_s + options.minutes * 60,
        first_seed=options.seed,
    )
    with ThreadPoolExecutor(LANES) as lanes:
        for done in [lanes.submit(campaign.lane, number) for number in range(LANES)]:
            done.result()
    print(campaign.total.tally.summary(OPERATIONS))
    print(f"not asked: {', '.join('GET ' + path for path in ENDLESS)} (a stream without an end)")
    minutes = (time.monotonic() - began_s) / 60
    what = "nothing found" if not campaign.failed else f"{campaign.failed} rounds found something"
    print(f"{campaign.total.cases:,} cases in {minutes:.1f} min: {what}")
    return 1 if campaign.failed else 0


if __name__ == "__main__":
    sys.exit(main())
