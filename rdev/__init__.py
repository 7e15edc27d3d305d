"""rdev: run coding agents, shell and git in per-project pods, and watch every line live."""

__version__ = "0.1.0"
