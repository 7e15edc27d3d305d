"""Which refusals are denials: those for who somebody is, not for what they asked."""

from rdev.adapters.http.exchange import exchange
from rdev.domain.audit import Denial
from rdev.domain.errors import ErrorCode, RdevError

ANONYMOUS = "anonymous"

_DENIALS = frozenset(
    {
        ErrorCode.UNAUTHORIZED,
        ErrorCode.KEY_REVOKED,
        ErrorCode.KEY_EXPIRED,
        ErrorCode.IP_NOT_ALLOWED,
        ErrorCode.FORBIDDEN,
    }
)


def denial_of(error: RdevError) -> Denial | None:
    """The running exchange's denial, None where the refusal is none.

    A path that no route has is left out of it: it is the client's text.
    """
    if error.code not in _DENIALS:
        return None
    this = exchange()
    by = this.principal
    return Denial(
        actor=ANONYMOUS if by is None else by.key_id,
        actor_name="" if by is None else by.name,
        ip=this.client_ip,
        request_id=this.request_id,
        reason=error.code,
        route=f"{this.method_label} {this.route}",
    )
