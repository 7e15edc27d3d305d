"""The origin a client speaks to, and whether a request comes from a page of that origin.

`scheme://host:port` as the browser's address bar has it: behind a trusted proxy from what that says
of the client's side, else from the request itself. From others than trusted proxies no such header
is looked at. Source: RFC 6454, section 4; RFC 7239; Fetch Metadata (Sec-Fetch-Site).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from hypercorn.typing import HTTPScope

from rdev.adapters.http.address import LOCAL_PEER, is_trusted
from rdev.domain.addresses import Network
from rdev.domain.errors import ErrorCode, RdevError

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_FORWARDED = re.compile(r'(?:^|;)\s*(proto|host)=("?)([^";,\s]+)\2\s*(?=;|$)', re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A scheme (`http`, `https`) and a host with its port, unless that is the scheme's own."""

    scheme: str
    host: str

    @property
    def text(self) -> str:
        """As in the header `Origin`."""
        return f"{self.scheme}://{self.host}"

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, by its name."""
        name = re.sub(r":[0-9]*$", "", self.host)
        if name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return False


def origin_of(scope: HTTPScope, trusted_proxies: Sequence[Network]) -> Origin:
    """The origin that the client itself speaks to."""
    headers = list(scope["headers"])
    scheme, host = scope["scheme"], _first(headers, b"host") or ""
    peer = scope["client"][0] if scope["client"] else LOCAL_PEER
    if is_trusted(peer, trusted_proxies):
        told = dict(_forwarded(_first(headers, b"forwarded") or ""))
        scheme = _first(headers, b"x-forwarded-proto") or told.get("proto") or scheme
        host = _first(headers, b"x-forwarded-host") or told.get("host") or host
    scheme, host = scheme.lower(), host.lower()
    return Origin(scheme=scheme, host=host.removesuffix(_DEFAULT_PORTS.get(scheme, ":")))


def check_same_origin(scope: HTTPScope, own: Origin) -> None:
    """A browser sends its cookies with whatever any page asks for; it also says which page asked.

    Where it sends `Sec-Fetch-Site`, that decides (to plain http elsewhere than loopback it sends
    none), else `Origin`. Errors: FORBIDDEN where neither says that it is a page of `own`.
    """
    site = _first(scope["headers"], b"sec-fetch-site")
    if site == "same-origin":
        return
    if site is None and _first(scope["headers"], b"origin") == own.text:
        return
    message = "a session changes things only for pages of its own origin (Sec-Fetch-Site, Origin)"
    raise RdevError(ErrorCode.FORBIDDEN, message)


def _forwarded(text: str) -> Iterable[tuple[str, str]]:
    """`proto` and `host` of the first element: the proxy that is nearest to the client."""
    for name, _, value in _FORWARDED.findall(text):
        yield name.lower(), value


def _first(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    """The first item of a header's first line; None where there is none."""
    for name, value in headers:
        if name == wanted:
            return value.decode("latin-1").split(",", 1)[0].strip() or None
    return None
