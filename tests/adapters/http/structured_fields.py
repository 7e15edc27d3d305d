"""A strict parser of structured fields: lists of items with parameters (RFC 9651, section 4.2).

Only the types that the limits use: integers, strings, tokens and booleans. What the grammar does
not allow is an error, so a field that passes here passes in any parser.
"""

import re

Bare = int | str | bool
Item = tuple[Bare, dict[str, Bare]]

_INTEGER = re.compile(r"-?[0-9]{1,15}(?![0-9.])")
_STRING = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*")
_BOOLEAN = re.compile(r"\?([01])")
_KEY = re.compile(r"[a-z*][a-z0-9_\-.*]*")


class FieldError(ValueError):
    """The field is not what its grammar says."""


def parse_list(text: str) -> list[Item]:
    """The members of a list. Errors: FieldError."""
    text = text.strip(" ")
    members: list[Item] = []
    at = 0
    while at < len(text):
        item, at = _item(text, at)
        members.append(item)
        at = _skip(text, at, " \t")
        if at == len(text):
            return members
        if text[at] != ",":
            raise FieldError(f"no comma at {at}: {text!r}")
        at = _skip(text, at + 1, " \t")
        if at == len(text):
            raise FieldError(f"a comma at the end: {text!r}")
    return members


def _item(text: str, at: int) -> tuple[Item, int]:
    value, at = _bare(text, at)
    parameters: dict[str, Bare] = {}
    while at < len(text) and text[at] == ";":
        at = _skip(text, at + 1, " ")
        key = _KEY.match(text, at)
        if key is None:
            raise FieldError(f"no key at {at}: {text!r}")
        at = key.end()
        parameters[key[0]] = True
        if at < len(text) and text[at] == "=":
            parameters[key[0]], at = _bare(text, at + 1)
    return (value, parameters), at


def _bare(text: str, at: int) -> tuple[Bare, int]:
    if found := _INTEGER.match(text, at):
        return int(found[0]), found.end()
    if found := _STRING.match(text, at):
        return re.sub(r"\\(.)", r"\1", found[1]), found.end()
    if found := _BOOLEAN.match(text, at):
        return found[1] == "1", found.end()
    if found := _TOKEN.match(text, at):
        return found[0], found.end()
    raise FieldError(f"no item at {at}: {text!r}")


def _skip(text: str, at: int, spaces: str) -> int:
    while at < len(text) and text[at] in spaces:
        at += 1
    return at
