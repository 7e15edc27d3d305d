"""`rdev serve` that counts nothing: what the cost of counting is held against."""

import rdev.app
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.cli import main
from rdev.ports.telemetry import Silence


class Uncounted(Silence, PrometheusTelemetry):
    """Every verb is nothing; `/metrics` shows families without values."""


if __name__ == "__main__":
    vars(rdev.app)["PrometheusTelemetry"] = Uncounted
    main()
