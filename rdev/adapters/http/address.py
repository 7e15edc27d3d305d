"""The client's own address, behind proxies that are trusted.

Each proxy adds the address it was called from at the right end of `X-Forwarded-For` or `Forwarded`
(RFC 7239). So the list is walked from the right, for as long as the hop that vouches for the next
one is a trusted proxy; what stands further left is the client's own invention. All lines of a
header are one list. Where the peer is not trusted, nothing it sends is looked at.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from rdev.domain.addresses import Address, Network, parse_address

# A unix socket has no peer address; who may open the socket is on this machine.
LOCAL_PEER: Final = "127.0.0.1"

Headers = Iterable[tuple[bytes, bytes]]

# One parameter of a `Forwarded` element: a token, or a quoted string that may hold anything.
_PARAMETER = re.compile(r'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*"|[^\s",;]*)\s*')
# `192.0.2.1`, `192.0.2.1:80`, `[2001:db8::1]`, `[2001:db8::1]:80`, and bare IPv6.
_NODE = re.compile(r"\[(?P<six>[^\]]*)\](?::[0-9]+)?|(?P<four>[0-9.]+)(?::[0-9]+)?")


def client_address(
    peer: str | None, headers: Headers, trusted_proxies: Sequence[Network]
) -> str | None:
    """The client's address in its one form. None: the trusted proxy handed on both headers, and
    they tell different clients, so that one of them is the client's own word.

    A hop that hides itself (`unknown`, `_name`) or is no address ends the walk: the proxy that
    vouched for it stands for the client.
    """
    nearest = parse_address(peer or LOCAL_PEER)
    if nearest is None:
        return peer
    if not trusted_proxies or not _is_within(nearest, trusted_proxies):
        return str(nearest)
    found = list(headers)
    legacy, standard = _joined(found, b"x-forwarded-for"), _joined(found, b"forwarded")
    told = []
    if legacy is not None:
        told.append(_walk(nearest, _legacy_hops(legacy), trusted_proxies))
    if standard is not None:
        told.append(_walk(nearest, _standard_hops(standard), trusted_proxies))
    if len(set(told)) > 1:
        return None
    return str(told[0] if told else nearest)


def _walk(
    nearest: Address, hops: list[Address | None], trusted_proxies: Sequence[Network]
) -> Address:
    address = nearest
    while hops and _is_within(address, trusted_proxies):
        candidate = hops.pop()
        if candidate is None:
            break
        address = candidate
    return address


def _legacy_hops(value: str) -> list[Address | None]:
    """`X-Forwarded-For`: addresses with commas between, some proxies add a port."""
    return [_node(part.strip()) for part in value.split(",") if part.strip()]


def _standard_hops(value: str) -> list[Address | None]:
    """`Forwarded`: the `for` of each element; None for an element without a usable one. What
    cannot be read hides everything on its left. Source: RFC 7239, section 4."""
    hops: list[Address | None] = []
    current: Address | None = None
    position = 0
    while position < len(value):
        parameter = _PARAMETER.match(value, position)
        if parameter is not None:
            position = parameter.end()
            if parameter[1].lower() == "for":
                current = _node(_unquoted(parameter[2]))
        if position == len(value):
            break
        match value[position]:
            case ";":
                pass
            case ",":
                hops.append(current)
                current = None
            case _:
                # Not of this grammar: nothing up to here can be believed.
                position = _next_element(value, position)
                hops, current = [None], None
        position += 1
    return [*hops, current]


def _next_element(value: str, position: int) -> int:
    """Where the next comma stands, or the end."""
    found = value.find(",", position)
    return len(value) if found < 0 else found


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def _node(text: str) -> Address | None:
    """The address of a hop, without its port."""
    if "%" in text:
        return None
    found = _NODE.fullmatch(text)
    return parse_address(text if found is None else found["six"] or found["four"] or "")


def _joined(headers: Headers, wanted: bytes) -> str | None:
    """All lines of a header as one list, None without any."""
    values = [value for name, value in headers if name.lower() == wanted]
    return b",".join(values).decode("latin-1") if values else None


def _is_within(address: Address, networks: Sequence[Network]) -> bool:
    """No address of another family lies in a network."""
    return any(address in network for network in networks)
