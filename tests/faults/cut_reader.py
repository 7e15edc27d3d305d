"""Clients that are cut: one connection after another, to one server or the other.

Owns the sockets, what is cut how and when, and the reading of the wire; `cut_truth` judges what
came. Bounded by what a connection may hear (`Cut`) and by `PATIENCE_S` for what must come.
"""

import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

import trio

from tests.app.server import Server
from tests.faults.cut_truth import Faults, Seen

# For what takes milliseconds: only what hangs meets it.
PATIENCE_S = 30.0
RECEIVE_BYTES = 65_536
SMALL_BUFFER_BYTES = 4_096
PAUSE_S = 0.05
_NUMBERED = re.compile(rb"(?:retry: \d+\n)?(?:id: (\d+)\n)?event: (\w+)\ndata: (.*)", re.DOTALL)


class CutKind(StrEnum):
    """How a connection ends before its stream does. The first six are the client's."""

    CLOSE = "close"  # FIN, or RST where something was left unread
    RESET = "reset"  # RST at once
    HALF_CLOSE = "half_close"  # FIN, and it reads on until the server closes
    HALF_OPEN = "half_open"  # it forgets the connection, which stays open and unread
    SLOW = "slow"  # it reads a little now and then, and closes
    STALL = "stall"  # it reads nothing for a while, then on
    SLOW_CONSUMER = "slow_consumer"  # the server cut it because it read nothing
    DRAINED = "drained"  # the server stopped and said so
    BROKEN = "broken"  # the server died, or closed without a word


CLIENTS_OWN = {
    CutKind.CLOSE: 30,
    CutKind.RESET: 25,
    CutKind.HALF_CLOSE: 12,
    CutKind.HALF_OPEN: 10,
    CutKind.SLOW: 10,
    CutKind.STALL: 13,
}
SMALL = (CutKind.SLOW, CutKind.STALL)


@dataclass(slots=True)
class CutTally:
    """The sums of a run, and of all runs of a session."""

    cuts: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    faults: Faults = field(default_factory=Faults)

    def add(self, other: "CutTally") -> None:
        """Count what another one counted."""
        self.cuts += other.cuts
        self.troubles += other.troubles
        self.counts += other.counts
        self.faults.lost += other.faults.lost
        self.faults.twice += other.faults.twice
        self.faults.wrong += other.faults.wrong
        self.faults.found += other.faults.found

    def render(self) -> list[str]:
        """The ledger, line by line."""
        faults = self.faults
        return [
            f"cuts            {self.cuts.total()} of {len(self.cuts)} kinds",
            *(f"  {count:6} {kind}" for kind, count in sorted(self.cuts.items())),
            f"servers         {', '.join(f'{n} × {name}' for name, n in self.troubles.items())}",
            *(f"{name:15} {count}" for name, count in sorted(self.counts.items())),
            f"lost            {faults.lost}",
            f"twice           {faults.twice}",
            f"wrong           {faults.wrong}",
            *faults.found,
        ]


@dataclass(slots=True, kw_only=True)
class Replica:
    """One of the servers; `port` is None while nobody listens."""

    name: str
    server: Server
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What becomes of a connection after so many bytes or seconds, whichever is first; without a
    kind nothing does."""

    kind: CutKind | None
    after_bytes: int
    after_s: float
    stall_s: float


class EndedError(Exception):
    """The connection is over; `clean` where the body came to its end."""

    def __init__(self, *, clean: bool) -> None:
        super().__init__()
        self.clean = clean


class WireError(Exception):
    """What came is no stream of events as RFC 9112 and the HTML standard have it."""


class Wire:
    """One answer, read byte by byte as RFC 9112 and the HTML standard say.

    There is no CR in what rdev sends as a stream, so an event ends at an empty line and nowhere
    else. An event that has not ended is no event.
    """

    def __init__(self) -> None:
        self.status = 0
        self.head = b""
        self._raw = bytearray()
        self._text = bytearray()
        self._chunk_left = 0

    def feed(self, data: bytes) -> list[tuple[str, int | None, bytes]]:
        """What came; the events that ended in it. Errors: EndedError after its end, WireError."""
        self._raw += data
        if not self.status and not self._read_head():
            return []
        if self.status != 200:
            raise EndedError(clean=True)
        ended = self._read_chunks()
        *blocks, rest = bytes(self._text).split(b"\n\n")
        self._text = bytearray(rest)
        events = [_event(block) for block in blocks]
        if ended and not events:
            if rest:
                raise WireError(f"the stream ended inside an event: {rest[:100]!r}")
            raise EndedError(clean=True)
        return events

    def _read_head(self) -> bool:
        head, separator, rest = bytes(self._raw).partition(b"\r\n\r\n")
        if separator:
            self.head, self._raw = head, bytearray(rest)
            self.status = int(head.split(b" ", 2)[1])
        return bool(separator)

    def _read_chunks(self) -> bool:
        """Take the transfer coding off; whether the last chunk came."""
        if b"transfer-encoding: chunked" not in self.head.lower():
            raise WireError(f"not chunked: {self.head!r}")
        while self._raw:
            if self._chunk_left > 2:
                part = self._raw[: self._chunk_left - 2]
                self._text += part
                del self._raw[: len(part)]
                self._chunk_left -= len(part)
                continue
            if self._chunk_left:
                if len(self._raw) < 2:
                    return False
                if self._raw[:2] != b"\r\n":
                    raise WireError(f"a chunk ends in {bytes(self._raw[:20])!r}")
                del self._raw[:2]
                self._chunk_left = 0
                continue
            size, separator, _ = self._raw.partition(b"\r\n")
            if not separator:
                return False
            if not re.fullmatch(rb"[0-9a-f]+", size):
                raise WireError(f"a chunk has the size {bytes(size[:20])!r}")
            if int(size, 16) == 0:
                return True
            self._chunk_left = int(size, 16) + 2
            del self._raw[: len(size) + 2]
        return False


def _event(block: bytes) -> tuple[str, int | None, bytes]:
    found = _NUMBERED.fullmatch(block)
    if not found or b"\r" in block:
        raise WireError(f"no event of rdev: {block[:200]!r}")
    number, name, data = found.groups()
    return name.decode(), None if number is None else int(number), data


class Client:
    """One client of one command, through all its cuts."""

    def __init__(
        self,
        *,
        seen: Seen,
        path: str,
        replicas: tuple[Replica, Replica],
        chance: Random,
        tally: CutTally,
        nursery: trio.Nursery,
    ) -> None:
        """`nursery` keeps the connections that it forgets."""
        self.seen = seen
        # Its output was pruned: there is nothing more to see.
        self.is_gone = False
        self._path = path
        self._replicas = replicas
        self._chance = chance
        self._tally = tally
        self._nursery = nursery
        self._last_port: int | None = None
        self._farewell = ""

    async def follow(self, *, calm: "trio.Event") -> None:
        """See the command to its end. Once `calm` is set nothing is cut any more."""
        while not self.seen.is_complete and not self.is_gone:
            replica = self._chance.choice(self._replicas)
            port = replica.port
            if port is None:
                await trio.sleep(PAUSE_S)
                continue
            self._tally.counts["replica switches"] += self._last_port not in (None, port)
            self._last_port = port
            try:
                await self._connect(replica, port, self._draw(calm.is_set()))
            except OSError:
                self._tally.counts["refused"] += 1  # it is not there at the moment
                await trio.sleep(PAUSE_S)

    def _draw(self, calm: bool) -> Cut:
        kinds = list(CLIENTS_OWN)
        kind = self._chance.choices(kinds, list(CLIENTS_OWN.values()))[0]
        return Cut(
            kind=None if calm else kind,
            # As often some bytes of a head as some thousand events.
            after_bytes=int(2 ** self._chance.uniform(0, 18)),
            after_s=self._chance.expovariate(1.0),
            stall_s=self._chance.uniform(0, 4),
        )

    async def _connect(self, replica: Replica, port: int, cut: Cut) -> None:
        """One connection to its end, counted by how it ended."""
        self._farewell = ""
        with trio.socket.socket() as connection:
            if cut.kind in SMALL:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            await connection.connect(("127.0.0.1", port))
            self._tally.counts["connections"] += 1
            await connection.send(self._request(replica))
            wire = Wire()
            try:
                await self._listen(connection, wire, cut)
                await self._cut(connection, wire, cut)
            except EndedError as end:
                await self._ended(wire, replica, port, clean=end.clean)
            except ConnectionError:
                await self._ended(wire, replica, port, clean=False)
            except WireError as error:
                self._wrong(str(error))

    def _request(self, replica: Replica) -> bytes:
        by_header = self._chance.random() < 0.5
        query = (
            "" if by_header else f"{'&' if '?' in self._path else '?'}after={self.seen.last_seq}"
        )
        lines = [
            f"GET {self._path}{query} HTTP/1.1",
            "Host: cuts",
            f"Authorization: Bearer {replica.server.key}",
            *([f"Last-Event-ID: {self.seen.last_seq}"] if by_header else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode()

    async def _listen(self, connection: trio.socket.SocketType, wire: Wire, cut: Cut) -> None:
        """Hear what comes until it is to be cut. Errors: EndedError, ConnectionError."""
        left = cut.after_bytes if cut.kind else 1 << 60
        with trio.move_on_after(cut.after_s if cut.kind else PATIENCE_S):
            while left > 0:
                left -= await self._receive(connection, wire, min(left, RECEIVE_BYTES))
                if cut.kind is CutKind.SLOW:
                    await trio.sleep(self._chance.uniform(0, 0.02))

    async def _receive(
        self, connection: trio.socket.SocketType, wire: Wire, most_bytes: int
    ) -> int:
        """One piece of what comes. Errors: EndedError, ConnectionError."""
        data = await connection.recv(most_bytes)
        if not data:
            raise EndedError(clean=False)
        for name, seq, told in wire.feed(data):
            if seq is not None:
                self._tally.counts["events seen"] += 1
                self.seen.take(name, seq, told)
            elif name in ("disconnecting", "error"):
                self._farewell = told.decode()
            elif name not in ("connected", "heartbeat"):
                raise WireError(f"{name} has no number")
        wire.feed(b"")
        return len(data)

    async def _cut(self, connection: trio.socket.SocketType, wire: Wire, cut: Cut) -> None:
        """Cut it. Errors: EndedError, ConnectionError."""
        if cut.kind is None:
            self._wrong(f"nothing came after {self.seen.last_seq} for {PATIENCE_S:g} s")
            return
        if cut.kind is CutKind.STALL:
            await trio.sleep(cut.stall_s)
            await self._listen(
                connection,
                wire,
                Cut(kind=CutKind.CLOSE, after_bytes=1 << 20, after_s=0.5, stall_s=0),
            )
        if self.seen.is_complete:
            return
        self._tally.cuts[cut.kind] += 1
        if cut.kind is CutKind.RESET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif cut.kind is CutKind.HALF_OPEN:
            forgotten = trio.socket.from_stdlib_socket(socket.socket(fileno=connection.detach()))
            self._nursery.start_soon(_forget, forgotten, self._chance.uniform(0, 5))
        elif cut.kind is CutKind.HALF_CLOSE:
            await self._close_half(connection, wire)

    async def _close_half(self, connection: trio.socket.SocketType, wire: Wire) -> None:
        """What is on its way still counts, and the server closes."""
        connection.shutdown(socket.SHUT_WR)
        try:
            with trio.fail_after(PATIENCE_S):
                while True:
                    await self._receive(connection, wire, RECEIVE_BYTES)
        except (EndedError, ConnectionError):
            pass  # counted already
        except trio.TooSlowError:
            self._wrong("the server did not close a connection that its client has closed")

    async def _ended(self, wire: Wire, replica: Replica, port: int, *, clean: bool) -> None:
        """The server ended it: was that right, and what does it mean for the client?"""
        if self.seen.is_complete:
            return
        if wire.status not in (0, 200):
            await self._refused(wire, replica, port)
        elif "slow_consumer" in self._farewell:
            self._tally.cuts[CutKind.SLOW_CONSUMER] += 1
        elif "draining" in self._farewell:
            self._tally.cuts[CutKind.DRAINED] += 1
        elif self.seen.truth.is_aged and "GONE" in self._farewell:
            self._tally.counts["ended by a prune"] += 1
        elif clean:
            self._wrong(f"the stream ended before its end: {self._farewell}")
        else:
            self._tally.cuts[CutKind.BROKEN] += 1

    async def _refused(self, wire: Wire, replica: Replica, port: int) -> None:
        """1. Not now. 2. What was pruned. 3. Somebody else has the port of a server that died."""
        if wire.status == 503:
            self._tally.counts["503"] += 1
            await trio.sleep(PAUSE_S)
        elif wire.status == 410 and self.seen.truth.is_aged:
            self._tally.counts["410 explained"] += 1
            self.is_gone = True
        elif replica.port == port:
            self._wrong(f"{wire.status} after {self.seen.last_seq}: {wire.head!r}")
            self.is_gone = True

    def _wrong(self, what: str) -> None:
        self._tally.faults.wrong += 1
        self._tally.faults.tell(f"{self.seen.name}: {what}")


async def _forget(connection: trio.socket.SocketType, for_s: float) -> None:
    """Keep it open and unread for a while."""
    with connection:
        await trio.sleep(for_s)
