"""What the API server's refusals, and a network that fails, mean to rdev. The only such table."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httpcore2
import httpx2
import msgspec

from rdev.domain.errors import ErrorCode, RdevError

# 401 and 403 are about rdev's own rights, which no client of rdev can mend: they are no FORBIDDEN.
_CODES: Final = {
    400: ErrorCode.BAD_REQUEST,
    404: ErrorCode.NOT_FOUND,
    409: ErrorCode.CONFLICT,
    410: ErrorCode.GONE,
    422: ErrorCode.BAD_REQUEST,
}
_MESSAGE_CHARACTERS: Final = 300
# What a decoder says of bytes that are no answer: a text in another encoding is none of msgspec's
# errors, and neither is an object nested deeper than Python's stack.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_WAITS_MOST_S: Final = 3600.0


class _RetryDetails(msgspec.Struct):
    retryAfterSeconds: float | None = None  # noqa: N815  (the API's name)


class _Refusal(msgspec.Struct):
    message: str | None = None
    details: _RetryDetails | None = None


def refusal(status: int, body: bytes, retry_after: str | None = None) -> RdevError:
    """The error for an answer that is none; `body` is a Status object, or a proxy's page.

    429 and 5xx carry `retry_after_s` where the server told one, at most an hour.
    """
    try:
        told = msgspec.json.decode(body, type=_Refusal)
    except UNREADABLE:
        told = _Refusal()
    message = " ".join((told.message or "no reason given").split())[:_MESSAGE_CHARACTERS]
    waits_s = told.details.retryAfterSeconds if told.details is not None else None
    if waits_s is None and retry_after is not None and retry_after.isdecimal():
        waits_s = float(retry_after)
    if waits_s is not None:
        waits_s = min(max(waits_s, 0.0), _WAITS_MOST_S)
    code = _CODES.get(status, ErrorCode.SERVICE_UNAVAILABLE)
    return RdevError(
        code,
        f"kubernetes answers {status}: {message}",
        retry_after_s=waits_s if code is ErrorCode.SERVICE_UNAVAILABLE else None,
    )


def refusal_of(response: httpx2.Response) -> RdevError:
    """The error for a response whose body was read."""
    return refusal(response.status_code, response.content, response.headers.get("retry-after"))


@contextmanager
def translated() -> Iterator[None]:
    """Errors: RdevError in place of what lightkube, httpx2, httpcore2 and msgspec raise."""
    try:
        yield
    except UNREADABLE as error:
        raise unreachable(f"the answer is not understood: {error}") from error
    except httpx2.HTTPStatusError as error:  # lightkube's ApiError is one
        raise refusal_of(error.response) from error
    except (httpx2.HTTPError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise unreachable(_words(error)) from error


def _words(error: BaseException) -> str:
    """What it says, or else what it came of: a certificate that is not believed lies four deep."""
    cause: BaseException | None = error
    while cause is not None and not str(cause):
        cause = cause.__cause__ or cause.__context__
    return str(cause)[:_MESSAGE_CHARACTERS] if cause is not None else type(error).__name__


def unreachable(reason: str) -> RdevError:
    """Nothing was learned from the API server."""
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, f"kubernetes cannot be reached: {reason}")
