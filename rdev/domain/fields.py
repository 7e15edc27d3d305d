"""Reading a JSON object field by field: every fault is kept, with its pointer, and told together.

A reader never raises while reading; `finish` refuses unknown fields and raises all faults at once.
Limits of text are bytes of UTF-8, the unit in which the project's kernel counts.
"""

import re
from collections.abc import Collection, Mapping

from rdev.domain.errors import Fault, bad_request

Json = Mapping[str, object]


class Fields:
    """One JSON object being read. `read` of an absent or wrong field gives the default, and the
    fault is remembered."""

    def __init__(self, body: Json, *, pointer: str = "") -> None:
        """`pointer` is the JSON pointer of the object itself, "" for the body."""
        self._body = body
        self._pointer = pointer
        self._known: set[str] = set()
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
        nul: bool = False,
    ) -> str | None:
        """A string of 1–`max_bytes` bytes (an optional one may be absent or null)."""
        value = self._take(name, required=required)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(name, "must be a string")
        elif not value:
            self.fault(name, "must not be empty")
        elif (message := size_fault(value, max_bytes=max_bytes)) is not None:
            self.fault(name, message, limit=True)
        elif (message := text_fault(value, nul=nul)) is not None:
            self.fault(name, message)
        elif pattern is not None and not pattern.fullmatch(value):
            self.fault(name, f"must match {pattern.pattern}")
        else:
            return value
        return None

    def integer(self, name: str, *, least: int, most: int) -> int | None:
        """A whole number in [`least`, `most`]; absent or null gives None."""
        value = self._take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            self.fault(name, "must be a whole number")
        elif not least <= value <= most:
            self.fault(name, f"must be from {least} to {most}")
        else:
            return value
        return None

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """One of a closed list of strings; absent or null gives None."""
        value = self._take(name)
        if value is None:
            return None
        if isinstance(value, str) and value in choices:
            return value
        self.fault(name, f"must be one of {', '.join(choices)}")
        return None

    def texts(
        self, name: str, *, max_items: int, max_bytes: int, required: bool = False
    ) -> tuple[str, ...] | None:
        """A list of strings, each ≤ `max_bytes`; an item may be empty."""
        value = self._take(name, required=required)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fault(name, "must be a list of strings")
            return None
        if len(value) > max_items:
            self.fault(name, f"must have at most {max_items} items", limit=True)
            return None
        faults = len(self.faults)
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self.fault(name, "must be a string", within=str(index))
            elif (message := size_fault(item, max_bytes=max_bytes)) is not None:
                self.fault(name, message, within=str(index), limit=True)
            elif (message := text_fault(item)) is not None:
                self.fault(name, message, within=str(index))
        return tuple(value) if len(self.faults) == faults else None

    def mapping(self, name: str) -> Json | None:
        """A JSON object as it is; absent or null gives None."""
        value = self._take(name)
        if value is None:
            return None
        if isinstance(value, dict):
            return value
        self.fault(name, "must be an object")
        return None

    def ignore(self, name: str) -> None:
        """The field is known, and somebody else judges it."""
        self._known.add(name)

    def finish(self) -> None:
        """Refuse unknown fields and raise everything that was wrong. Errors: BAD_REQUEST."""
        for name in self._body:
            if name not in self._known:
                self.fault(name, "is not a known field")
        if self.faults:
            raise bad_request(self.faults)

    def _take(self, name: str, *, required: bool = False) -> object | None:
        self._known.add(name)
        value = self._body.get(name)
        if value is None and required:
            self.fault(name, "is required")
        return value


def size_fault(value: str, *, max_bytes: int) -> str | None:
    """Why a text is too long in UTF-8, or None. A lone surrogate counts as the 3 bytes it is."""
    size_bytes = len(value.encode(errors="surrogatepass"))
    if size_bytes > max_bytes:
        return f"must be at most {max_bytes} bytes (it has {size_bytes})"
    return None


def text_fault(value: str, *, nul: bool = False) -> str | None:
    """Why a text cannot be used whatever its size (NUL, lone surrogate), or None."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must be valid Unicode (it has a lone surrogate)"
    if not nul and "\0" in value:
        return "must not contain NUL"
    return None
