"""docs/api/limits.md is what the parsers say."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "docs" / "generate_limits.py"


def test_the_page_is_the_one_the_code_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate_limits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    assert script.PAGE.read_text() == script.page(), "run `make docs-limits`"
