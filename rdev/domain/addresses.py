"""IP addresses and networks as they are written, in one form each.

An IPv4 address written as IPv6 (`::ffff:192.0.2.1`, what a dual-stack socket tells) is the IPv4
address: otherwise an allow-list of one form would not hold for the other.
"""

from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_MAPPED = IPv6Network("::ffff:0:0/96")


def parse_address(text: str) -> Address | None:
    """The address, without a zone (`%eth0`) and folded to IPv4 where it is one; None for no
    address."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def parse_network(text: str) -> Network:
    """A CIDR, or an address alone; folded like addresses. Errors: ValueError with a sentence."""
    try:
        found = ip_network(text)
    except ValueError:
        raise ValueError(_what_is_wrong(text)) from None
    if "%" in text:
        raise ValueError("must not name a zone")
    if isinstance(found, IPv6Network) and found.subnet_of(_MAPPED):
        inner = int(found.network_address) & 0xFFFF_FFFF
        return IPv4Network((inner, found.prefixlen - 96))
    return found


def joined(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The same addresses in as few networks as there can be, IPv4 first, in order."""
    given = list(networks)
    four = collapse_addresses(n for n in given if isinstance(n, IPv4Network))
    six = collapse_addresses(n for n in given if isinstance(n, IPv6Network))
    return (*four, *six)


def _what_is_wrong(text: str) -> str:
    try:
        meant = ip_network(text, strict=False)
    except ValueError:
        return "must be an IP address or a CIDR, like 10.0.0.0/8 or 2001:db8::/32"
    return f"has bits set after its prefix; {meant} is the network"
