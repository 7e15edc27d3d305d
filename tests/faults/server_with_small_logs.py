"""`rdev serve` that keeps little and waits short; the product has no settings for these.

The ordinary composition root with smaller numbers: what takes 64 MiB of output, thirty seconds of
a silent client or a night comes within seconds.
"""

import sys
from functools import partial

import rdev.adapters.http.server
from rdev.adapters.http.server import ConnectionTimes
from rdev.cli import main
from rdev.services import appender, housekeeper

# A client that takes nothing for so long is cut.
STALL_S = 1.5

if __name__ == "__main__":
    appender.HEAD_BYTES = appender.TAIL_BYTES = 262_144
    appender.TRIM_STRIDE_BYTES = 65_536
    housekeeper.INTERVAL_S = 1.0
    rdev.adapters.http.server.ConnectionTimes = partial(ConnectionTimes, write_s=STALL_S)  # type: ignore[misc,assignment]
    sys.argv[0] = "rdev"
    main()
