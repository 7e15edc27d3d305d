"""One secret, many purposes: a key for each, none of which tells anything of another.

The secret is the server's own (`RDEV_SECRET_FILE`), the same on all servers that are one service.
Source: RFC 5869 (HKDF) with SHA-256.
"""

import hashlib
import hmac

# A secret has at least as many bytes: 256 bits, if they are random.
SECRET_BYTES = 32

_SALT = b"rdev"


def derived_key(secret: bytes, purpose: str) -> bytes:
    """The 32 bytes of key for one purpose (`session`, `stream-token`).

    The same for the same secret and purpose, on every server and for ever: what is sealed with it
    outlives a restart.
    """
    assert len(secret) >= SECRET_BYTES
    pseudorandom = hmac.digest(_SALT, secret, hashlib.sha256)
    # One block of output is 32 bytes, so the expansion is its first step.
    return hmac.digest(pseudorandom, purpose.encode() + b"\x01", hashlib.sha256)
