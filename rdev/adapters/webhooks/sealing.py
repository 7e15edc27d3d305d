"""Keys at rest: AES-256-GCM under a key derived from the server's own secret.

A sealed key is one byte that names its scheme, twelve of nonce, then what GCM gives. Whose key it
is, and of v1a also the scheme, is authenticated with it: a row that is copied to another endpoint
opens nothing, and no byte in the database makes a key of one scheme sign with the other. (Of v1 the
scheme is not, since it was the only one once; it differs from what v1a authenticates.)
"""

import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rdev.adapters.webhooks.ed25519 import SEED_BYTES, PrivateKey
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.purposes import derived_key
from rdev.domain.signing import SECRET_BYTES, Secret, SignatureScheme, Signer
from rdev.domain.webhooks import SigningKey, WebhookId
from rdev.ports.webhooks import FreshKey

_SCHEME_BYTES = {SignatureScheme.V1: b"\x01", SignatureScheme.V1A: b"\x02"}
_SCHEMES = {byte: scheme for scheme, byte in _SCHEME_BYTES.items()}
_NONCE_BYTES = 12
_PURPOSE = "webhook-secret"


class AesGcmBox:
    """The `SecretBox` port."""

    def __init__(
        self, server_secret: bytes, *, random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        """`server_secret` is the same on all servers of one database (`RDEV_SECRET_FILE`)."""
        self._cipher = AESGCM(derived_key(server_secret, _PURPOSE))
        self._random_bytes = random_bytes

    def make(self, scheme: SignatureScheme, *, of: WebhookId) -> FreshKey:
        """See `SecretBox.make`."""
        match scheme:
            case SignatureScheme.V1:
                secret = Secret(key=self._random_bytes(SECRET_BYTES))
                sealed = self.seal(secret.key, scheme=scheme, of=of)
                return FreshKey(key=SigningKey(sealed=sealed), secret=secret.text)
            case SignatureScheme.V1A:
                seed = self._random_bytes(SEED_BYTES)
                sealed = self.seal(seed, scheme=scheme, of=of)
                public_key = PrivateKey(seed).public.text
                return FreshKey(key=SigningKey(sealed=sealed, public_key=public_key), secret=None)

    def open(self, sealed: bytes, *, of: WebhookId) -> Signer:
        """See `SecretBox.open`."""
        nonce, text = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            scheme = _SCHEMES.get(sealed[:1])
            if scheme is None:
                raise InvalidTag
            key = self._cipher.decrypt(nonce, text, _owner(scheme, of))
            return Secret(key=key) if scheme is SignatureScheme.V1 else PrivateKey(key)
        except (InvalidTag, ValueError) as error:
            message = f"the secret of {of} was sealed with another RDEV_SECRET_FILE"
            raise RdevError(ErrorCode.INTERNAL_ERROR, message) from error

    def seal(self, key: bytes, *, scheme: SignatureScheme, of: WebhookId) -> bytes:
        """A key of this scheme, as it is stored."""
        nonce = os.urandom(_NONCE_BYTES)
        text = self._cipher.encrypt(nonce, key, _owner(scheme, of))
        return _SCHEME_BYTES[scheme] + nonce + text


def _owner(scheme: SignatureScheme, of: WebhookId) -> bytes:
    """What is authenticated beside the key. An endpoint's id never begins with a byte of these."""
    return of.encode() if scheme is SignatureScheme.V1 else _SCHEME_BYTES[scheme] + of.encode()
