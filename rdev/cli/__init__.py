"""The `rdev` command line: exit codes, and the only place that prints."""


def main() -> None:
    """Replaced by the command group."""
    raise SystemExit(2)
