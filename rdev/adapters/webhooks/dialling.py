"""Connections to receivers: the name is resolved once, every address judged, a judged one dialled.

Nobody else in rdev opens a connection to an address that a client chose. The name is used for two
things after its resolution: TLS (SNI and the certificate's check) and, above, the `Host` header.
Bounds: `connect_s` for name, connection and handshake together; `RESOLVING_MAX` threads in names
that do not resolve; `DIALLED_MAX` addresses of one name.
"""

import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

import trio

from rdev.adapters.webhooks.stream import BoundedStream
from rdev.domain.sending import SendFault
from rdev.domain.webhook_targets import Address, Target, TargetRules, parse_address

# A resolver's answer for a name: at least one address, in the order to try. Errors: OSError.
Resolve = Callable[[str], Awaitable[Sequence[Address]]]

# Each holds a thread until the system's resolver gives up (with glibc 10 s and more), also when the
# attempt that asked is over. Apart from trio's own threads, which the server needs.
RESOLVING_MAX = 32
DIALLED_MAX = 4
# What the kernel takes from a receiver that sends without end, while nobody reads.
RECEIVE_BUFFER_BYTES = 65_536


class SendFailedError(Exception):
    """No answer: the fault, and a clause for the endpoint's owner."""

    def __init__(self, fault: SendFault, detail: str) -> None:
        """Keep both."""
        super().__init__(detail)
        self.fault = fault
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialled:
    """A connection to a judged address, and the protocol agreed on in its handshake."""

    stream: BoundedStream
    address: Address
    speaks_h2: bool


def tls_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """The system's certificate authorities, and those of a PEM file beside them; TLS ≥ 1.2.

    Errors: OSError for a file that cannot be read, ssl.SSLError for one that holds none.
    """
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


class SystemResolver:
    """The system's own resolution (files, DNS, search domains), in threads of its own bound."""

    def __init__(self) -> None:
        """Start nothing."""
        self._threads = trio.CapacityLimiter(RESOLVING_MAX)

    async def __call__(self, host: str) -> list[Address]:
        """All addresses of a name, in the system's order. Errors: OSError. Cancellation: the
        thread is left behind and keeps its place until the system answers."""
        found = await trio.to_thread.run_sync(
            _getaddrinfo, host, abandon_on_cancel=True, limiter=self._threads
        )
        return list(dict.fromkeys(parse_address(text) for text in found))


def _getaddrinfo(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class Dialler:
    """Opens connections for targets, by the operator's rules."""

    def __init__(
        self, *, rules: TargetRules, resolve: Resolve, tls: ssl.SSLContext, connect_s: float
    ) -> None:
        """Keep the parts; connects to nothing."""
        self._rules = rules
        self._resolve = resolve
        self._tls = tls
        self._connect_s = connect_s

    async def dial(self, target: Target) -> Dialled:
        """A connection to one of the target's addresses, all of which were judged.

        Errors: SendFailedError with DNS, DENIED, REFUSED, TLS or TIMEOUT.
        Cancellation: leaves no connection. Blocks: at most `connect_s`.
        """
        try:
            with trio.fail_after(self._connect_s):
                addresses = await self._judged(target)
                address, tcp = await self._connect(addresses, target.port)
                if target.scheme == "https":
                    return await self._handshake(tcp, address, target.host)
                return Dialled(stream=BoundedStream(tcp), address=address, speaks_h2=False)
        except trio.TooSlowError:
            detail = f"no connection within {self._connect_s:g} s"
            raise SendFailedError(SendFault.TIMEOUT, detail) from None

    async def _judged(self, target: Target) -> Sequence[Address]:
        addresses: Sequence[Address]
        if target.address is not None:
            addresses = [target.address]
        else:
            try:
                addresses = await self._resolve(target.host)
            except OSError as error:
                detail = f"the name does not resolve: {error.strerror or error}"
                raise SendFailedError(SendFault.DNS, detail) from error
        if not addresses:
            raise SendFailedError(SendFault.DNS, "the name has no address")
        if (reason := self._rules.judge(target, addresses)) is not None:
            raise SendFailedError(SendFault.DENIED, reason)
        return addresses

    async def _connect(
        self, addresses: Sequence[Address], port: int
    ) -> tuple[Address, trio.SocketStream]:
        """The first that answers, each tried for its share of the time that is left."""
        tried = addresses[:DIALLED_MAX]
        last = OSError(errno.ETIMEDOUT, "")
        for place, address in enumerate(tried):
            left_s = trio.current_effective_deadline() - trio.current_time()
            with trio.move_on_after(max(0, left_s) / (len(tried) - place)):
                try:
                    return address, await _connect(address, port)
                except OSError as error:
                    last = error
        fault = SendFault.TIMEOUT if last.errno == errno.ETIMEDOUT else SendFault.REFUSED
        # The error's own words hold the address.
        raise SendFailedError(fault, f"no connection: {os.strerror(last.errno or 0)}") from last

    async def _handshake(self, tcp: trio.SocketStream, address: Address, host: str) -> Dialled:
        stream = trio.SSLStream(tcp, self._tls, server_hostname=host, https_compatible=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            tcp.socket.close()
            raise SendFailedError(SendFault.TLS, _tls_detail(error.__cause__)) from error
        except BaseException:
            tcp.socket.close()
            raise
        speaks_h2 = stream.selected_alpn_protocol() == "h2"
        return Dialled(stream=BoundedStream(stream), address=address, speaks_h2=speaks_h2)


async def _connect(address: Address, port: int) -> trio.SocketStream:
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    tcp = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        # The literal: nothing is resolved a second time.
        await tcp.connect((str(address), port))
    except BaseException:
        tcp.close()
        raise
    return trio.SocketStream(tcp)


def _tls_detail(cause: BaseException | None) -> str:
    match cause:
        case ssl.SSLCertVerificationError():
            return f"the certificate is refused: {cause.verify_message}"
        case ssl.SSLError():
            return f"no TLS handshake: {cause.reason or 'not TLS'}"
        case _:
            return "the connection ended in the TLS handshake"
