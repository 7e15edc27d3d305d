"""Who is asking: what the HTTP edge needs to turn a credential into a principal."""

from typing import Protocol


class Principal(Protocol):
    """The holder of a credential that was accepted for this request."""

    @property
    def key_id(self) -> str:
        """The id of the key, fit for logs and audit; never the key itself."""
        ...


class Authenticate(Protocol):
    """Checks one credential, at every request anew."""

    async def __call__(self, credential: str | None, client_ip: str) -> Principal:
        """The principal behind the credential.

        `credential` is None where the request carried none. `client_ip` is the address of the
        client itself, behind the trusted proxies.
        Errors: UNAUTHORIZED, KEY_REVOKED, KEY_EXPIRED, IP_NOT_ALLOWED; SERVICE_UNAVAILABLE when it
        cannot be known.
        """
        ...
