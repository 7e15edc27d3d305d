"""A hostile DNS server and a receiver at every address of the world; see test_guard.py.

Run with a number of attempts, as root of a network namespace in which every IPv4 address is local
and 127.0.0.1 the only name server. Prints `name: number` lines.
"""

import ipaddress
import random
import socket
import ssl
import sys
import tempfile
from collections import Counter
from pathlib import Path

import trio
import trustme

from rdev.adapters.webhooks.dialling import tls_context
from rdev.adapters.webhooks.sender import HttpWebhookSender
from rdev.domain.sending import OutgoingRequest, SendFault
from rdev.domain.webhook_targets import TargetRules, parse_networks, parse_target

NAME = "hooks.rebinding.example"
OUTSIDE = ("93.184.216.34", "8.8.8.8")
INSIDE = ("127.0.0.1", "10.0.0.7", "169.254.169.254", "192.168.1.1", "100.64.0.1", "172.17.0.1")
INSIDE_V6 = ("::ffff:10.0.0.7", "::ffff:169.254.169.254", "::1", "64:ff9b::a00:7", "2002:a00:7::1")
A, AAAA = 1, 28
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


class HostileDns:
    """Answers each question with time to live 0 and, each time, something else."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked = 0

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            await udp.bind(("127.0.0.1", 53))
            task_status.started()
            while True:
                query, sender = await udp.recvfrom(512)
                await udp.sendto(self.answer(query), sender)

    def answer(self, query: bytes) -> bytes:
        self.asked += 1
        end = query.index(b"\0", 12) + 5
        addresses = self.draw(int.from_bytes(query[end - 4 : end - 2], "big"))
        head = query[:2] + b"\x81\x80\0\1" + len(addresses).to_bytes(2, "big") + bytes(4)
        return head + query[12:end] + b"".join(self.record(one) for one in addresses)

    def draw(self, kind: int) -> list[str]:
        pick = self.random.choice
        if kind == AAAA:
            return pick([[], [], [], [pick(INSIDE_V6)]])
        if kind != A:
            return []
        return pick(
            [[pick(OUTSIDE)], [pick(OUTSIDE)], [pick(INSIDE)], [pick(OUTSIDE), pick(INSIDE)]]
        )

    def record(self, text: str) -> bytes:
        packed = ipaddress.ip_address(text).packed
        kind = A if len(packed) == 4 else AAAA
        return (
            b"\xc0\x0c"
            + kind.to_bytes(2, "big")
            + b"\0\1"
            + bytes(4)
            + bytes([0, len(packed)])
            + packed
        )


class Everywhere:
    """A TLS receiver at port 443 of all addresses; counts where each connection arrived."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.arrived: Counter[str] = Counter()

    async def handle(self, stream: trio.SocketStream) -> None:
        self.arrived[stream.socket.getsockname()[0]] += 1
        secure = trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)
        try:
            await secure.receive_some(65_536)
            await secure.send_all(OK)
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(stream)

    @property
    def inside(self) -> int:
        return sum(count for host, count in self.arrived.items() if host not in OUTSIDE)


async def attempts(
    rules: TargetRules, tls: ssl.SSLContext, count: int
) -> Counter[SendFault | None]:
    sender = HttpWebhookSender(rules=rules, tls=tls, connect_s=30, total_s=60)
    request = OutgoingRequest(target=parse_target(f"https://{NAME}/"), headers={}, body=b"{}")
    return Counter([(await sender.send(request)).fault for _ in range(count)])


async def main(count: int) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(NAME).configure_cert(context)
    with tempfile.TemporaryDirectory() as folder:
        authority.cert_pem.write_to_path(Path(folder) / "ca.pem")
        tls = tls_context(Path(folder) / "ca.pem")
    receiver, dns = Everywhere(context), HostileDns(seed=20_261)
    async with trio.open_nursery() as nursery:
        await nursery.start(dns.serve)
        await nursery.start(trio.serve_tcp, receiver.handle, 443)
        faults = await attempts(TargetRules(), tls, count)
        told = {
            "attempts": faults.total(),
            "accepted": faults[None],
            "denied": faults[SendFault.DENIED],
            "questions": dns.asked,
            "inside": receiver.inside,
            "outside": receiver.arrived.total(),
        }
        await attempts(TargetRules(allow_nets=parse_networks("0.0.0.0/0, ::/0")), tls, count // 20)
        told["inside unguarded"] = receiver.inside
        print("\n".join(f"{name}: {number}" for name, number in told.items()))
        nursery.cancel_scope.cancel()


trio.run(main, int(sys.argv[1]))
