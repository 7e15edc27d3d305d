"""Where a webhook may go: how its URL is read, and which addresses may be dialled for it.

Owns the one spelling of a URL that is taken and the table of addresses that are refused. Nothing
here resolves a name: `TargetRules.check` judges what a URL alone tells, `TargetRules.judge` what
its name resolved to, and whoever connects dials only what was judged (adapters/webhooks/).
The table is our own: what `ipaddress` calls global differs between patch releases of Python, and
holds multicast, NAT64 and 6to4.
Source: the IANA special-purpose address registries of IPv4 and IPv6; RFC 3986; RFC 6052; RFC 4380.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from rdev.domain.errors import Fault, RdevError, bad_request

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

URL_CHARACTERS_MAX = 2_048
DEFAULT_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A URL that was read by `parse_target`; nothing is said about where its name leads.

    `host` is lower-case ASCII: a name without a trailing dot, or a literal without brackets;
    `address` is the literal's, None for a name; `path` begins with `/` and holds the query.
    """

    scheme: str
    host: str
    port: int
    path: str
    address: Address | None

    @property
    def authority(self) -> str:
        """What the `Host` header says: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL in its one spelling."""
        return f"{self.scheme}://{self.authority}{self.path}"


# Only ASCII: what else is meant, the writer of the URL spells out (`xn--…`, `%C3%A4`).
_URL = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]+))?")
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# The last label of what resolvers read as a number, whatever stands before it (`127.1`, `0x7f.1`).
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def parse_target(url: str) -> Target:
    """Read a URL of `http` or `https` in its one spelling.

    Refused: userinfo, fragments, characters outside of RFC 3986, hosts that are not ASCII, trailing
    dots, numbers that only some resolvers read as addresses, literals in another form than RFC
    5952's, zone ids. Case is folded; the scheme's own port may be written.
    Errors: BAD_REQUEST at `/url`.
    """
    if len(url) > URL_CHARACTERS_MAX:
        raise _refused(f"must have at most {URL_CHARACTERS_MAX} characters")
    if (parts := _URL.fullmatch(url)) is None:
        raise _refused("must begin with https:// (or http://, to an allowed network)")
    scheme, authority, path = parts[1].lower(), parts[2], parts[3]
    if "@" in authority:
        raise _refused("must not hold a user or a password")
    if "#" in path:
        raise _refused("must not hold a fragment")
    if _PATH.fullmatch(path) is None:
        raise _refused("holds a character that must be percent-encoded")
    if (found := _AUTHORITY.fullmatch(authority)) is None:
        raise _refused("must hold a host, and may hold a port behind it")
    host, address = _read_host(found[1].lower())
    return Target(
        scheme=scheme,
        host=host,
        port=_read_port(found[2], scheme),
        path=path if path.startswith("/") else f"/{path}",
        address=address,
    )


def _read_port(text: str | None, scheme: str) -> int:
    if text is None:
        return DEFAULT_PORTS[scheme]
    if _PORT.fullmatch(text) is None or int(text) > 65_535:
        raise _refused("the port must be a number from 1 to 65535")
    return int(text)


def _read_host(text: str) -> tuple[str, Address | None]:
    if text.startswith("["):
        return _read_literal_v6(text[1:-1])
    if not text.isascii():
        raise _refused("the host must be ASCII; write an international name as xn--…")
    labels = text.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _read_literal_v4(text)
    if text.endswith("."):
        raise _refused("the host must not end with a dot")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refused("the host is no name of letters, digits, hyphens and dots")
    return text, None


def _read_literal_v4(text: str) -> tuple[str, Address]:
    try:
        return text, IPv4Address(text)
    except ValueError:
        raise _refused("the host is a number that is no IPv4 address of four decimals") from None


def _read_literal_v6(text: str) -> tuple[str, Address]:
    try:
        address = IPv6Address(text)
    except ValueError:
        raise _refused("the host is no IPv6 address") from None
    if address.scope_id is not None or str(address) != text:
        raise _refused("the IPv6 address must be written in its shortest form, without a zone")
    return text, address


def _refused(message: str) -> RdevError:
    return bad_request([Fault(pointer="/url", message=message)])


def _table(*rows: tuple[str, str]) -> tuple[tuple[Network, str], ...]:
    return tuple((ip_network(net), why) for nets, why in rows for net in nets.split())


# What no setting opens: nobody answers webhooks there, or the address is another one in disguise.
_NEVER = _table(
    ("0.0.0.0/8 ::/128", "unspecified"),
    ("224.0.0.0/4 ff00::/8", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("::ffff:0:0/96", "an IPv4 address mapped into IPv6"),
)

# What only RDEV_WEBHOOK_ALLOW_NETS opens; the first row that matches names the reason.
_DENIED = _table(
    ("127.0.0.0/8 ::1/128", "loopback"),
    ("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10", "private"),
    ("169.254.0.0/16 fe80::/10", "link-local"),
    ("100.64.0.0/10", "shared by carriers (CGNAT)"),
    ("192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20", "for documentation"),
    ("198.18.0.0/15 2001:2::/48", "for benchmarks"),
    ("64:ff9b::/96 64:ff9b:1::/48", "translated by NAT64"),
    ("192.88.99.0/24 2002::/16", "6to4"),
    ("2001::/32", "Teredo"),
    ("192.0.0.0/24 2001::/23", "for protocols"),
    ("192.31.196.0/24 192.52.193.0/24 192.175.48.0/24 2620:4f:8000::/48", "for AS112 or AMT"),
    # A public address that Azure answers on every machine: its metadata and agent host.
    ("168.63.129.16/32", "a cloud's own"),
    ("240.0.0.0/4", "reserved"),
)
_GLOBAL_V6 = IPv6Network("2000::/3")

# Where an address of IPv6 carries one of IPv4, and how many bits stand behind that.
_CARRIERS: tuple[tuple[IPv6Network, int], ...] = (
    (IPv6Network("::/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("64:ff9b:1::/48"), 0),
    (IPv6Network("2002::/16"), 80),
)
_TEREDO = IPv6Network("2001::/32")
# ISATAP: 32 bits in the middle of the interface id, with the local and the universal bit.
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """What the operator decided: ports for everybody, networks opened and closed.

    An address in `allow_nets` may be dialled at any port, with http too, also where the table or
    `deny_nets` refuses it; what it carries of IPv4 is judged as well. `deny_nets` are for addresses
    that look public and are not: nodes, pods and services of the cluster.
    """

    ports: frozenset[int] = frozenset((443, 8443))
    allow_nets: tuple[Network, ...] = ()
    deny_nets: tuple[Network, ...] = ()

    def check(self, target: Target) -> None:
        """Refuse what can be refused before a name is resolved. Errors: BAD_REQUEST at `/url`."""
        if target.address is not None:
            reason = self.judge(target, [target.address])
        else:
            reason = None if self.allow_nets else self._unlisted(target)
        if reason is not None:
            raise _refused(reason)

    def judge(self, target: Target, addresses: Sequence[Address]) -> str | None:
        """Why none of `addresses` may be dialled for the target; None where each one may.

        One refused address refuses all: a name that leads inside and outside is no honest mistake
        often enough. The reason names the kind of an address, never the address.
        Errors: ValueError without an address.
        """
        if not addresses:
            raise ValueError("nothing to judge")
        for address in addresses:
            if (reason := self.refusal(address)) is not None:
                return f"the host's address is {reason}"
        if all(_within(address, self.allow_nets) for address in addresses):
            return None
        return self._unlisted(target)

    def refusal(self, address: Address) -> str | None:
        """Why this address may not be dialled at any port; None where it may."""
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            return "of one link only"
        if (reason := _reason(address, _NEVER)) is not None:
            return reason
        if _within(address, self.allow_nets):
            carried = _carried(address)
            return None if carried is None else self.refusal(carried)
        if _within(address, self.deny_nets):
            return "closed by RDEV_WEBHOOK_DENY_NETS"
        return _reason(address, _DENIED) or _reason_v6(address)

    def _unlisted(self, target: Target) -> str | None:
        """Why the scheme and port are not for everybody."""
        if target.scheme != "https":
            return "http is for networks in RDEV_WEBHOOK_ALLOW_NETS only"
        if target.port not in self.ports:
            ports = ", ".join(str(port) for port in sorted(self.ports))
            return f"the port must be one of {ports}"
        return None


def _within(address: Address, nets: Iterable[Network]) -> bool:
    return any(address in net for net in nets)


def _reason(address: Address, table: Iterable[tuple[Network, str]]) -> str | None:
    return next((why for net, why in table if address in net), None)


def _reason_v6(address: Address) -> str | None:
    """What no row of the table says: of IPv6, only a part is in use at all."""
    if isinstance(address, IPv4Address):
        return None
    if address not in _GLOBAL_V6:
        return "not one of the global IPv6 addresses"
    return None if _carried(address) is None else "an IPv4 address carried in IPv6"


def _carried(address: Address) -> IPv4Address | None:
    """The IPv4 address that a tunnel or a translator would send this one's packets to."""
    if isinstance(address, IPv4Address):
        return None
    number = int(address)
    if number <= 1:  # unspecified and loopback carry nothing
        return None
    for net, behind in _CARRIERS:
        if address in net:
            return IPv4Address(number >> behind & 0xFFFF_FFFF)
    if address in _TEREDO:
        return IPv4Address(~number & 0xFFFF_FFFF)
    if number >> 32 & 0xFFFF_FFFF in _ISATAP:
        return IPv4Address(number & 0xFFFF_FFFF)
    return None


def parse_networks(text: str) -> tuple[Network, ...]:
    """CIDRs separated by commas; empty text is none. Errors: ValueError, also for host bits."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def parse_address(text: str) -> Address:
    """An address as a resolver gives it, a zone id included. Errors: ValueError."""
    return ip_address(text)
