"""The only table of HTTP statuses, and the one document every failure becomes.

The body is both an RFC 9457 problem and the original envelope's `error` and `meta`, so old clients
and standard tooling read the same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from math import ceil
from types import MappingProxyType

import msgspec

from rdev.adapters.http.wire import stamp
from rdev.domain.errors import ErrorCode, RdevError

STATUS: Mapping[ErrorCode, int] = MappingProxyType(
    {
        ErrorCode.BAD_REQUEST: 400,
        ErrorCode.UNAUTHORIZED: 401,
        ErrorCode.KEY_REVOKED: 401,
        ErrorCode.KEY_EXPIRED: 401,
        ErrorCode.FORBIDDEN: 403,
        ErrorCode.IP_NOT_ALLOWED: 403,
        ErrorCode.NOT_FOUND: 404,
        ErrorCode.CONFLICT: 409,
        ErrorCode.GONE: 410,
        ErrorCode.PAYLOAD_TOO_LARGE: 413,
        ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
        ErrorCode.IDEMPOTENCY_MISMATCH: 422,
        ErrorCode.TOO_MANY_REQUESTS: 429,
        ErrorCode.INTERNAL_ERROR: 500,
        ErrorCode.SERVICE_UNAVAILABLE: 503,
    }
)

# What HTTP itself decides, before any code of rdev runs. Statuses without a code of their own in
# the contract keep the status and borrow the nearest code.
_CODE_OF_STATUS = {
    HTTPStatus.NOT_FOUND: ErrorCode.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ErrorCode.PAYLOAD_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ErrorCode.UNSUPPORTED_MEDIA_TYPE,
}

CONTENT_TYPE = "application/problem+json"

# Seconds a client is told to wait where the refusal itself does not know better.
_RETRY_AFTER_S = 1

_TITLES = {code: code.value.replace("_", " ").capitalize() for code in ErrorCode}
_CHALLENGE = 'Bearer realm="rdev"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A failure in the words of HTTP."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def problem(
    error: RdevError, *, request_id: str, instance: str, now: datetime, status: int | None = None
) -> Problem:
    """The document for an error, with the headers that its status demands.

    `instance` is the path of the request. `status` overrides the table for what HTTP itself
    decided (405, 408). The members of `error.details` stand beside the standard ones and again in
    `error.info`; a member can never replace a standard one.
    """
    code = error.code
    status = status or STATUS[code]
    document: dict[str, object] = {
        **error.details,
        "type": f"urn:rdev:error:{code.lower()}",
        "title": _TITLES[code],
        "status": status,
        "detail": error.message,
        "instance": instance,
        "error": _envelope_error(error),
        "meta": {"request_id": request_id, "timestamp": stamp(now)},
    }
    return Problem(
        status=status, headers=_headers(error, status), body=msgspec.json.encode(document)
    )


def of_http(status: int, sentence: str) -> RdevError:
    """The error for a status that HTTP itself decided on (no route, wrong method, broken body)."""
    fallback = ErrorCode.BAD_REQUEST if status < 500 else ErrorCode.INTERNAL_ERROR
    code = _CODE_OF_STATUS.get(HTTPStatus(status), fallback)
    return RdevError(code, sentence)


def internal_error() -> RdevError:
    """What a client is told about a fault of ours: nothing but where to look it up."""
    message = "the server failed; the request id finds the cause in its log"
    return RdevError(ErrorCode.INTERNAL_ERROR, message)


def _envelope_error(error: RdevError) -> dict[str, object]:
    """The original envelope's `error` member; `info` only where there is something to say."""
    details = [{"pointer": f.pointer, "message": f.message} for f in error.faults]
    member: dict[str, object] = {
        "code": error.code,
        "message": error.message,
        "details": details,
    }
    if error.details:
        member["info"] = error.details
    return member


def _headers(error: RdevError, status: int) -> tuple[tuple[str, str], ...]:
    """Content type, and what the status demands: a challenge with 401, a delay with 429 and 503."""
    headers = [("Content-Type", CONTENT_TYPE)]
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", _CHALLENGE))
    wait_s = error.retry_after_s
    if wait_s is None and status in (
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ):
        wait_s = _RETRY_AFTER_S
    if wait_s is not None:
        # Rounded up: a client that is told 0 comes back at once.
        headers.append(("Retry-After", str(max(1, ceil(wait_s)))))
    return tuple(headers)
