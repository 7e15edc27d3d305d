"""What a check of an installation found, in words that help."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How it stands: `fail` is what rdev does not work with, `warn` what will trouble somebody."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`seen`: what was looked at and found; `advice`: what to do, for all but `ok`. No secrets."""

    level: Level
    seen: str
    advice: str = ""


def ok(seen: str) -> Finding:
    """It is as it should be."""
    return Finding(level=Level.OK, seen=seen)


def warn(seen: str, advice: str) -> Finding:
    """It works, and will trouble somebody."""
    return Finding(level=Level.WARN, seen=seen, advice=advice)


def fail(seen: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(level=Level.FAIL, seen=seen, advice=advice)


def skipped(seen: str) -> Finding:
    """There was nothing to look at, and why."""
    return Finding(level=Level.SKIPPED, seen=seen)


def within(
    value: float, *, warn_over: float, fail_over: float | None, seen: str, advice: str
) -> Finding:
    """By a bound or two that a quantity should not pass."""
    if fail_over is not None and value > fail_over:
        return fail(seen, advice)
    return warn(seen, advice) if value > warn_over else ok(seen)
