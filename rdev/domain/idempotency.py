"""The idempotency key of a request: what makes a repeat of a POST safe.

Within `IDEMPOTENCY_S` the same key of the same API key stands for the same request; what the
request was is kept as a digest, never as text.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.fields import Json

# How long a key stands for what it made, in seconds (the HTTP contract).
IDEMPOTENCY_S = 86_400

_KEY = re.compile(r"[ -~]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """A key, the API key it belongs to, and the digest of the request it came with."""

    key_id: str
    key: str
    digest: bytes


def parse_key(text: str) -> str:
    """The key itself. Errors: BAD_REQUEST unless it is 1–255 printable ASCII characters."""
    if not _KEY.fullmatch(text):
        message = "the header Idempotency-Key must have 1–255 printable ASCII characters"
        raise RdevError(ErrorCode.BAD_REQUEST, message)
    return text


def digest_of(method: str, path: str, body: Json) -> bytes:
    """SHA-256 of method, path and canonical body: names sorted, no white space. Two bodies that
    differ only in the order of names or in white space are the same request."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{method} {path}\n{canonical}".encode()).digest()


def mismatch() -> RdevError:
    """The key came with another request before."""
    message = "this Idempotency-Key was used for another request within the last 24 hours"
    return RdevError(ErrorCode.IDEMPOTENCY_MISMATCH, message)
