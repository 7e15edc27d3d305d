"""Keys of scheme v1a, on the only library of this house that knows the curve.

Texts: `whsk_` and base64 of the 32-byte seed, or of seed and public key (64 bytes, as Svix writes
it); `whpk_` and base64 of the 32-byte public key. Source: the specification; RFC 8032.
"""

import base64

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.signing import decode_base64

PRIVATE_PREFIX = "whsk_"
PUBLIC_PREFIX = "whpk_"
SEED_BYTES = 32


class PublicKey:
    """What a receiver of v1a holds; it verifies and signs nothing."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        """Take the library's key; `parse_public` makes one of its text."""
        self._key = key

    @property
    def scheme(self) -> str:
        """Ed25519."""
        return "v1a"

    @property
    def text(self) -> str:
        """`whpk_…`, fit for anybody."""
        return PUBLIC_PREFIX + base64.b64encode(self._key.public_bytes_raw()).decode("ascii")

    def verifies(self, content: bytes, signature: bytes) -> bool:
        """Whether the private key of this one signed these bytes."""
        try:
            self._key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """Signs with v1a. Its bytes are in no `repr`."""

    def __init__(self, seed: bytes) -> None:
        """Take 32 random bytes. Errors: ValueError for another length."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(self._key.public_key())

    @property
    def scheme(self) -> str:
        """Ed25519."""
        return "v1a"

    @property
    def text(self) -> str:
        """`whsk_…` of seed and public key: what is stored, never shown to a receiver."""
        pair = self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()
        return PRIVATE_PREFIX + base64.b64encode(pair).decode("ascii")

    def sign(self, content: bytes) -> bytes:
        """64 bytes; the same for the same content."""
        return self._key.sign(content)


def parse_private(text: str) -> PrivateKey:
    """The key of its `whsk_…` text. Errors: BAD_REQUEST, which does not repeat the text."""
    raw = _decoded(text, PRIVATE_PREFIX)
    if len(raw) in (SEED_BYTES, 2 * SEED_BYTES):
        key = PrivateKey(raw[:SEED_BYTES])
        # A pair whose halves do not belong together would sign what nobody can verify.
        if len(raw) == SEED_BYTES or key.text == PRIVATE_PREFIX + _encoded(raw):
            return key
    raise RdevError(ErrorCode.BAD_REQUEST, f"{PRIVATE_PREFIX} is not followed by an Ed25519 key")


def parse_public(text: str) -> PublicKey:
    """The key of its `whpk_…` text. Errors: BAD_REQUEST."""
    raw = _decoded(text, PUBLIC_PREFIX)
    if len(raw) != SEED_BYTES:
        raise RdevError(ErrorCode.BAD_REQUEST, f"{PUBLIC_PREFIX} is not followed by a public key")
    return PublicKey(Ed25519PublicKey.from_public_bytes(raw))


def _decoded(text: str, prefix: str) -> bytes:
    return (text.startswith(prefix) and decode_base64(text.removeprefix(prefix))) or b""


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
