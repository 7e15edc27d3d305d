"""`python -m bench [scenario…]`: measure all or the named scenarios, print and keep the tables.

Exit status: 0 when everything was measured, whether or not the targets are met; 2 for a name that
is no scenario.
"""

import argparse
import importlib
import pkgutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import bench
from bench.harness import Context, Measurement, Row, Scenario, run, table, write

RESULTS = Path(__file__).parent / "results"
PARTS = frozenset(
    {
        "__main__", "client", "fanout_server", "harness", "line_writer", "lines_server",
        "otlp_sink", "peers", "server", "silent_server", "sse_load",
    }
)  # fmt: skip


def scenario_names() -> list[str]:
    """The modules of `bench/` that are not parts of the harness."""
    return sorted({module.name for module in pkgutil.iter_modules(bench.__path__)} - PARTS)


def load(name: str) -> Scenario | None:
    """The module's `SCENARIO`, None where it has none."""
    scenario = getattr(importlib.import_module(f"bench.{name}"), "SCENARIO", None)
    if scenario is not None and not isinstance(scenario, Scenario):
        raise TypeError(f"bench/{name}.py: SCENARIO is no Scenario")
    return scenario


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure rdev.")
    parser.add_argument("scenario", nargs="*", help="all where none is named")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--long", action="store_true", help="hold what a target holds for a minute")
    parser.add_argument("--list", action="store_true", help="name the scenarios and stop")
    given = parser.parse_args(argv)
    known = scenario_names()
    if unknown := [name for name in given.scenario if name not in known]:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(known)}")
    scenarios = [found for name in given.scenario or known if (found := load(name)) is not None]
    if given.list:
        print("\n".join(f"{scenario.name:24}{scenario.what}" for scenario in scenarios))
        return 0
    context = Context(repetitions=given.repetitions, warm_ups=given.warm_ups, long=given.long)
    _measure(scenarios, context)
    return 0


def _measure(scenarios: list[Scenario], context: Context) -> None:
    results: dict[str, tuple[Scenario, list[Row], Measurement]] = {}
    for scenario in scenarios:
        rows, measurement = run(scenario, context)
        results[scenario.name] = (scenario, rows, measurement)
        print(table(scenario, rows), flush=True)
    stem = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    print(f"kept in {write(RESULTS, stem, results)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
