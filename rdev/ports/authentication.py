"""Who is asking: what the HTTP edge needs to turn a credential into a principal."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.keys import Principal
from rdev.domain.tickets import Ticket, TicketKind

# The project that a command belongs to; None where there is no such command.
ProjectOf: TypeAlias = Callable[[CommandId], Awaitable[ProjectId | None]]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who came in with which ticket; the principal ends with the ticket at the latest."""

    principal: Principal
    ticket: Ticket


class CheckTicket(Protocol):
    """Checks one ticket, and the key behind it, at every request anew."""

    async def __call__(self, text: str, kind: TicketKind, client_ip: str) -> Entry:
        """The ticket of this kind and the principal of its key.

        Errors: UNAUTHORIZED for what is no such ticket, or has ended; of its key, those of
        `Authenticate`.
        """
        ...
