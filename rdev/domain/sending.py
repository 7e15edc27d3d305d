"""One request to a webhook's receiver, and what came of it.

Owns the bounds of an answer and the words for what can go wrong. Whether an outcome is tried again,
and when, is the dispatcher's.
"""

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from rdev.domain.webhook_targets import Target

# Of an answer, headers and framing included: so much is read, then the connection is closed.
ANSWER_BYTES_MAX = 16_384
# Of an answer's body: so much is kept for the delivery log.
BODY_BYTES_KEPT = 4_096

_SECONDS = re.compile(r"[0-9]{1,9}")


class SendFault(StrEnum):
    """Why there is no answer, or no whole one."""

    DNS = "dns"  # the name has no address, or nobody could tell
    DENIED = "denied"  # the address guard refused; nothing was dialled
    REFUSED = "refused"  # no address took the connection
    TLS = "tls"  # no handshake, or a certificate that is not the name's
    TIMEOUT = "timeout"
    CUT = "cut"  # the connection ended before the answer did
    PROTOCOL = "protocol"  # what came is no HTTP, or its head passes the bound


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingRequest:
    """A POST of JSON. `headers` are the signature's (`domain/signing.py`), sent as they are."""

    target: Target
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one attempt came to, fit to be stored and shown to the endpoint's owner.

    `status` is None where no whole head came; with one, `fault` says that the body was not read to
    its end. `detail` is a clause without addresses. `latency_s` is the whole attempt's, the name's
    resolution included. `request_headers` are all that were meant for the wire, signatures
    redacted. `body` is at most `BODY_BYTES_KEPT`, raw: not decompressed, of any encoding.
    `truncated`: there was more of it, or it was not read on.
    """

    status: int | None
    fault: SendFault | None
    detail: str
    latency_s: float
    request_headers: Mapping[str, str]
    body: bytes
    truncated: bool
    http_version: str | None
    retry_after: str | None

    @property
    def is_accepted(self) -> bool:
        """2xx, whatever became of the body: the receiver has said so."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_gone(self) -> bool:
        """410: the receiver wants no more. Source: Standard Webhooks."""
        return self.status == 410

    def retry_after_s(self, now: datetime) -> float | None:
        """Seconds (≥ 0) that the receiver asks to wait; None where it does not, or not legibly.

        Source: RFC 9110 §10.2.3, seconds or a date.
        """
        if self.retry_after is None:
            return None
        if _SECONDS.fullmatch(self.retry_after):
            return float(self.retry_after)
        try:
            at = email.utils.parsedate_to_datetime(self.retry_after)
        except (ValueError, OverflowError):  # OverflowError: numbers that no clock has
            return None
        # A date with zone -0000 comes without one; HTTP's are all UTC.
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return max(0.0, (at - now).total_seconds())
