"""The interpreter of a server's process: what it does beside the server's work, and when.

Nearly everything a server makes dies by its reference count; looking for cycles among the young
every 700 allocations (the default) took a tenth of the queue's time. Bounded by `YOUNG_MAX`: so
many container objects are looked at in one step, in about a millisecond.

A thread that computes keeps the event loop waiting for `SWITCH_S` each time that the loop comes
back from the kernel. With the default of 5 ms a scrape of 5,000 series held it for 30 ms.
"""

import gc
import sys

YOUNG_MAX = 10_000
SWITCH_S = 0.0005


def give_way() -> None:
    """Let the event loop go before a thread that computes."""
    sys.setswitchinterval(SWITCH_S)


def calm() -> None:
    """Look at the young less often, and never again at what the start made. Call it once, when the
    process is ready to serve."""
    _, second, third = gc.get_threshold()
    gc.set_threshold(YOUNG_MAX, second, third)
    gc.collect()
    gc.freeze()
