"""Following a command's stream as the HTTP edge does: the one place here that knows the hub.

What the hub promises its readers may be given in another form; what a client sees may not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from rdev.domain.ids import CommandId
from rdev.domain.stream import Chunk
from rdev.services.commands import Commands
from rdev.services.stream import Fanout, Frames, OfferEach, Signal
from tests.fakes.outlets import one_by_one
from tests.simulation.link import Link

# How often a client takes at once what the hub writes.
QUICK = 0.7


class Socket:
    """A server's end of a client's connection. The hub writes to it while it takes everything."""

    def __init__(self, link: Link, receive: Callable[[bytes], None]) -> None:
        self._link = link
        self._receive = receive
        self._kept: list[bytes] = []

    def together(self, outlets: Sequence[Self]) -> OfferEach:
        return one_by_one([outlet.offer for outlet in outlets])

    def offer(self, frames: Frames) -> bool:
        """As the hub wants it: whether everything left at once."""
        self._kept.append(frames.data)
        if self._link.is_paused or self._link.is_cut or not self._is_quick():
            return False
        self._send()
        return True

    async def write(self, data: bytes) -> None:
        """Behind what was kept."""
        self._kept.append(data)
        await self.flush()

    async def flush(self) -> None:
        """As soon as the server moves."""
        await self._link.cross()
        self._send()

    def _is_quick(self) -> bool:
        return self._link.weather.chance.odds(QUICK)

    def _send(self) -> None:
        kept, self._kept = self._kept, []
        for data in kept:
            self._receive(data)


async def follow(
    commands: Commands, fanout: Fanout, command: CommandId, after: int, socket: Socket
) -> bool:
    """Write the frames after `after` until the stream ends; whether its end was reached.

    Errors: those of `Commands.get` and of the hub.
    """
    with fanout.subscribe(command, after=after) as reader:
        found = await commands.get(command)
        if found.status.is_terminal and after >= found.last_seq:
            return True
        reader.log_ends(found.last_seq)
        while True:
            match await reader.receive(socket):
                case Frames(data=data):
                    await socket.write(data)
                case Signal.BLOCKED:
                    await socket.flush()
                case Signal.HEARTBEAT:
                    pass
                case Signal.END:
                    return True
                case Signal.DISMISSED:
                    return False


def parse(data: bytes) -> list[tuple[int, str, bytes]]:
    """The numbered events of some whole SSE frames: (id, event, data)."""
    events = []
    for frame in data.split(b"\n\n"):
        fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if line)
        if b"id" in fields:
            events.append((int(fields[b"id"]), fields[b"event"].decode(), fields[b"data"]))
    return events


class LateReaders(Fanout):
    """A bug to plant: a reader takes part in what is told only when it has read the log."""

    def publish(self, chunk: Chunk) -> None:
        with self._without_late_ones(chunk.command):
            super().publish(chunk)

    def wake(self, command: CommandId) -> None:
        with self._without_late_ones(command):
            super().wake(command)

    @contextmanager
    def _without_late_ones(self, command: CommandId) -> Iterator[None]:
        topic = self._topics.get(command)
        if topic is None or not any(reader.replays for reader in topic.readers):
            yield
            return
        del self._topics[command]
        yield
        self._topics[command] = topic
