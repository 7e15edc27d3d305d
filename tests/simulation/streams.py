"""Following a command's stream as the HTTP edge does: the one place here that knows the hub.

What the hub promises its readers may be given in another form; what a client sees may not.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from rdev.domain.ids import CommandId
from rdev.services.commands import Commands
from rdev.services.stream import Fanout, Frames, Signal, Subscription

Deliver = Callable[[bytes], Awaitable[None]]


async def follow(
    commands: Commands, fanout: Fanout, command: CommandId, after: int, deliver: Deliver
) -> bool:
    """Hand on the frames after `after` until the stream ends; whether its end was reached.

    Errors: those of `Commands.get` and of the hub.
    """
    found = await commands.get(command)
    if found.status.is_terminal and after >= found.last_seq:
        return True
    with fanout.subscribe(command, after=after) as reader:
        while True:
            match await reader.receive():
                case Frames(data=data):
                    await deliver(data)
                case Signal.HEARTBEAT:
                    pass
                case Signal.END:
                    return True
                case Signal.DRAINING:
                    return False


def parse(data: bytes) -> list[tuple[int, str, bytes]]:
    """The numbered events of some whole SSE frames: (id, event, data)."""
    events = []
    for frame in data.split(b"\n\n"):
        fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if line)
        if b"id" in fields:
            events.append((int(fields[b"id"]), fields[b"event"].decode(), fields[b"data"]))
    return events


class ReplayThenSubscribe(Subscription):
    """A bug to plant: reads the log, and takes part in what is published only then."""

    async def _from_log(self) -> Frames | None:
        found = await super()._from_log()
        if found is None:
            # What was published during the read is missed.
            self.buffer.waiting.clear()
            self.buffer.size_bytes = 0
            self.buffer.behind = False
        return found


class LateReaders(Fanout):
    """Makes such subscriptions."""

    @contextmanager
    def subscribe(self, command: CommandId, *, after: int) -> Iterator[Subscription]:
        with super().subscribe(command, after=after) as subscription:
            subscription.__class__ = ReplayThenSubscribe
            yield subscription
