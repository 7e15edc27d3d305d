"""What each answer of the API server says of the API server itself, told to its breaker.

| what came | for the breaker |
|---|---|
| any answer below 500 but 429 | a success: it answers, also where it refuses us |
| 429, 502, 503, 504 | a failure |
| another 5xx | a failure; of an exec nothing: its node did not answer |
| no connection, or one that broke | a failure |
| no answer in time | a failure; of an exec nothing, as above |

So no command, no pod and no node opens the breaker. Requests of the watch and of checks are few and
have a pace of their own: they are never refused, and it is by them that an open breaker learns that
the API server is back.
"""

from dataclasses import dataclass
from typing import Final

import httpx2
import trio

from rdev.domain.breaker import CallOutcome
from rdev.ports.breaker import CallBreaker

_OVERLOADED: Final = frozenset({429, 502, 503, 504})


@dataclass(slots=True)
class Contact:
    """When the API server answered last, in seconds of trio's clock; never: minus infinity. A
    failure since then makes it never."""

    answered_at_s: float = float("-inf")

    def is_younger_than(self, age_s: float) -> bool:
        """Whether it answered so lately that there is no need to ask."""
        return trio.current_time() - self.answered_at_s < age_s


class GuardedTransport(httpx2.AsyncBaseTransport):
    """A transport behind a breaker. Closing it leaves `inner` open."""

    def __init__(
        self, inner: httpx2.AsyncBaseTransport, breaker: CallBreaker, contact: Contact
    ) -> None:
        """`inner` is shared with the requests that are never refused."""
        self._inner = inner
        self._breaker = breaker
        self._contact = contact

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send it. Errors: httpx2's, and SERVICE_UNAVAILABLE at once where the breaker is open."""
        with self._breaker.call() as call:
            try:
                response = await self._inner.handle_async_request(request)
            except httpx2.TransportError as error:
                call.outcome = _outcome_of_error(request, error)
                if call.outcome is CallOutcome.FAILURE:
                    self._contact.answered_at_s = float("-inf")
                raise
            call.outcome = _outcome_of_answer(request, response.status_code)
            if call.outcome is CallOutcome.SUCCESS:
                self._contact.answered_at_s = trio.current_time()
            elif call.outcome is CallOutcome.FAILURE:
                self._contact.answered_at_s = float("-inf")
            return response


class HeraldTransport(httpx2.AsyncBaseTransport):
    """A transport that is never refused, and tells the breaker of good answers. As above."""

    def __init__(
        self, inner: httpx2.AsyncBaseTransport, breaker: CallBreaker, contact: Contact
    ) -> None:
        """`inner` is shared with the requests behind the breaker."""
        self._inner = inner
        self._breaker = breaker
        self._contact = contact

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send it. Errors: httpx2's."""
        good = False
        try:
            response = await self._inner.handle_async_request(request)
            good = _outcome_of_answer(request, response.status_code) is CallOutcome.SUCCESS
        finally:
            self._contact.answered_at_s = trio.current_time() if good else float("-inf")
        if good:
            self._breaker.try_now()
        return response


def _outcome_of_answer(request: httpx2.Request, status: int) -> CallOutcome:
    if status in _OVERLOADED or (status >= 500 and not _is_exec(request)):
        return CallOutcome.FAILURE
    return CallOutcome.SUCCESS if status < 500 else CallOutcome.IGNORED


def _outcome_of_error(request: httpx2.Request, error: httpx2.TransportError) -> CallOutcome:
    if isinstance(error, httpx2.ReadTimeout) and _is_exec(request):
        return CallOutcome.IGNORED
    return CallOutcome.FAILURE


def _is_exec(request: httpx2.Request) -> bool:
    return "upgrade" in request.headers
