"""What an audit entry keeps of a command line."""

from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.audit import shortened


def test_what_is_short_stays_as_it_is() -> None:
    assert shortened(["git", "status"], 100) == ["git", "status"]
    assert shortened([], 0) == []


def test_what_is_cut_says_so_and_what_is_missing_too() -> None:
    assert shortened(["sh", "-c", "echo hello"], 8) == ["sh", "-c", "echo…"]
    assert shortened(["abc", "def", "g"], 3) == ["abc", "…"]


def test_no_character_is_cut_in_two() -> None:
    assert shortened(["äöü"], 5) == ["äö…"]
    assert shortened(["\ud800x"], 5) == ["\ud800x"]


@given(st.lists(st.text()), st.integers(min_value=0, max_value=50))
def test_no_more_than_was_asked_for_is_kept(argv: list[str], most_bytes: int) -> None:
    kept = shortened(argv, most_bytes)
    size_bytes = sum(len(one.encode("utf-8", "replace")) for one in kept)
    assert size_bytes <= most_bytes + len("…".encode())
    assert kept == argv or kept[-1].endswith("…")
