"""Routes that are served without Quart: event streams, which are many and long.

They pass the same gate as all others (authentication, hooks) and raise `RdevError` as all others
do; what is missing is Quart's request object and its tasks. Why: docs/adr/0008.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope

from rdev.adapters.http.exchange import exchange
from rdev.adapters.http.guards import refuse
from rdev.adapters.http.problems import internal_error, of_http
from rdev.domain.errors import RdevError

_log = logging.getLogger("rdev.http")

_METHODS = ("GET", "HEAD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request of a plain route. `fields` are the parts of the path that the template names."""

    scope: HTTPScope
    receive: ASGIReceiveCallable
    send: ASGISendCallable
    fields: Mapping[str, str]

    def header(self, name: bytes) -> str | None:
        """The header's first value; `name` in lower case."""
        found = (value for key, value in self.scope["headers"] if key == name)
        value = next(found, None)
        return None if value is None else value.decode("latin-1")

    def parameter(self, name: str) -> str | None:
        """The query parameter's first value, or None where it is absent or empty."""
        if not self.scope["query_string"]:
            return None
        query = self.scope["query_string"].decode("latin-1")
        # Fields at most as many as a head can hold anyway.
        return next(iter(parse_qs(query).get(name, ())), None)


Answer = Callable[[Asked], Awaitable[None]]


class PlainRoute:
    """A path template (`/commands/{command}/events`) and who answers it."""

    def __init__(self, template: str, answer: Answer) -> None:
        """`answer` raises RdevError only before it has sent the head."""
        self.template = template
        self.answer = answer
        parts = re.split(r"\{(\w+)\}", template)
        fields = [
            f"(?P<{part}>[^/]+)" if n % 2 else re.escape(part) for n, part in enumerate(parts)
        ]
        self._pattern = re.compile("".join(fields))

    def fields(self, path: str) -> Mapping[str, str] | None:
        """What stands for the template's fields; None for another path."""
        found = self._pattern.fullmatch(path)
        return None if found is None else found.groupdict()


async def answer(
    route: PlainRoute,
    asked: Asked,
    *,
    enter: Callable[[str], Awaitable[None]],
    refused: Callable[[RdevError], None],
) -> None:
    """Answer a request: the gate, the route, and a problem where one of them refuses.

    `enter` lets it in under the route's template; `refused` is told of every refusal.
    """
    if asked.scope["method"] not in _METHODS:
        exchange().headers.append((b"allow", b"GET, HEAD"))
        error = of_http(
            HTTPStatus.METHOD_NOT_ALLOWED, f"this path does not take {exchange().method_label}"
        )
        await refuse(asked.send, error, status=HTTPStatus.METHOD_NOT_ALLOWED)
        return
    try:
        await enter(route.template)
        await route.answer(asked)
    except RdevError as error:
        refused(error)
        await refuse(asked.send, error)
    except Exception as error:  # noqa: BLE001  # the trace goes to the log, the client gets a number
        _log.error("request failed", exc_info=error)
        if exchange().status is None:
            await refuse(asked.send, internal_error())
