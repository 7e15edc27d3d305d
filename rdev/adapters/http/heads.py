"""What a request's head may be on HTTP/1.1: hypercorn's reading, with refusals that say why.

Every guard here answers something seen in hypercorn 0.18: its own 400 and 431 come without a body;
a request with Content-Length and Transfer-Encoding is served (another server in front may take the
other one for its end, and what follows for a request of its own); a cleartext upgrade to HTTP/2
takes a connection out of the sight of a proxy. Bounds: 16 KiB of head; what is read of a refused
request.
"""

from collections.abc import Awaitable, Callable

import h11
from hypercorn.events import Closed, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import H11SendableEvent

from rdev.adapters.http.inbox import give_inbox
from rdev.adapters.http.problems import Problem

# Makes the answer to a request that cannot be read, from its status and a sentence.
Refusal = Callable[[int, str], Problem]


def without_words(status: int, sentence: str) -> Problem:
    """The refusal of a server whose app has no word for it: a bare status."""
    return Problem(status=status, headers=(), body=b"")


_SENTENCES = {
    400: "the request is not HTTP/1.1",
    431: "the head of the request is too large",
    501: "this transfer coding is not known",
}
_AMBIGUOUS = "Content-Length and Transfer-Encoding cannot be sent together"
_NO_CODING = "HTTP/1.0 knows no Transfer-Encoding"


class GuardedH11(H11Protocol):
    """Hypercorn's protocol with the guards; takes the place of one that has read nothing yet."""

    def __init__(
        self, unused: H11Protocol, *, refusal: Refusal, linger: Callable[[], Awaitable[None]]
    ) -> None:
        """`linger` waits until the client has had the chance to read an answer."""
        super().__init__(
            unused.app,
            unused.config,
            unused.context,
            unused.task_group,
            unused.connection_state,
            unused.ssl,
            unused.client,
            unused.server,
            unused.send,
        )
        self._refusal = refusal
        self._linger = linger
        self._is_refused = False

    async def _check_protocol(self, event: h11.Request) -> None:
        """Refuse what two servers may read differently; stay with HTTP/1.1 where a client asks for
        an upgrade (RFC 9110, section 7.8 leaves that to the server)."""
        names = {name.lower() for name, _ in event.headers}
        if b"transfer-encoding" in names and b"content-length" in names:
            await self._refuse(event, _AMBIGUOUS)
        elif b"transfer-encoding" in names and event.http_version == b"1.0":
            await self._refuse(event, _NO_CODING)
        elif b"upgrade" not in names:
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        """A refused request reaches no route."""
        if not self._is_refused:
            await super()._create_stream(request)
            give_inbox(self.stream)

    async def _send_error_response(self, status_code: int) -> None:
        """What h11 could not read, as a problem."""
        sentence = _SENTENCES.get(status_code, _SENTENCES[400])
        await self._answer(self._refusal(status_code, sentence), has_body=True)

    async def _refuse(self, request: h11.Request, sentence: str) -> None:
        self._is_refused = True
        await self._answer(self._refusal(400, sentence), has_body=request.method != b"HEAD")
        await self.send(Closed())

    async def _answer(self, problem: Problem, *, has_body: bool) -> None:
        own = [(name.lower().encode(), value.encode()) for name, value in problem.headers]
        own += [
            (b"content-length", b"%d" % len(problem.body)),
            (b"connection", b"close"),
            *self.config.response_headers("h11"),
        ]
        events: list[H11SendableEvent] = [h11.Response(status_code=problem.status, headers=own)]
        if has_body:
            events.append(h11.Data(data=problem.body))
        events.append(h11.EndOfMessage())
        try:
            # All at once: where a route has the request already, its answer must not come between.
            data = b"".join(self.connection.send(event) for event in events)
        except h11.LocalProtocolError:
            return  # an answer is on its way; the connection is closed behind it
        await self.send(RawData(data=data))
        await self._linger()
