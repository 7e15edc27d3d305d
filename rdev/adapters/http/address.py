"""The client's own address, behind proxies that are trusted.

Each proxy adds the address it was called from at the right end of `X-Forwarded-For` or `Forwarded`
(RFC 7239). So the list is walked from the right, for as long as the hop that vouches for the next
one is a trusted proxy; what stands further left is the client's own invention. All lines of a
header are one list. Where the peer is not trusted, nothing it sends is looked at.
"""

import re
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Final

from rdev.domain.addresses import Address, Network, parse_address

# A unix socket has no peer address; who may open the socket is on this machine.
LOCAL_PEER: Final = "127.0.0.1"

Headers = Iterable[tuple[bytes, bytes]]

# One parameter of a `Forwarded` element: a token, or a quoted string that may hold anything.
_PARAMETER = re.compile(r'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*"|[^\s",;]*)\s*')
# `192.0.2.1`, `192.0.2.1:80`, `[2001:db8::1]`, `[2001:db8::1]:80`, and bare IPv6.
_NODE = re.compile(r"\[(?P<six>[^\]]*)\](?::[0-9]+)?|(?P<four>[0-9.]+)(?::[0-9]+)?")

# Of peers, who come again and again: parsing each time was 3 % of a stream's connect.
_parsed_peer = lru_cache(maxsize=4_096)(parse_address)


class _Hop(Enum):
    """A hop that gives no address."""

    # It says so itself, or what it says is no address.
    HIDDEN = auto()
    # An element that cannot be read: a client's open quote may have swallowed what a proxy wrote.
    BROKEN = auto()


_Hops = list[Address | _Hop]


def client_address(
    peer: str | None, headers: Headers, trusted_proxies: Sequence[Network]
) -> str | None:
    """The client's address in its one form.

    None: it cannot be known, since the trusted proxy handed on what it should not have: both
    headers, telling different clients (one of them is the client's own word), or a `Forwarded` that
    cannot be read where it matters. A hop that hides itself (`unknown`, `_name`) ends the walk: the
    proxy that vouched for it stands for the client.
    """
    nearest = _parsed_peer(peer or LOCAL_PEER)
    if nearest is None:
        return peer
    if not trusted_proxies or not _is_within(nearest, trusted_proxies):
        return str(nearest)
    found = list(headers)
    told = set()
    if lines := _lines(found, b"x-forwarded-for"):
        told.add(_walk(nearest, _legacy_hops(",".join(lines)), trusted_proxies))
    if lines := _lines(found, b"forwarded"):
        # Each line for itself: no quoted string goes over the end of a line.
        hops = [hop for line in lines for hop in _standard_hops(line)]
        told.add(_walk(nearest, hops, trusted_proxies))
    if len(told) > 1 or None in told:
        return None
    return str(told.pop() if told else nearest)


def is_trusted(peer: str, trusted_proxies: Sequence[Network]) -> bool:
    """Whether the peer is one of the trusted proxies."""
    address = parse_address(peer)
    return address is not None and _is_within(address, trusted_proxies)


def _walk(nearest: Address, hops: _Hops, trusted_proxies: Sequence[Network]) -> Address | None:
    """The first address from the right that is no trusted proxy's; None at a broken element."""
    address = nearest
    while hops and _is_within(address, trusted_proxies):
        candidate = hops.pop()
        if candidate is _Hop.BROKEN:
            return None
        if candidate is _Hop.HIDDEN:
            break
        address = candidate
    return address


def _legacy_hops(value: str) -> _Hops:
    """`X-Forwarded-For`: addresses with commas between, some proxies add a port."""
    return [_node(part.strip()) for part in value.split(",") if part.strip()]


def _standard_hops(line: str) -> _Hops:
    """`Forwarded`: the `for` of each element. Source: RFC 7239, section 4."""
    hops: _Hops = []
    current: Address | _Hop = _Hop.HIDDEN
    position = 0
    while position < len(line):
        parameter = _PARAMETER.match(line, position)
        if parameter is not None:
            position = parameter.end()
            if parameter[1].lower() == "for":
                current = _node(_unquoted(parameter[2]))
        if position == len(line):
            break
        if line[position] not in ",;":
            position, current = _next_element(line, position), _Hop.BROKEN
        if line[position : position + 1] == ",":
            hops.append(current)
            current = _Hop.HIDDEN
        position += 1
    return [*hops, current] if line.strip() else hops


def _next_element(line: str, position: int) -> int:
    """Where the next comma stands, or the end."""
    found = line.find(",", position)
    return len(line) if found < 0 else found


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def _node(text: str) -> Address | _Hop:
    """The address of a hop, without its port."""
    found = _NODE.fullmatch(text)
    bare = text if found is None else found["six"] or found["four"] or ""
    return _Hop.HIDDEN if "%" in bare else parse_address(bare) or _Hop.HIDDEN


def _lines(headers: Headers, wanted: bytes) -> list[str]:
    """The values of all lines of a header, in order."""
    return [value.decode("latin-1") for name, value in headers if name.lower() == wanted]


def _is_within(address: Address, networks: Sequence[Network]) -> bool:
    """No address of another family lies in a network."""
    return any(address in network for network in networks)
