"""Writes docs/states.md from the transition table of `rdev/domain/commands.py`.

Run by `make docs-states`; tests/test_states.py fails when the page is not the table's.
"""

from collections.abc import Iterator
from pathlib import Path

from rdev.domain.commands import TRANSITIONS, Status

PAGE = Path(__file__).with_name("states.md")

INTRODUCTION = """\
# The states of a command

Generated from `TRANSITIONS` in `rdev/domain/commands.py` by `make docs-states`; change the table,
not this page. A status without an arrow out of it is terminal and never changes.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_diagram(), "", *_table(), ""])


def _diagram() -> Iterator[str]:
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {Status.QUEUED}: accepted"
    for before, followers in TRANSITIONS.items():
        for after, why in followers.items():
            yield f"    {before} --> {after}: {why}"
    for status in TRANSITIONS:
        if status.is_terminal:
            yield f"    {status} --> [*]"
    yield "```"


def _table() -> Iterator[str]:
    yield "| from | to | when |"
    yield "|---|---|---|"
    for before, followers in TRANSITIONS.items():
        for after, why in followers.items():
            yield f"| `{before}` | `{after}` | {why} |"


if __name__ == "__main__":
    PAGE.write_text(page())
