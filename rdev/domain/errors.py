"""The one error type of rdev and the closed list of its codes.

Adapters translate vendor errors into it at their edge (`raise … from`); the HTTP status of a code
stands in `adapters/http/problems.py` and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, as clients see it. Source: the HTTP contract, docs/api."""

    BAD_REQUEST = "BAD_REQUEST"
    UNAUTHORIZED = "UNAUTHORIZED"
    KEY_REVOKED = "KEY_REVOKED"
    KEY_EXPIRED = "KEY_EXPIRED"
    FORBIDDEN = "FORBIDDEN"
    IP_NOT_ALLOWED = "IP_NOT_ALLOWED"
    NOT_FOUND = "NOT_FOUND"
    CONFLICT = "CONFLICT"
    GONE = "GONE"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    IDEMPOTENCY_MISMATCH = "IDEMPOTENCY_MISMATCH"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    SERVICE_UNAVAILABLE = "SERVICE_UNAVAILABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing wrong with a request: where (a JSON pointer, RFC 6901) and what.

    `limit` names the limit that was passed, where it was one; it is counted, never shown.
    """

    pointer: str
    message: str
    limit: str | None = None


class RdevError(Exception):
    """An outcome that a caller must be told: a code from the closed list and a sentence.

    `message` is a lower-case clause fit for the caller: no secrets, no traces. `faults` lists every
    fault of a body together. `retry_after_s` (seconds, ≥ 0) is set where waiting helps.
    `details` holds further facts a client acts on (e.g. `oldest_seq` with GONE).
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        faults: Sequence[Fault] = (),
        retry_after_s: float | None = None,
        details: Mapping[str, int | str | Sequence[str]] | None = None,
    ) -> None:
        """Keep the parts; `str()` gives `CODE: message`."""
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.faults = tuple(faults)
        self.retry_after_s = retry_after_s
        self.details = details or {}


def bad_request(faults: Sequence[Fault]) -> RdevError:
    """One error for all faults of a request; the message names the first."""
    first = faults[0]
    place = f"{first.pointer}: " if first.pointer else ""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return RdevError(ErrorCode.BAD_REQUEST, f"{place}{first.message}{more}", faults=faults)
