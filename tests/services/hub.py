"""A hub over a log that tests write directly, and clients that read from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self
from uuid import UUID

import trio

from rdev.domain.commands import Outcome, Status
from rdev.domain.ids import CommandId, command_id
from rdev.domain.sse import split_events
from rdev.domain.stream import Chunk, Source, final_lines
from rdev.services.stream import (
    BUFFER_BYTES,
    Fanout,
    Frames,
    OfferEach,
    Signal,
    Subscription,
)
from tests.fakes.outlets import one_by_one
from tests.fakes.output import FakeOutput
from tests.fakes.store import StoreState

COMMAND = command_id(UUID(int=1))
OTHER = command_id(UUID(int=2))
_FRAME = re.compile(rb"id: (\d+)\nevent: (\w+)\ndata: (.*)")

Event = tuple[int, str, bytes]


class SlowLog(FakeOutput):
    """Reads take time before and after the moment they look at."""

    def __init__(self, state: StoreState, before_s: float = 0.0, after_s: float = 0.0) -> None:
        super().__init__(state)
        self.before_s, self.after_s = before_s, after_s
        self.reads = 0

    async def read(self, command: CommandId, *, after: int, limit_bytes: int) -> list[Chunk]:
        self.reads += 1
        await trio.sleep(self.before_s)
        page = await super().read(command, after=after, limit_bytes=limit_bytes)
        await trio.sleep(self.after_s)
        return page


@dataclass
class Hub:
    """A hub over a log that tests write directly."""

    log: SlowLog = field(default_factory=lambda: SlowLog(StoreState()))
    told: list[CommandId] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    buffer_bytes: int = BUFFER_BYTES
    drain_s: float = 0.0

    def __post_init__(self) -> None:
        self.fanout = Fanout(
            log=self.log,
            tell_replicas=self.told.append,
            buffer_bytes=self.buffer_bytes,
            drain_s=self.drain_s,
            told=self.lags_s.append,
        )

    @property
    def chunks(self) -> list[Chunk]:
        return self.log._state.chunks.setdefault(COMMAND, [])

    @property
    def events(self) -> list[Event]:
        return [
            event
            for chunk in self.chunks
            for event in split_events(chunk.payload, chunk.first_seq, chunk.last_seq)
        ]

    def commit(self, events: int = 1, *, size_bytes: int = 30, final: bool = False) -> Chunk:
        """A chunk in the log that nobody is told of."""
        last = self.chunks[-1].last_seq if self.chunks else 0
        lines = [b'{"line":"%d"}' % (last + n + 1) for n in range(events)]
        lines[-1] = lines[-1][:-1] + b" " * max(0, size_bytes - 20) + b"}"
        payload = b"\n".join(lines)
        if final:
            events = 2
            outcome = Outcome(status=Status.SUCCEEDED, exit_code=0)
            payload = final_lines(
                outcome, attempt=1, truncated=False, stdout_bytes=0, stderr_bytes=0
            )
        chunk = Chunk(
            command=COMMAND,
            first_seq=last + 1,
            last_seq=last + events,
            source=Source.LIFE if final else Source.STDOUT,
            raw_bytes=events,
            payload=payload,
        )
        self.chunks.append(chunk)
        return chunk

    def publish(self, events: int = 1, *, size_bytes: int = 30, final: bool = False) -> None:
        """A chunk that is committed and then published."""
        self.fanout.publish(self.commit(events, size_bytes=size_bytes, final=final))


def events_of(frames: Frames) -> list[Event]:
    """What a client reads out of the bytes."""
    return [
        (int(found[1]), found[2].decode(), found[3])
        for frame in frames.data.split(b"\n\n")
        if (found := _FRAME.fullmatch(frame))
    ]


@dataclass
class Client:
    """Somebody who takes at most `room` frames at once; more has to wait for `flush`."""

    room: int = 1_000_000
    pause_s: float = 0.0
    seen: list[Event] = field(default_factory=list)
    kept: list[Event] = field(default_factory=list)
    writes: list[Frames] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)

    def together(self, outlets: Sequence[Self]) -> OfferEach:
        return one_by_one([outlet.offer for outlet in outlets])

    def offer(self, frames: Frames) -> bool:
        assert not self.kept, "written before what was kept had left"
        self.writes.append(frames)
        events = events_of(frames)
        self.seen += events[: self.room]
        self.kept = events[self.room :]
        return not self.kept

    async def flush(self) -> None:
        await trio.sleep(self.pause_s)
        self.seen += self.kept
        self.kept = []

    async def follow(self, reader: Subscription, *, offering: bool = True) -> None:
        """Read until there is nothing more to read."""
        while True:
            item = await reader.receive(self if offering else None)
            match item:
                case Frames():
                    self.seen += events_of(item)
                    await trio.sleep(self.pause_s)
                case Signal.BLOCKED:
                    await self.flush()
                case Signal.HEARTBEAT:
                    self.signals.append(item)
                case _:
                    self.signals.append(item)
                    return


async def read_all(hub: Hub, *, after: int = 0, pause_s: float = 0.0) -> list[Event]:
    """Read to the end of the stream."""
    client = Client(pause_s=pause_s)
    with hub.fanout.subscribe(COMMAND, after=after) as reader:
        await client.follow(reader, offering=False)
    return client.seen
