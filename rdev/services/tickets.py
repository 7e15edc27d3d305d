"""Sessions and stream tokens: given to whoever shows a key, checked with that key at each request.

Nothing is stored: a ticket says what it is (`domain/tickets.py`), and how its key stands is known
from the same memory that answers for the key's own text. So a revocation, an expiry, a rotation and
a foreign address end or refuse a ticket as they do the key, on every server, as fast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId
from rdev.domain.keys import ADMIN, ADMIN_KEY_ID, Principal
from rdev.domain.tickets import SESSION_S, STREAM_TOKEN_S, Seals, Ticket, TicketKind
from rdev.ports.authentication import Entry
from rdev.services.keys import Keys

_REFUSED = {
    TicketKind.SESSION: "the session is not valid or has ended: open one with POST /session",
    TicketKind.STREAM: "the token is not valid or has ended: get one with POST /stream-tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A ticket's text, shown once, and when it ends."""

    text: str = field(repr=False)
    ends_at: datetime


class Tickets:
    """The use cases of tickets."""

    def __init__(
        self, *, keys: Keys, seals: Seals, admin_key: str, now: Callable[[], datetime]
    ) -> None:
        """Of the bootstrap key only its mark is kept."""
        self._keys = keys
        self._seals = seals
        self._admin_mark = seals.mark_of(admin_key)
        self._now = now

    def open_session(self, by: Principal) -> Issued:
        """A session of the key that `by` has shown."""
        return self._issued(by, None, good_for_s=SESSION_S)

    def issue_stream_token(self, by: Principal, stream: CommandId) -> Issued:
        """A token for one stream, of the key that `by` has shown or has a session of."""
        return self._issued(by, stream, good_for_s=STREAM_TOKEN_S)

    async def check(self, text: str, kind: TicketKind, client_ip: str) -> Entry:
        """See `CheckTicket`."""
        ticket = self._seals.read(text, kind, self._now())
        if ticket is None:
            raise RdevError(ErrorCode.UNAUTHORIZED, _REFUSED[kind])
        if ticket.key_id != ADMIN_KEY_ID:
            asked = ticket.key_id, ticket.public_id
            principal = await self._keys.authenticate_named(*asked, client_ip)
        elif ticket.public_id == self._admin_mark:
            principal = ADMIN
        else:
            # The bootstrap key is another one since.
            raise RdevError(ErrorCode.UNAUTHORIZED, _REFUSED[kind])
        return Entry(principal=replace(principal, ends_at=ticket.ends_at), ticket=ticket)

    def _issued(self, by: Principal, stream: CommandId | None, *, good_for_s: int) -> Issued:
        ticket = Ticket(
            key_id=by.key_id,
            public_id=by.public_id or self._admin_mark,
            ends_at=self._now() + timedelta(seconds=good_for_s),
            stream=stream,
        )
        # Its key may end before it does; told is when it is good no more.
        ends_at = min(ticket.ends_at, by.grant.expires_at or ticket.ends_at)
        return Issued(text=self._seals.written(ticket), ends_at=ends_at)
