"""Secrets at rest: AES-256-GCM under a key derived from the server's own secret.

A sealed secret is one byte of version, twelve of nonce, then what GCM gives. Whose secret it is, is
authenticated with it: a row that is copied to another endpoint opens nothing.
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.purposes import derived_key

_VERSION = b"\x01"
_NONCE_BYTES = 12
_PURPOSE = "webhook-secret"


class AesGcmBox:
    """The `SecretBox` port."""

    def __init__(self, server_secret: bytes) -> None:
        """`server_secret` is the same on all servers of one database (`RDEV_SECRET_FILE`)."""
        self._cipher = AESGCM(derived_key(server_secret, _PURPOSE))

    def seal(self, secret: bytes, *, of: str) -> bytes:
        """See `SecretBox.seal`."""
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, secret, of.encode())

    def open(self, sealed: bytes, *, of: str) -> bytes:
        """See `SecretBox.open`."""
        nonce, text = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if sealed[:1] != _VERSION:
                raise InvalidTag
            return self._cipher.decrypt(nonce, text, of.encode())
        except (InvalidTag, ValueError) as error:
            message = f"the secret of {of} was sealed with another RDEV_SECRET_FILE"
            raise RdevError(ErrorCode.INTERNAL_ERROR, message) from error
