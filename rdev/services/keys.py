"""Checking credentials: today the one bootstrap key of the administrator."""

import hashlib
import hmac

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.keys import ADMIN_KEY_ID, Principal


class Keys:
    """Accepts the bootstrap key. Only its SHA-256 is kept."""

    def __init__(self, *, admin_key: str) -> None:
        self._admin_digest = hashlib.sha256(admin_key.encode()).digest()

    async def authenticate(self, credential: str | None, client_ip: str) -> Principal:
        """The principal behind the credential, compared in constant time.

        Errors: UNAUTHORIZED, with the same message whatever is wrong.
        """
        digest = hashlib.sha256((credential or "").encode(errors="replace")).digest()
        if not hmac.compare_digest(digest, self._admin_digest):
            message = "a valid API key is required (X-API-Key, or Authorization: Bearer)"
            raise RdevError(ErrorCode.UNAUTHORIZED, message)
        return Principal(key_id=ADMIN_KEY_ID)
