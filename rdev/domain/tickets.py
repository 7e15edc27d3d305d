"""Tickets: what a browser shows instead of a key: a session (a cookie), a stream token (`?token=`).

A ticket holds no key: it names one (its id, and the public id of the secret it was got with), says
until when, and for a stream token which stream; and is sealed with HMAC-SHA256 by a key of its own
purpose. So a session is never good as a stream token, nor the other way round. What a ticket is
good for is decided by its key, at each request.
"""

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from rdev.domain.ids import CommandId, KeyId
from rdev.domain.purposes import derived_key

SESSION_S = 12 * 3_600
# A stream token ends with its command, and after this at the latest.
STREAM_TOKEN_S = 24 * 3_600
# How long an ended command's stream may still be read with a token, from the later of the command's
# end and the token's beginning: for whoever was away when it ended, or came just too late.
AFTER_END_S = 300

# More than any ticket has; what is longer is not looked at.
_CHARACTERS_MAX = 256
_FORM = re.compile(
    r"(?P<sealed>rdev_(?P<kind>session|stream)_"
    r"(?P<key>key_[a-z0-9]{1,32})\.(?P<public>[0-9A-Za-z]{1,32})\.(?P<ends>[0-9]{1,11})"
    r"(?:\.(?P<stream>cmd_[0-9a-f]{32}))?)"
    r"\.(?P<seal>[0-9A-Za-z_-]{43})"
)


class TicketKind(StrEnum):
    """What a ticket is for; the value is in its text."""

    SESSION = "session"
    STREAM = "stream"


# Each kind has a key of its own.
_PURPOSES = {TicketKind.SESSION: "session", TicketKind.STREAM: "stream-token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a ticket says. `public_id` names the secret, or is the mark of the bootstrap key.
    `stream`: the one command whose events it is good for; None for a session."""

    key_id: KeyId
    public_id: str
    ends_at: datetime
    stream: CommandId | None = None

    @property
    def kind(self) -> TicketKind:
        """A ticket for one stream is a stream token."""
        return TicketKind.SESSION if self.stream is None else TicketKind.STREAM


class Seals:
    """Writes tickets and reads them, with keys that were derived once."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: see `purposes`; it is not kept."""
        self._keys = {kind: derived_key(secret, purpose) for kind, purpose in _PURPOSES.items()}
        self._mark = derived_key(secret, "bootstrap-key")

    def written(self, ticket: Ticket) -> str:
        """The ticket's text; its end is cut to whole seconds."""
        parts = [
            f"rdev_{ticket.kind}_{ticket.key_id}",
            ticket.public_id,
            str(int(ticket.ends_at.timestamp())),
            *([] if ticket.stream is None else [ticket.stream]),
        ]
        sealed = ".".join(parts)
        return f"{sealed}.{self._seal(ticket.kind, sealed)}"

    def read(self, text: str, kind: TicketKind, now: datetime) -> Ticket | None:
        """The ticket that was written by a server with the same secret and has not ended; None for
        all else, whatever is wrong with it."""
        found = _FORM.fullmatch(text) if len(text) <= _CHARACTERS_MAX else None
        if found is None or found["kind"] != kind:
            return None
        # As text: the last digit of a seal in base64 has bits that mean nothing.
        if not hmac.compare_digest(self._seal(kind, found["sealed"]), found["seal"]):
            return None
        stream = found["stream"]
        ticket = Ticket(
            key_id=KeyId(found["key"]),
            public_id=found["public"],
            ends_at=datetime.fromtimestamp(int(found["ends"]), UTC),
            stream=None if stream is None else CommandId(stream),
        )
        return ticket if ticket.kind is kind and now < ticket.ends_at else None

    def mark_of(self, key: str) -> str:
        """What names the bootstrap key in a ticket: another key has another, and it tells nothing
        of the key."""
        return hmac.digest(self._mark, key.encode(errors="replace"), hashlib.sha256)[:8].hex()

    def _seal(self, kind: TicketKind, sealed: str) -> str:
        digest = hmac.digest(self._keys[kind], sealed.encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def is_readable(ticket: Ticket, finished_at: datetime | None, now: datetime) -> bool:
    """Whether events may be read with a stream token: of a command that has ended at `finished_at`
    (None: it has not) for `AFTER_END_S` more, and never once the token has ended."""
    if now >= ticket.ends_at:
        return False
    if finished_at is None:
        return True
    issued_at = ticket.ends_at - timedelta(seconds=STREAM_TOKEN_S)
    return now < max(finished_at, issued_at) + timedelta(seconds=AFTER_END_S)
