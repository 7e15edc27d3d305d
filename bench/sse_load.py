"""Thousands of SSE clients in a process of their own, which looks at every id.

`python -m bench.sse_load` reads one JSON line (`Plan`), connects, prints a line when every client
has its first bytes, receives, and prints what it found. While the clock runs it only collects; ids
are looked at afterwards. One thread, one epoll: it must cost less than the server it measures; it
says what it cost.
"""

import json
import re
import select
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# More, and each call would map and unmap its buffer.
RECEIVE_BYTES = 1 << 16
# How often it looks before it sleeps, some 50 µs in all: the core of a server that sends one event
# at a time would pay for waking it, for each.
LOOKS = 100
# Nothing came for so long: what is missing will not come.
SILENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`clients` connections, dealt to the `paths` in turn, at most `at_once` being opened. Each is
    to receive `events`, whose numbers follow `marker` (0: they are only opened). The first
    `stalled` of them never read. With `stamps` (a pattern) the events carry the monotonic time in
    ns of their making."""

    port: int
    paths: list[str]
    clients: int
    headers: dict[str, str] = field(default_factory=dict)
    events: int = 0
    marker: str = "\nid: "
    at_once: int = 128
    stalled: int = 0
    stamps: str = ""


@dataclass(slots=True, kw_only=True)
class Client:
    """One connection and what came over it."""

    socket: socket.socket
    path: str
    received: list[bytes] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    has_ended: bool = False
    # Pieces that were looked at, the events in them, and the end of the last.
    looked_at: int = 0
    count: int = 0
    edge: bytes = b""


class Load:
    """The clients and their one epoll."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}
        self.stalled: list[Client] = []
        self._whole: set[int] = set()
        self.began_s = self.connected_s = self.last_s = 0.0

    def connect(self) -> None:
        """Open every connection and wait for the first bytes of its body."""
        plan = self.plan
        self.began_s = time.perf_counter()
        opened, waiting = 0, 0
        heads: set[int] = set()
        while opened < plan.clients or waiting:
            while opened < plan.clients and waiting < plan.at_once:
                heads.add(self._open(plan.paths[opened % len(plan.paths)]))
                opened += 1
                waiting += 1
            for number, _ in self._epoll.poll(SILENCE_S) or _silence("connecting"):
                client = self._clients[number]
                data = client.socket.recv(RECEIVE_BYTES)
                if not data and number in heads:
                    raise RuntimeError(f"{client.path}: closed while connecting")
                if not data:
                    self._epoll.unregister(number)  # its stream has ended already
                    continue
                client.received.append(data)
                self.last_s = time.perf_counter()
                if number in heads and b"\r\n\r\n" in (whole := b"".join(client.received)):
                    if not whole.startswith(b"HTTP/1.1 200 "):
                        raise RuntimeError(f"refused: {whole[:300]!r}")
                    heads.remove(number)
                    waiting -= 1
        self.connected_s = time.perf_counter() - self.began_s
        for number in list(self._clients)[: plan.stalled]:
            self._epoll.unregister(number)
            self.stalled.append(self._clients.pop(number))

    def receive(self) -> float:
        """Receive until everybody has all events; how long it took from the first to the last.

        What came is looked at when nothing more is there: looking at each event as it comes cost
        the client more than rdev takes to send it, and then it is the client that is measured.
        Errors: RuntimeError where a server closed before all events.
        """
        clients, poll, clock = self._clients, self._epoll.poll, time.monotonic_ns
        has_stamps = bool(self.plan.stamps)
        fresh = set(clients)
        first_s = 0.0
        while (missing := self._missing(fresh)) > 0:
            fresh = set()
            ready = poll(SILENCE_S) or _silence(f"{missing} events missing")
            first_s = first_s or time.perf_counter()
            while ready:
                for number, _ in ready:
                    client = clients[number]
                    data = client.socket.recv(RECEIVE_BYTES)
                    if not data:
                        self._epoll.unregister(number)
                        client.has_ended = True
                    client.received.append(data)
                    if has_stamps:
                        client.times_ns.append(clock())
                    fresh.add(number)
                self.last_s = time.perf_counter()
                for _ in range(LOOKS):
                    if ready := poll(0):
                        break
        return self.last_s - first_s

    def _missing(self, fresh: Iterable[int]) -> int:
        """How many events are still to come, now that these have received something."""
        marker, events = self.plan.marker.encode(), self.plan.events
        for number in fresh:
            client = self._clients[number]
            _count(client, marker)
            if client.has_ended and client.count < events:
                raise RuntimeError(f"{client.path}: cut after {client.count} events")
            if client.count >= events:
                self._whole.add(number)
        short = self._clients.keys() - self._whole
        return sum(events - self._clients[number].count for number in short)

    def check(self) -> int:
        """Look at every number: no hole, none twice. Errors: RuntimeError."""
        pattern = re.compile(re.escape(self.plan.marker.encode()) + rb"(\d+)")
        checked = 0
        for client in self._clients.values():
            numbers = [int(number) for number in pattern.findall(b"".join(client.received))]
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                raise RuntimeError(f"{client.path}: holes or doubles in {numbers[:20]} …")
            if len(numbers) < self.plan.events:
                raise RuntimeError(f"{client.path}: {len(numbers)} of {self.plan.events} events")
            checked += len(numbers)
        return checked

    def latencies_ms(self) -> list[float]:
        """Of each event with a stamp: from its making to its arrival."""
        pattern = re.compile(self.plan.stamps.encode())
        found = []
        for client in self._clients.values():
            arrivals = client.received[len(client.received) - len(client.times_ns) :]
            rest = b""
            for data, at_ns in zip(arrivals, client.times_ns, strict=True):
                data = rest + data
                end = data.rfind(b"\n\n") + 1
                found += [(at_ns - int(made)) / 1e6 for made in pattern.findall(data[:end])]
                rest = data[end:]
        return sorted(found)

    def _open(self, path: str) -> int:
        opened = socket.create_connection(("127.0.0.1", self.plan.port))
        if self.plan.stalled > len(self._clients):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        lines = [f"GET {path} HTTP/1.1", "Host: bench", "Accept: text/event-stream"]
        lines += [f"{name}: {value}" for name, value in self.plan.headers.items()]
        opened.sendall("\r\n".join([*lines, "", ""]).encode())
        opened.setblocking(False)
        self._clients[opened.fileno()] = Client(socket=opened, path=path)
        self._epoll.register(opened.fileno(), select.EPOLLIN)
        return opened.fileno()


def _count(client: Client, marker: bytes) -> None:
    """Count the markers in what came since the last time, one that began before included."""
    data = client.edge + b"".join(client.received[client.looked_at :])
    client.looked_at = len(client.received)
    client.count += data.count(marker)
    client.edge = data[1 - len(marker) :]


def _silence(what: str) -> Iterator[tuple[int, int]]:
    raise RuntimeError(f"nothing came for {SILENCE_S:g} s: {what}")


def main() -> None:
    """One plan from stdin; each later line takes a step: `receive`, then the end."""
    plan = Plan(**json.loads(sys.stdin.readline()))
    load = Load(plan)
    load.connect()
    told: dict[str, float | list[float]] = {"connects_per_s": plan.clients / load.connected_s}
    print(json.dumps(told), flush=True)
    if plan.events:
        cpu_began_s = time.process_time()
        took_s = load.receive()
        cpu_s = time.process_time() - cpu_began_s
        checked = load.check()
        told = {"events": checked, "took_s": took_s, "client_cpu_s": cpu_s}
        told["since_connect_s"] = load.last_s - load.began_s
        if plan.stamps:
            latencies = load.latencies_ms()
            at = {"p50_ms": 50, "p99_ms": 99, "p100_ms": 100}
            told |= {n: latencies[-(-len(latencies) * p // 100) - 1] for n, p in at.items()}
        print(json.dumps(told), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
