"""Writes docs/api/limits.md from the parsers of the request bodies and the routes' parameters.

Run by `make docs-limits`; tests/test_limits_page.py fails when the page is not the code's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rdev.adapters.http.describe import Description, Parameter, Schema
from rdev.adapters.http.openapi import DESCRIBED
from rdev.domain.rules import Characters, Rule, RuleKind, rules_of

PAGE = Path(__file__).parent / "api" / "limits.md"

INTRODUCTION = """\
# Limits of requests

Generated from the code that judges them by `make docs-limits`; change the code, not this page.

A body is JSON in UTF-8, at most 1 MiB (`PAYLOAD_TOO_LARGE`, 413), declared as `application/json`
(`UNSUPPORTED_MEDIA_TYPE`, 415), an object without unknown fields and without a name that stands
twice. Whatever is wrong with its fields is `BAD_REQUEST`, 400, all of it together, each fault with
the JSON pointer (RFC 6901) of what it is about. Sizes are bytes of UTF-8. An optional field may be
absent or null.

A text has no control character: none of C0, DEL and C1 (so it is one line), no line separator and
none that turns the direction of writing (U+061C, U+200E–U+200F, U+2028–U+202E, U+2066–U+2069).
"no NUL": any character but that; "any character": that too. A lone surrogate is none.

A parameter that is wrong is named in the message; an empty one counts as absent, of several with
one name the first counts, and those that a route does not know are ignored. A path with an id of a
wrong form is `NOT_FOUND`, as for an id that does not exist. The head of a request has at most
16 KiB (431).

Ids of projects are DNS-1123 labels, so that they can be names in Kubernetes. `cwd` is judged by its
text: it cannot climb out of the project with `..` or begin at the root. A symbolic link inside the
project is followed wherever it points, as the command itself could.
"""

_WIDE = {Characters.NO_NUL: "no NUL", Characters.ANY: "any character"}


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for (method, path), description in DESCRIBED.items():
        if description.body is not None or description.parameters:
            lines += [f"## {method} {path}", "", *_route(description), ""]
    return "\n".join(lines).rstrip() + "\n"


def _route(description: Description) -> Iterator[str]:
    if description.body is not None:
        yield "| field | type | bounds | |"
        yield "|---|---|---|---|"
        yield from _rules(rules_of(description.body).rules)
    if description.body is not None and description.parameters:
        yield ""
    if description.parameters:
        yield "| parameter | type | bounds | a wrong one | |"
        yield "|---|---|---|---|---|"
        yield from map(_parameter, description.parameters)


def _rules(rules: Sequence[Rule], prefix: str = "") -> Iterator[str]:
    for rule in rules:
        name = f"{prefix}{rule.name}"
        required = ", required" if rule.required else ""
        bounds = _cell("; ".join(_bounds(rule)))
        yield f"| `{name}` | {rule.kind}{required} | {bounds} | {_cell(rule.about)} |"
        yield from _rules(rule.fields, f"{name}.")


def _bounds(rule: Rule) -> Iterator[str]:
    item = "each " if rule.kind is RuleKind.TEXTS else ""
    if rule.min_items is not None and rule.max_items is not None:
        yield f"{rule.min_items:,}–{rule.max_items:,} items"
    elif rule.max_items is not None:
        yield f"at most {rule.max_items:,} entries"
    if rule.choices:
        yield f"{item}one of {', '.join(f'`{choice}`' for choice in rule.choices)}"
    elif rule.max_bytes is not None:
        least = "1–" if rule.kind is RuleKind.TEXT else "at most "
        yield f"{item}{least}{rule.max_bytes:,} bytes"
        if rule.kind is not RuleKind.ENTRIES and rule.characters in _WIDE:
            yield f"{item}{_WIDE[rule.characters]}"
    if rule.least is not None and rule.most is not None:
        yield f"{rule.least:,}–{rule.most:,}"
    if rule.pattern is not None:
        yield f"{item}`{rule.pattern.pattern}`"


def _parameter(parameter: Parameter) -> str:
    where = " (header)" if parameter.where == "header" else ""
    required = ", required" if parameter.required else ""
    bounds = _cell("; ".join(_limits(parameter.schema)))
    code = f"`{parameter.code}`"
    kind = f"{parameter.schema.get('type', 'string')}{required}"
    return f"| `{parameter.name}`{where} | {kind} | {bounds} | {code} | {_cell(parameter.about)} |"


def _limits(schema: Schema) -> Iterator[str]:
    """What a parameter's schema says beside its type."""
    if "minimum" in schema:
        yield f"{schema['minimum']:,}–{schema['maximum']:,}"
    if isinstance(choices := schema.get("enum"), list):
        yield f"one of {', '.join(f'`{choice}`' for choice in choices)}"
    if "maxLength" in schema:
        yield f"at most {schema['maxLength']:,} characters, no control characters"
    elif "pattern" in schema:
        yield f"`{schema['pattern']}`"
    if isinstance(either := schema.get("anyOf"), list):
        yield " or ".join(bound for each in either for bound in _limits(each))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
