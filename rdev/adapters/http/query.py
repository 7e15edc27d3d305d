"""Reading query parameters; a wrong one is BAD_REQUEST and names the parameter."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from quart import request

from rdev.adapters.http.describe import (
    MOMENT,
    WORD_MAX,
    YEAR_MAX,
    YEAR_MIN,
    Parameter,
    whole,
)
from rdev.domain.errors import Fault, bad_request
from rdev.domain.rules import Characters, text_fault

LIMIT_DEFAULT = 50
LIMIT_MAX = 200
# More than any limit has.
_DIGITS_MAX = 20
# Narrower than `float`, which also takes "1_0", "nan" and digits of other scripts.
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")

LIMIT = whole("limit", f"items of a page; {LIMIT_DEFAULT} by default", least=1, most=LIMIT_MAX)
CURSOR = Parameter(
    name="cursor",
    about="`meta.next_cursor` of an earlier page; absent: the first",
    schema={"type": "string", "minLength": 1},
)
PAGE = (LIMIT, CURSOR)

Choice = TypeVar("Choice", bound=StrEnum)


def text_of(name: str) -> str | None:
    """The parameter, or None where it is absent or empty."""
    return request.args.get(name) or None


def number_of(name: str, *, least: float, most: float) -> float | None:
    """A number in [`least`, `most`], or None where it is absent."""
    text = text_of(name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or not least <= float(text) <= most:
        raise _wrong(name, f"must be a number from {least:g} to {most:g}")
    return float(text)


def whole_of(name: str, *, least: int, most: int) -> int | None:
    """A whole number in [`least`, `most`], or None where it is absent."""
    text = text_of(name)
    if text is None:
        return None
    # Its length first: `int` refuses thousands of digits with an error of its own.
    is_whole = text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX
    if not is_whole or not least <= int(text) <= most:
        raise _wrong(name, f"must be a whole number from {least} to {most}")
    return int(text)


def word_of(name: str) -> str | None:
    """A text that something stored is held against, or None where it is absent."""
    text = text_of(name)
    if text is None:
        return None
    if len(text) > WORD_MAX:
        raise _wrong(name, f"must have at most {WORD_MAX} characters")
    if (message := text_fault(text, Characters.LINE)) is not None:
        raise _wrong(name, message)
    return text


def moment_of(name: str) -> datetime | None:
    """A moment as RFC 3339 writes it, with its zone; None where it is absent."""
    text = text_of(name)
    if text is None:
        return None
    # A `+` that the client did not encode has become a space.
    text = text.replace(" ", "+")
    try:
        found = datetime.fromisoformat(text) if MOMENT.fullmatch(text) else None
        in_utc = None if found is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        in_utc = None
    if in_utc is None or not YEAR_MIN <= in_utc.year <= YEAR_MAX:
        raise _wrong(name, "must be a moment with its zone, as in 2026-11-22T18:00:00Z")
    return in_utc


def limit_of() -> int:
    """`?limit=` of a list."""
    return whole_of("limit", least=1, most=LIMIT_MAX) or LIMIT_DEFAULT


def cursor_of(is_sane: Callable[[str], bool]) -> str | None:
    """`?cursor=` of a list: an id that an earlier page gave, or None on the first page."""
    text = text_of("cursor")
    if text is not None and not is_sane(text):
        raise _wrong("cursor", "must be the next_cursor of an earlier page")
    return text


def choice_of(name: str, choices: type[Choice]) -> Choice | None:
    """One value of an enumeration, or None where it is absent."""
    text = text_of(name)
    if text is None:
        return None
    if text not in {*choices}:
        raise _wrong(name, f"must be one of {', '.join(choices)}")
    return choices(text)


def _wrong(name: str, message: str) -> Exception:
    return bad_request([Fault(pointer="", message=f"the parameter {name} {message}")])
