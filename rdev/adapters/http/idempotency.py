"""The header `Idempotency-Key`, read with the body it came with, and what a repeat is told."""

from quart import request

from rdev.adapters.http.exchange import exchange, principal
from rdev.domain.fields import Json
from rdev.domain.idempotency import Idempotency, digest_of, parse_key

_HEADER = "Idempotency-Key"


def idempotency_of(body: Json) -> Idempotency | None:
    """The request's key with the digest of its method, path and body; None without the header.

    Errors: BAD_REQUEST for a key that is none; several headers are one, with a comma between.
    """
    lines = request.headers.getlist(_HEADER)
    if not lines:
        return None
    this = exchange()
    return Idempotency(
        key_id=principal().key_id,
        key=parse_key(", ".join(lines)),
        digest=digest_of(this.method, this.path, body),
    )


def replay_headers(*, is_replay: bool) -> dict[str, str]:
    """What the answer to a repeat carries."""
    return {"Idempotent-Replayed": "true"} if is_replay else {}
