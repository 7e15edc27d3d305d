"""The strategies of `limits` on given arrivals. Run by its own interpreter: see `installed.py`.

Reads `{"requests", "window_s", "arrivals_s"}` from stdin; prints the times that each strategy
admitted. The library reads the clock itself, so its `time` is replaced.
"""

import json
import sys
import time
from importlib.metadata import version
from types import ModuleType

import limits.storage.base
import limits.storage.memory
import limits.strategies
from limits import parse, storage

STRATEGIES = {
    "fixed": limits.strategies.FixedWindowRateLimiter,
    "sliding_counter": limits.strategies.SlidingWindowCounterRateLimiter,
    "moving": limits.strategies.MovingWindowRateLimiter,
}
# A whole number of windows of any length up to a day.
BASE_S = 1_767_225_600.0


class Clock(ModuleType):
    """The `time` that the library sees."""

    now_s = BASE_S

    def time(self) -> float:
        return self.now_s

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def main() -> None:
    work = json.load(sys.stdin)
    clock = Clock("time")
    for module in (limits.storage.memory, limits.storage.base, limits.strategies):
        if hasattr(module, "time"):
            module.time = clock
    item = parse(f"{work['requests']} per {work['window_s']} second")
    admitted = {}
    for name, strategy in STRATEGIES.items():
        clock.now_s = BASE_S
        limiter = strategy(storage.MemoryStorage())
        admitted[name] = []
        for at_s in work["arrivals_s"]:
            clock.now_s = BASE_S + at_s
            if limiter.hit(item, "key"):
                admitted[name].append(at_s)
    print(json.dumps({"version": version("limits"), "admitted_s": admitted}))


main()
