"""The text of an API key: `rdev_sk_<8 public>_<43 secret><6 checksum>`, all of it base62.

The secret is 256 bits. The checksum is the CRC32 of everything before it, so a typo (or what a
scanner of leaked secrets found) is told from a key without asking anybody. Stored are the public id
and the SHA-256 of the whole text, never the text: 256 random bits need no slow hash.
"""

import hashlib
import re
import string
import zlib
from dataclasses import dataclass, field

PREFIX = "rdev_sk_"
PUBLIC_LENGTH = 8
SECRET_LENGTH = 43
CHECKSUM_LENGTH = 6
# What `make_secret` needs: 8 bytes for the public id, 32 for the secret.
ENTROPY_BYTES = 40

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_FORM = re.compile(
    rf"(?P<body>{PREFIX}(?P<public>[0-9A-Za-z]{{{PUBLIC_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH}}})"
    rf"(?P<checksum>[0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What is stored of a key's text: the id that may be seen, and what it is looked up by."""

    public_id: str
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSecret:
    """A secret that was just made. `text` is shown once and stored nowhere."""

    text: str = field(repr=False)
    credential: Credential


def make_secret(entropy: bytes) -> NewSecret:
    """The key text for `ENTROPY_BYTES` random bytes."""
    assert len(entropy) == ENTROPY_BYTES
    public = _base62(int.from_bytes(entropy[:8]), PUBLIC_LENGTH)
    body = f"{PREFIX}{public}_{_base62(int.from_bytes(entropy[8:]), SECRET_LENGTH)}"
    text = body + checksum_of(body)
    return NewSecret(text=text, credential=Credential(public_id=public, digest=digest_of(text)))


def digest_of(text: str) -> bytes:
    """SHA-256 of the text, whatever it holds."""
    return hashlib.sha256(text.encode(errors="replace")).digest()


def public_id_of(text: str) -> str | None:
    """The public id of what has the form of a key and a right checksum; None for all else."""
    found = _FORM.fullmatch(text)
    if found is None or checksum_of(found["body"]) != found["checksum"]:
        return None
    return found["public"]


def checksum_of(body: str) -> str:
    """The CRC32 (ISO-HDLC, as in zip) of ASCII text as 6 base62 digits."""
    return _base62(zlib.crc32(body.encode()), CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    """The last `length` digits of a number, 0 first: 256 bits need 43, a CRC32 needs 6."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
