"""docs/states.md is what the transition table says."""

import importlib.util
from pathlib import Path

from rdev.domain.commands import TRANSITIONS, Status

SCRIPT = Path(__file__).parent.parent / "docs" / "generate_states.py"


def test_the_page_is_the_one_the_table_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate_states", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    assert script.PAGE.read_text() == script.page(), "run `make docs-states`"


def test_every_status_has_a_row_and_can_be_reached() -> None:
    reached = {Status.QUEUED} | {after for row in TRANSITIONS.values() for after in row}

    assert set(TRANSITIONS) == set(Status) == reached
