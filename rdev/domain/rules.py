"""What a field of a request may hold: the rule that judges it and that documents are made from.

A reader (`Fields`) makes a rule for each field it reads and judges by it. Given a `Probe` in place
of a body it also notes the rule, so that docs/api/limits.md and the OpenAPI document say what the
code checks: there is no second list.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from rdev.domain.errors import RdevError

Json = Mapping[str, object]


class RuleKind(StrEnum):
    """What JSON a field takes."""

    TEXT = "string"
    WHOLE = "whole number"
    FLAG = "boolean"
    TEXTS = "list of strings"
    OBJECT = "object"
    # An object of strings; pattern and sizes speak of the names and of `name=value`.
    ENTRIES = "object of strings"
    # It may be absent or null, and nothing else.
    NOTHING = "null"
    # One of the choices or a whole number; or judged by its own code, as `about` says.
    OTHER = "other"


class Characters(StrEnum):
    """Which characters a text may have. None may have a lone surrogate, which is no character."""

    # What people read in lists, logs and terminals: no control character (see `CONTROLS`).
    LINE = "one line"
    # What programs read: arguments, paths, variables. Linux has no NUL in any of them.
    NO_NUL = "no NUL"
    ANY = "any"


# The control characters that a line has none of, as they stand within the brackets of a pattern:
# C0, DEL and C1 (Unicode category Cc: they move a terminal's cursor or end its line), the two
# separators of lines, and the property Bidi_Control, which shows a text in another order than it
# has (CVE-2021-42574). ECMA 262 reads it the same way.
CONTROLS = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{CONTROLS}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one field may hold. Sizes are bytes of UTF-8; a bound that is None does not exist.

    `pattern`, `choices`, `max_bytes` and `characters` speak of each item where it is a list;
    `about` says what the other members cannot. `fields` are those of an object.
    """

    name: str
    kind: RuleKind
    required: bool = False
    least: int | None = None
    most: int | None = None
    max_bytes: int | None = None
    min_items: int | None = None
    max_items: int | None = None
    pattern: re.Pattern[str] | None = None
    choices: Collection[str] = ()
    characters: Characters = Characters.LINE
    about: str = ""
    # Why a text that does not match is refused, where the pattern itself would not tell.
    mismatch: str = ""
    fields: Sequence["Rule"] = ()

    def text_message(self, value: str) -> tuple[str, bool] | None:
        """What is wrong with a text and whether it is its size; None for a good one."""
        if (message := self._size_message(value)) is not None:
            return message, True
        if (message := text_fault(value, self.characters)) is not None:
            return message, False
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}", False
        if self.pattern is not None and not self.pattern.fullmatch(value):
            return self.mismatch or f"must match {self.pattern.pattern}", False
        return None

    def _size_message(self, value: str) -> str | None:
        return None if self.max_bytes is None else size_fault(value, max_bytes=self.max_bytes)


class Probe(dict[str, object]):
    """An empty body that notes the rules it is read by."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        super().__init__()
        self.rules: list[Rule] = []


@dataclass(frozen=True, slots=True)
class BodyRules:
    """The rules of one kind of body, in the order they are read."""

    rules: Sequence[Rule] = field(default_factory=tuple)

    @property
    def is_required(self) -> bool:
        """Whether a body must come at all."""
        return any(rule.required for rule in self.rules)


def rules_of(parse: Callable[[Json], object]) -> BodyRules:
    """The rules a parser reads a body by. It must read all fields whatever the first ones say."""
    probe = Probe()
    try:
        parse(probe)
    except RdevError:  # the empty body lacks what is required
        pass
    return BodyRules(tuple(probe.rules))


def size_fault(value: str, *, max_bytes: int) -> str | None:
    """Why a text is too long in UTF-8, or None. A lone surrogate counts as the 3 bytes it is."""
    size_bytes = len(value.encode(errors="surrogatepass"))
    if size_bytes > max_bytes:
        return f"must be at most {max_bytes} bytes (it has {size_bytes})"
    return None


def text_fault(value: str, characters: Characters) -> str | None:
    """Why a text cannot be used whatever its size (control characters, lone surrogate), or None."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must be valid Unicode (it has a lone surrogate)"
    match characters:
        case Characters.LINE if (found := _CONTROL.search(value)) is not None:
            return f"must not contain control characters (it has U+{ord(found[0]):04X})"
        case Characters.NO_NUL if "\0" in value:
            return "must not contain NUL"
        case _:
            return None
