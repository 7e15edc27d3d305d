"""Signatures of webhooks: Standard Webhooks 1.0.0, schemes v1 (HMAC-SHA256) and v1a (Ed25519).

Owns the text of secrets, what is signed, the three headers, and how a receiver verifies them. The
curve itself is no part of Python: an Ed25519 key is given from outside
(adapters/webhooks/ed25519.py).
Source: the specification of Standard Webhooks, standardwebhooks.com.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from rdev.domain.errors import ErrorCode, RdevError

SECRET_PREFIX = "whsec_"  # noqa: S105
# The specification's bounds of a secret, in bytes before base64.
SECRET_BYTES_MIN = 24
SECRET_BYTES_MAX = 64
SECRET_BYTES = 32

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"

# How old or how far ahead a timestamp may be; what the published libraries allow.
TOLERANCE_S = 300
# A header of more signatures than this is refused unread: two secrets, two schemes, and room.
SIGNATURES_MAX = 16

# The id is a part of what is signed, so it holds no `.`; printable, since it is a header too.
_ID = re.compile(r"[\x21-\x2d\x2f-\x7e]{1,255}")
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


class SignatureScheme(StrEnum):
    """What an endpoint's requests are signed with; what stands before a signature's comma."""

    V1 = "v1"  # HMAC-SHA256, by a secret that both sides hold
    V1A = "v1a"  # Ed25519: only rdev holds what signs


class Signer(Protocol):
    """One secret of one scheme."""

    @property
    def scheme(self) -> str:
        """What stands before the comma: `v1` or `v1a`."""
        ...

    def sign(self, content: bytes) -> bytes:
        """The signature of exactly these bytes."""
        ...


class Verifier(Protocol):
    """What a receiver holds: a secret (v1), or a public key (v1a)."""

    @property
    def scheme(self) -> str:
        """The scheme whose signatures it can judge."""
        ...

    def verifies(self, content: bytes, signature: bytes) -> bool:
        """Whether the signature is of exactly these bytes; takes the same time for any answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A shared secret of scheme v1: signs and verifies. Its bytes are in no `repr`."""

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not SECRET_BYTES_MIN <= len(self.key) <= SECRET_BYTES_MAX:
            raise ValueError(f"a secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes")

    @property
    def scheme(self) -> str:
        """HMAC-SHA256."""
        return "v1"

    @property
    def text(self) -> str:
        """`whsec_…`: what the endpoint's owner is shown, once."""
        return SECRET_PREFIX + base64.b64encode(self.key).decode("ascii")

    def sign(self, content: bytes) -> bytes:
        """32 bytes of HMAC-SHA256."""
        return hmac.digest(self.key, content, hashlib.sha256)

    def verifies(self, content: bytes, signature: bytes) -> bool:
        """Whether this secret signed these bytes; compared in constant time."""
        return hmac.compare_digest(self.sign(content), signature)


def parse_secret(text: str) -> Secret:
    """The secret of its `whsec_…` text; the prefix may be missing, as in the published libraries.

    Errors: BAD_REQUEST, which does not repeat the text.
    """
    key = decode_base64(text.removeprefix(SECRET_PREFIX))
    if key is None or not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        raise RdevError(
            ErrorCode.BAD_REQUEST,
            f"a webhook secret is {SECRET_PREFIX} and base64 of"
            f" {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes",
        )
    return Secret(key=key)


def sign(
    message_id: str, timestamp_s: int, body: bytes, signers: Sequence[Signer]
) -> dict[str, str]:
    """The three headers of one attempt.

    `message_id` is the event's id, the same on every attempt; `timestamp_s` is the attempt's own,
    in Unix seconds; the first of `signers` is the newest (two while a rotated secret is in grace).
    Errors: ValueError for an id or a time that cannot be signed, or without a signer.
    """
    if _ID.fullmatch(message_id) is None or timestamp_s < 0 or not signers:
        raise ValueError("needs an id without `.`, a time since 1970 and a signer")
    content = signed_content(message_id, str(timestamp_s), body)
    signatures = [f"{one.scheme},{_encoded(one.sign(content))}" for one in signers]
    return {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(timestamp_s),
        SIGNATURE_HEADER: " ".join(signatures),
    }


def verify(
    headers: Mapping[str, str],
    body: bytes,
    verifiers: Sequence[Verifier],
    *,
    now_s: float,
    tolerance_s: float = TOLERANCE_S,
) -> str:
    """The id of a request that one of `verifiers` signed, within `tolerance_s` of `now_s`.

    `body` is what came, byte for byte; names of headers in any case. One signature of those in the
    header must hold; unknown schemes are passed over. Whether the id was seen before is the
    receiver's to know.
    Errors: BAD_REQUEST for headers that are missing or malformed, UNAUTHORIZED for a time out of
    tolerance or where no signature holds.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    message_id = lowered.get(ID_HEADER, "")
    timestamp = lowered.get(TIMESTAMP_HEADER, "")
    signatures = lowered.get(SIGNATURE_HEADER, "").split(" ")
    if not (_ID.fullmatch(message_id) and _TIMESTAMP.fullmatch(timestamp) and signatures[0]):
        raise RdevError(
            ErrorCode.BAD_REQUEST,
            f"{ID_HEADER}, {TIMESTAMP_HEADER} or {SIGNATURE_HEADER} is missing or malformed",
        )
    if abs(now_s - int(timestamp)) > tolerance_s:
        raise RdevError(
            ErrorCode.UNAUTHORIZED, f"the timestamp is more than {tolerance_s:g} s from now"
        )
    content = signed_content(message_id, timestamp, body)
    if not any(_holds(one, content, verifiers) for one in signatures[:SIGNATURES_MAX]):
        raise RdevError(ErrorCode.UNAUTHORIZED, "no signature is of this body and a known secret")
    return message_id


def redacted(headers: Mapping[str, str]) -> dict[str, str]:
    """The same headers, fit to be stored and shown: of signatures only the schemes stay."""
    return {
        name: _redacted_signatures(value) if name.lower() == SIGNATURE_HEADER else value
        for name, value in headers.items()
    }


def signed_content(message_id: str, timestamp: str, body: bytes) -> bytes:
    """What is signed: id, time and body, with `.` between."""
    return f"{message_id}.{timestamp}.".encode() + body


def decode_base64(text: str) -> bytes | None:
    """The bytes of standard base64 with its padding; None for anything else."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        return None


def _encoded(signature: bytes) -> str:
    return base64.b64encode(signature).decode("ascii")


def _holds(text: str, content: bytes, verifiers: Sequence[Verifier]) -> bool:
    scheme, _, encoded = text.partition(",")
    signature = decode_base64(encoded)
    if signature is None:
        return False
    judges = [one for one in verifiers if one.scheme == scheme]
    return any(one.verifies(content, signature) for one in judges)


def _redacted_signatures(value: str) -> str:
    return " ".join(f"{one.partition(',')[0]},[redacted]" for one in value.split(" "))
