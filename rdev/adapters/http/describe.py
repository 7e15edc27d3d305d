"""How a route is described: what it takes and answers, in a table next to where it is declared.

Each file of routes has a `DESCRIBED`; `openapi.py` makes the document of them, and a test fails for
a route without a description and for a description without a route. What a body may hold is asked
of its parser, never said again.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from rdev.adapters.http.access import Route
from rdev.domain.errors import ErrorCode
from rdev.domain.rules import CONTROLS, Json

Schema = Mapping[str, object]

JSON: Final = "application/json"

# In characters.
WORD_MAX = 200
# The days around a moment must be moments too.
YEAR_MIN, YEAR_MAX = 1970, 9_998
MOMENT: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A query parameter (or, `where` says so, a header) and its bounds. `schema` is that of its
    text read as JSON; `code` is what a wrong one is answered with."""

    name: str
    about: str
    schema: Schema
    required: bool = False
    where: str = "query"
    code: ErrorCode = ErrorCode.BAD_REQUEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What comes with a status that is no failure. `schema` None: no body.

    `is_enveloped`: the schema is that of `data`, `meta` stands around it; `is_page`: of one item of
    it. `events` are the schemas of a stream's events by name.
    """

    about: str
    schema: Schema | None = None
    content_type: str = JSON
    is_enveloped: bool = True
    is_page: bool = False
    headers: tuple[str, ...] = ()
    events: Mapping[str, Schema] = field(default_factory=dict)
    # Further content types of the same answer.
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One route as clients see it.

    `errors` are the codes beyond those that every route may answer with. `example` is a body.
    """

    summary: str
    tag: str
    answers: Mapping[int, Answer]
    about: str = ""
    body: Callable[[Json], object] | None = None
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[ErrorCode, ...] = ()
    is_idempotent: bool = False
    example: Schema | None = None


Described = Mapping[Route, Description]


def whole(name: str, about: str, *, least: int, most: int) -> Parameter:
    """A parameter that is a whole number."""
    schema = {"type": "integer", "minimum": least, "maximum": most}
    return Parameter(name=name, about=about, schema=schema)


def number(name: str, about: str, *, least: float, most: float) -> Parameter:
    """A parameter that is a number."""
    schema = {"type": "number", "minimum": least, "maximum": most}
    return Parameter(name=name, about=about, schema=schema)


def matching(name: str, about: str, pattern: re.Pattern[str]) -> Parameter:
    """A parameter that is a text of a form."""
    schema = {"type": "string", "pattern": f"^(?:{pattern.pattern})$"}
    return Parameter(name=name, about=about, schema=schema)


def word(name: str, about: str) -> Parameter:
    """A parameter that something stored is held against: a line (see rules.py)."""
    schema = {"type": "string", "maxLength": WORD_MAX, "pattern": f"^[^{CONTROLS}]*$"}
    return Parameter(name=name, about=about, schema=schema)


def moment(name: str, about: str) -> Parameter:
    """A parameter that is a moment with its zone."""
    about = f"{about} (RFC 3339, with its zone, {YEAR_MIN}–{YEAR_MAX})"
    return matching(name, about, MOMENT)
