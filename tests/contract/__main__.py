"""`make test-contract`: 100,000 invented requests, or as many as fit in the minutes given.

Runs with one seed after the other; ends at the first that finds something, with its report.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.contract.run import contract_run, recording_server

ROUND_S = 300


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--cases", type=int, default=100_000)
    asked.add_argument("--minutes", type=float, default=60)
    asked.add_argument("--seed", type=int, default=1)
    options = asked.parse_args()
    ends_at = time.monotonic() + options.minutes * 60
    began, cases, seed = time.monotonic(), 0, options.seed
    with recording_server(Path(tempfile.gettempdir())) as server:
        while cases < options.cases and time.monotonic() < ends_at:
            left_s = max(10, min(ROUND_S, int(ends_at - time.monotonic())))
            found = contract_run(server, "--max-time", str(left_s), seed=seed)
            cases += found.cases
            print(f"seed {seed}: {found.cases:,} cases, {cases:,} in all", flush=True)
            if not found.is_clean:
                print(found.report)
                return 1
            seed += 1
    print(f"{cases:,} cases in {(time.monotonic() - began) / 60:.1f} min: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
