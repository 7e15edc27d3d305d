"""Reading a JSON object field by field: every fault is kept, with its pointer, and told together.

A reader never raises while reading; `finish` refuses unknown fields and raises all faults at once.
Limits of text are bytes of UTF-8, the unit in which the project's kernel counts. Each field is
judged by a rule (rules.py), the one that the documents show.
"""

import re
from collections.abc import Collection

from rdev.domain.errors import Fault, bad_request
from rdev.domain.rules import (
    Characters,
    Json,
    Probe,
    Rule,
    RuleKind,
    size_fault,
    text_fault,
)

__all__ = ["Characters", "Fields", "Json", "size_fault", "text_fault"]


class Fields:
    """One JSON object being read. `read` of an absent or wrong field gives the default, and the
    fault is remembered."""

    def __init__(self, body: Json, *, pointer: str = "") -> None:
        """`pointer` is the JSON pointer of the object itself, "" for the body."""
        self._body = body
        self._pointer = pointer
        self._known: set[str] = set()
        self._inner: list[Fields] = []
        self.faults: list[Fault] = []

    def fault(
        self, name: str, message: str, *, within: str | None = None, limit: bool = False
    ) -> None:
        """Remember that the field `name` (or the member `within` it) is wrong; with `limit`
        because it is too large."""
        parts = [name] if within is None else [name, within]
        path = "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
        found = Fault(pointer=self._pointer + path, message=message, limit=name if limit else None)
        self.faults.append(found)

    def text(
        self,
        name: str,
        *,
        max_bytes: int,
        required: bool = False,
        pattern: re.Pattern[str] | None = None,
        characters: Characters = Characters.LINE,
        about: str = "",
    ) -> str | None:
        """A string of 1–`max_bytes` bytes (an optional one may be absent or null), one line where
        `characters` says nothing else."""
        rule = Rule(
            name=name,
            kind=RuleKind.TEXT,
            required=required,
            max_bytes=max_bytes,
            pattern=pattern,
            characters=characters,
            about=about,
        )
        value = self._take(rule)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(name, "must be a string")
        elif not value:
            self.fault(name, "must not be empty")
        elif (wrong := rule.text_message(value)) is not None:
            self.fault(name, wrong[0], limit=wrong[1])
        else:
            return value
        return None

    def integer(
        self, name: str, *, least: int, most: int, required: bool = False, about: str = ""
    ) -> int | None:
        """A whole number in [`least`, `most`]; absent or null gives None."""
        kind = RuleKind.WHOLE
        rule = Rule(name=name, kind=kind, required=required, least=least, most=most, about=about)
        value = self._take(rule)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON knows no difference between 1 and 1.0
        if not isinstance(value, int) or isinstance(value, bool):
            self.fault(name, "must be a whole number")
        elif not least <= value <= most:
            self.fault(name, f"must be from {least} to {most}")
        else:
            return value
        return None

    def flag(self, name: str, *, about: str = "") -> bool | None:
        """True or false; absent or null gives None."""
        value = self._take(Rule(name=name, kind=RuleKind.FLAG, about=about))
        if value is None or isinstance(value, bool):
            return value
        self.fault(name, "must be true or false")
        return None

    def choice(self, name: str, choices: Collection[str], *, about: str = "") -> str | None:
        """One of a closed list of strings; absent or null gives None."""
        value = self._take(Rule(name=name, kind=RuleKind.TEXT, choices=choices, about=about))
        if value is None:
            return None
        if isinstance(value, str) and value in choices:
            return value
        self.fault(name, f"must be one of {', '.join(choices)}")
        return None

    def texts(
        self,
        name: str,
        *,
        max_items: int,
        max_bytes: int,
        min_items: int = 0,
        required: bool = False,
        pattern: re.Pattern[str] | None = None,
        choices: Collection[str] = (),
        characters: Characters = Characters.LINE,
        mismatch: str = "",
        about: str = "",
    ) -> tuple[str, ...] | None:
        """A list of strings, each ≤ `max_bytes`; an item may be empty."""
        rule = Rule(
            name=name,
            kind=RuleKind.TEXTS,
            required=required,
            max_bytes=max_bytes,
            min_items=min_items,
            max_items=max_items,
            pattern=pattern,
            choices=choices,
            characters=characters,
            mismatch=mismatch,
            about=about,
        )
        value = self._take(rule)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fault(name, "must be a list of strings")
            return None
        if len(value) < min_items:
            self.fault(name, f"must have at least {min_items} item{'s' * (min_items > 1)}")
            return None
        if len(value) > max_items:
            self.fault(name, f"must have at most {max_items} items", limit=True)
            return None
        return self._items(rule, value)

    def mapping(self, name: str, *, about: str = "") -> Json | None:
        """A JSON object as it is, for code that judges it; absent or null gives None."""
        return self._mapping(Rule(name=name, kind=RuleKind.OBJECT, about=about))

    def entries(
        self,
        name: str,
        *,
        max_items: int,
        max_bytes: int,
        pattern: re.Pattern[str],
        about: str = "",
    ) -> Json | None:
        """An object whose entries the caller judges by the same numbers and pattern: how many, the
        bytes of one, the names. Absent or null gives None; too many are a fault."""
        rule = Rule(
            name=name,
            kind=RuleKind.ENTRIES,
            max_items=max_items,
            max_bytes=max_bytes,
            pattern=pattern,
            about=about,
        )
        found = self._mapping(rule)
        if found is not None and len(found) > max_items:
            self.fault(name, f"must have at most {max_items} entries", limit=True)
            return None
        return found

    def _mapping(self, rule: Rule) -> Json | None:
        name, value = rule.name, self._take(rule)
        if value is None or isinstance(value, dict):
            return value
        self.fault(name, "must be an object")
        return None

    def inner(self, name: str, *, about: str = "") -> "Fields | None":
        """The reader of an object in this one, whose faults and unknown fields `finish` tells
        too; absent or null gives None."""
        probe = Probe()
        kind = RuleKind.OBJECT
        value = self._take(Rule(name=name, kind=kind, about=about, fields=probe.rules))
        if isinstance(self._body, Probe):
            value = probe
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fault(name, "must be an object")
            return None
        found = Fields(value, pointer=f"{self._pointer}/{name}")
        self._inner.append(found)
        return found

    def other(
        self,
        name: str,
        *,
        about: str,
        choices: Collection[str] = (),
        least: int | None = None,
        most: int | None = None,
    ) -> object | None:
        """The value as it is: the caller judges it, by the choices and bounds if there are any,
        and `about` says how."""
        kind = RuleKind.OTHER
        rule = Rule(name=name, kind=kind, about=about, choices=choices, least=least, most=most)
        return self._take(rule)

    def nothing(self, name: str, *, why: str) -> None:
        """A field that is known and cannot be used: `why` is told for any value but null."""
        if self._take(Rule(name=name, kind=RuleKind.NOTHING, about=why)) is not None:
            self.fault(name, why)

    def ignore(self, name: str) -> None:
        """The field is known, and somebody else judges it."""
        self._known.add(name)

    def finish(self) -> None:
        """Refuse unknown fields and raise everything that was wrong. Errors: BAD_REQUEST."""
        self._close()
        if self.faults:
            raise bad_request(self.faults)

    def _close(self) -> None:
        """Every fault there is, those of the objects within included."""
        for inner in self._inner:
            inner._close()
            self.faults += inner.faults
        for name in self._body:
            if name not in self._known:
                self.fault(name, "is not a known field")

    def _take(self, rule: Rule) -> object | None:
        self._known.add(rule.name)
        if isinstance(self._body, Probe):
            self._body.rules.append(rule)
        value = self._body.get(rule.name)
        if value is None and rule.required:
            self.fault(rule.name, "is required")
        return value

    def _items(self, rule: Rule, items: list[object]) -> tuple[str, ...] | None:
        """The items of a list, or None where one of them is wrong."""
        good = []
        for index, item in enumerate(items):
            if not isinstance(item, str):
                self.fault(rule.name, "must be a string", within=str(index))
            elif (wrong := rule.text_message(item)) is not None:
                self.fault(rule.name, wrong[0], within=str(index), limit=wrong[1])
            else:
                good.append(item)
        return tuple(good) if len(good) == len(items) else None
