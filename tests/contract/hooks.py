"""What schemathesis is told beyond the document; loaded by its process (`SCHEMATHESIS_HOOKS`).

Owns the tally of that process, and the ids that the server has given out: an invented id is
nobody's, so that most of what asks for one would end at 404. Bounded by `IDS_MAX` of a kind.
"""

import atexit
import os
import re
from collections import deque
from pathlib import Path

import schemathesis

from tests.contract.run import TALLY_FILE
from tests.contract.tally import Tally

IDS_MAX = 200
# Of no parameter's form.
WRONG = "!"
WAIT_MAX_S = 60
_ID = re.compile(r"\b(cmd|key|whk|dlv)_[0-9a-f]{32}\b")
_WAIT = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9})?")
# What is kept of an answer for its ids; the rest of a long list is more of the same.
_LOOKED_AT = 4_000

_tally = Tally()
_known: dict[str, deque[str]] = {
    kind: deque(maxlen=IDS_MAX) for kind in ("cmd", "key", "whk", "dlv")
}


def _real(value: object) -> object:
    """One of the ids that are there for nine in ten that are well made; anything else as it is."""
    found = _ID.fullmatch(value) if isinstance(value, str) else None
    ids = () if found is None else _known[found[1]]
    number = 0 if found is None else int(str(value)[-8:], 16)
    return value if not ids or number % 10 == 0 else ids[number % len(ids)]


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    return path_parameters and {name: _real(value) for name, value in path_parameters.items()}


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    return {name: _real(value) for name, value in body.items()}


@schemathesis.hook
def map_query(context, query):
    """Held requests are held briefly: who waits a minute for a command of a stopped project sends
    nothing else."""
    if not query or "wait" not in query:
        return query
    return {**query, "wait": _brief(query["wait"])}


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """An empty parameter counts as absent, and of several the first counts (http/query.py; walked
    by test_parameter_edges.py): what was meant to be wrong is made wrong."""
    known = {parameter.name for parameter in case.operation.query}
    empty = [name for name in known & (case.query or {}).keys() if _is_empty(case.query[name])]
    for name in empty:
        case.query[name] = WRONG
    if (case.headers or {}).get("Last-Event-ID") == "":
        case.headers["Last-Event-ID"] = WRONG


def _first(value: object) -> object:
    """What is sent first: of an object its names are."""
    while isinstance(value, (list, dict)) and value:
        value = next(iter(value))
    return value


def _is_empty(value: object) -> bool:
    """Whether it is sent as nothing, or its first is."""
    return _first(value) in ("", {}, [], None)


def _brief(wait: object) -> object:
    """The same wait if it is none (`1e1` is none), or at most a second."""
    is_wait = _WAIT.fullmatch(str(wait)) is not None
    return "1" if is_wait and 1 < float(str(wait)) <= WAIT_MAX_S else wait


@schemathesis.hook
def after_call(context, case, response) -> None:
    operation = f"{case.operation.method.upper()} {case.operation.path}"
    _tally.answers[operation, response.status_code] += 1
    for found in _ID.finditer(response.content[:_LOOKED_AT].decode("latin-1")):
        if found[0] not in _known[found[1]]:
            _known[found[1]].append(found[0])


if TALLY_FILE in os.environ:
    atexit.register(_tally.write, Path(os.environ[TALLY_FILE]))
