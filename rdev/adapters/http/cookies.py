"""The cookie of a session: its name, its attributes, and how it is read.

HttpOnly (no script reads it), SameSite=Strict, for all paths of this host alone. Secure, with the
prefix `__Host-` that only a secure origin can set, unless browser and server are one machine and
speak plain http. Source: RFC 6265bis, section 4.1.3.
"""

from collections.abc import Iterable

from rdev.adapters.http.origin import Origin
from rdev.domain.addresses import parse_address

_NAME = "rdev_session"
_SECURE_NAME = f"__Host-{_NAME}"


def session_in(
    headers: Iterable[tuple[bytes, bytes]], origin: Origin, client_ip: str
) -> str | None:
    """The session that the request carries under the name it would be given here, or None."""
    wanted = _name(origin, client_ip)
    for name, value in headers:
        # HTTP/2 may send each cookie as a header of its own.
        if name == b"cookie":
            for pair in value.decode("latin-1").split(";"):
                found, _, text = pair.strip().partition("=")
                if found == wanted and text:
                    return text
    return None


def session_cookie(
    text: str, origin: Origin, client_ip: str, *, good_for_s: int
) -> tuple[bytes, bytes]:
    """The header that gives a browser its session."""
    name = _name(origin, client_ip)
    attributes = f"Max-Age={good_for_s}; Path=/; HttpOnly; SameSite=Strict"
    secure = "; Secure" if name == _SECURE_NAME else ""
    return b"set-cookie", f"{name}={text}; {attributes}{secure}".encode()


def forgotten(origin: Origin, client_ip: str) -> tuple[bytes, bytes]:
    """The header that takes it away."""
    return session_cookie("", origin, client_ip, good_for_s=0)


def _name(origin: Origin, client_ip: str) -> str:
    client = parse_address(client_ip)
    is_here = client is not None and client.is_loopback and origin.is_loopback
    return _NAME if is_here and origin.scheme == "http" else _SECURE_NAME
