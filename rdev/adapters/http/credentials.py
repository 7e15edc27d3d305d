"""Which credential a request carries, and who that is: a key, a stream token, or a session.

A key in a header goes before everything else, also where it is refused. `?token=` is a credential
on the routes of one stream alone; elsewhere it is a parameter that nobody reads. A session's cookie
comes with whatever any page asks for, so what changes something needs proof of the page.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import parse_qs

from rdev.adapters.http.cookies import forgotten, session_in
from rdev.adapters.http.exchange import Exchange
from rdev.adapters.http.origin import check_same_origin, origin_of
from rdev.adapters.http.rate_limits import STREAM_ROUTES
from rdev.domain.addresses import Network
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.keys import Principal
from rdev.domain.tickets import TicketKind
from rdev.ports.authentication import Authenticate, CheckTicket

# Where a stream token is good, and where these name their stream.
_STREAMS: Mapping[str, Callable[[Mapping[str, str], Mapping[str, list[str]]], str | None]] = {
    "/commands/{command}/events": lambda fields, _: fields["command"],
    "/projects/{project}/events": lambda _, query: query.get("stream_id", [None])[0],
}
_READS = ("GET", "HEAD", "OPTIONS")
# A session that is refused for one of these is good for nothing any more.
_ENDED = (ErrorCode.UNAUTHORIZED, ErrorCode.KEY_REVOKED, ErrorCode.KEY_EXPIRED)

Identify = Callable[[Exchange, Mapping[str, str]], Awaitable[Principal]]


class Credentials:
    """Finds a request's credential and checks it."""

    def __init__(
        self,
        *,
        authenticate: Authenticate,
        check_ticket: CheckTicket | None,
        trusted_proxies: Sequence[Network],
    ) -> None:
        """`check_ticket` None: keys alone are credentials."""
        self._authenticate = authenticate
        self._check_ticket = check_ticket
        self._trusted_proxies = trusted_proxies

    async def identify(self, this: Exchange, fields: Mapping[str, str]) -> Principal:
        """Who asks. `fields` are the parts of the path that the route's template names.

        `this` is told whether there was a credential at all, and which ticket it was. Errors: those
        of `Authenticate` and `CheckTicket`; FORBIDDEN for a token of another stream, and for a
        session from a page that proves no right to change anything.
        """
        this.has_credential = this.credential is not None
        if this.credential is None and self._check_ticket is not None:
            if this.route in _STREAMS and b"token=" in this.scope["query_string"]:
                query = parse_qs(this.scope["query_string"].decode("latin-1"))
                if "token" in query:
                    stream = _STREAMS[this.route](fields, query)
                    return await self._by_token(this, self._check_ticket, query["token"][0], stream)
            origin = origin_of(this.scope, self._trusted_proxies)
            session = session_in(this.scope["headers"], origin, this.client_ip)
            if session is not None:
                return await self._by_session(this, self._check_ticket, session)
        return await self._authenticate(this.credential, this.client_ip)

    async def _by_token(
        self, this: Exchange, check: CheckTicket, text: str, stream: str | None
    ) -> Principal:
        this.has_credential = True
        entry = await check(text, TicketKind.STREAM, this.client_ip)
        # Also of a refusal it is known who asked.
        this.principal = entry.principal
        if entry.ticket.stream != stream:
            raise RdevError(ErrorCode.FORBIDDEN, "the token is for the stream of another command")
        this.ticket = entry.ticket
        return entry.principal

    async def _by_session(self, this: Exchange, check: CheckTicket, text: str) -> Principal:
        this.has_credential = True
        origin = origin_of(this.scope, self._trusted_proxies)
        try:
            entry = await check(text, TicketKind.SESSION, this.client_ip)
        except RdevError as error:
            if error.code in _ENDED:
                # Or each request of its page would count as another wrong credential.
                this.headers.append(forgotten(origin, this.client_ip))
            raise
        this.principal = entry.principal
        if this.method not in _READS:
            check_same_origin(this.scope, origin)
        elif this.route not in STREAM_ROUTES:  # which say it themselves
            # A cache knows that `Authorization` makes an answer private; of cookies it knows not.
            this.headers.append((b"cache-control", b"no-store"))
        this.ticket = entry.ticket
        return entry.principal
