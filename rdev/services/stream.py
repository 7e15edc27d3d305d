"""SUBSYSTEM Fanout: the hub between the log and everybody who watches.

The log is the truth; the hub only saves a reader the trip. A reader subscribes first, then reads
the log, then joins what is published, with the sequence number as the guard against doubles. The
hub waits for nobody: publishing offers a chunk to bounded buffers (256 KiB of frames each); a
reader whose buffer is full, or who sees a hole, goes back to reading the log. Chunks are framed
once for all readers. At stop every stream is told `disconnecting` and ends.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from rdev.domain.ids import CommandId
from rdev.domain.sse import frames
from rdev.domain.stream import Chunk
from rdev.ports.output import OutputLog

BUFFER_BYTES = 262_144
READ_BYTES = 1_048_576
HEARTBEAT_S = 15.0


class Signal(StrEnum):
    """What a subscription can say besides frames."""

    HEARTBEAT = "heartbeat"
    DRAINING = "draining"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Encoded SSE frames of the events up to `last_seq`; `counts` by type of event."""

    data: bytes
    first_seq: int
    last_seq: int
    is_final: bool
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutStatistics:
    """Counters since the start, and what is open now."""

    subscriptions: int
    published: int
    fell_back: int


@dataclass(slots=True, kw_only=True)
class _Buffer:
    """Live frames that a reader has not taken. `behind`: the log must be read first."""

    behind: bool = True
    waiting: deque[Frames] = field(default_factory=deque)
    size_bytes: int = 0
    news: trio.Event = field(default_factory=trio.Event)

    def offer(self, live: Frames) -> bool:
        """Keep the frames, or drop all and fall back to the log when there is no room."""
        fits = self.size_bytes + len(live.data) <= BUFFER_BYTES
        if fits:
            self.waiting.append(live)
            self.size_bytes += len(live.data)
        else:
            self.fall_back()
        self.news.set()
        return fits

    def fall_back(self) -> None:
        self.waiting.clear()
        self.size_bytes = 0
        self.behind = True
        self.news.set()

    def take(self) -> list[Frames]:
        taken = list(self.waiting)
        self.waiting.clear()
        self.size_bytes = 0
        return taken


class Subscription:
    """One reader of one command's stream. `position` is the last event it has taken."""

    def __init__(self, *, command: CommandId, after: int, log: OutputLog, hub: "Fanout") -> None:
        self.command = command
        self.position = after
        self.buffer = _Buffer()
        self._log = log
        self._hub = hub
        self._ended = False

    async def receive(self) -> Frames | Signal:
        """The next frames, in order, without a hole or a double; or a signal.

        END after the final frames; DRAINING once when the server stops; HEARTBEAT after 15 s of
        silence. Errors: SERVICE_UNAVAILABLE when the log cannot be read (resume later).
        Cancellation: nothing is lost; the position is that of the last frames given.
        """
        while True:
            if self._ended:
                return Signal.END
            if self._hub.draining:
                return Signal.DRAINING
            if self.buffer.behind:
                found = await self._from_log()
            else:
                found = self._from_buffer()
            if found is not None:
                self.position = found.last_seq
                self._ended = found.is_final
                return found
            # `stop` may have come while the log was read.
            if self.buffer.behind or self._hub.draining:
                continue
            if not await self._news():
                # A lost wake-up costs this much at most: the next call looks at the log.
                self.buffer.behind = True
                return Signal.HEARTBEAT

    async def _from_log(self) -> Frames | None:
        """One page of the log. `behind` is cleared first: what is published during the read is
        kept in the buffer, and the position guards against doubles."""
        self.buffer.behind = False
        try:
            chunks = await self._log.read(self.command, after=self.position, limit_bytes=READ_BYTES)
        except BaseException:
            self.buffer.behind = True
            raise
        if not chunks:
            return None
        self.buffer.behind = True
        return _join([_framed(chunk, after=self.position) for chunk in chunks])

    def _from_buffer(self) -> Frames | None:
        """1. Already seen: skip. 2. Continues the position: take. 3. A hole: read the log."""
        fresh: list[Frames] = []
        position = self.position
        for live in self.buffer.take():
            if live.last_seq <= position:
                continue
            if live.first_seq != position + 1:
                self.buffer.fall_back()
                break
            fresh.append(live)
            position = live.last_seq
        return _join(fresh) if fresh else None

    async def _news(self) -> bool:
        """Wait for a publication; False after 15 s of silence."""
        if self.buffer.waiting or self._hub.draining:
            return True  # a stop that came while the log was read set the event of then
        self.buffer.news = trio.Event()
        with trio.move_on_after(HEARTBEAT_S) as scope:
            await self.buffer.news.wait()
        return not scope.cancelled_caught


class Fanout:
    """The hub. The HTTP edge bounds how many subscriptions there are."""

    name = "stream"

    def __init__(self, *, log: OutputLog, tell_replicas: Callable[[CommandId], None]) -> None:
        """`tell_replicas` says to the others that a stream has news; it never waits."""
        self.draining = False
        self._log = log
        self._tell_replicas = tell_replicas
        self._readers: dict[CommandId, set[Subscription]] = {}
        self._ends: dict[CommandId, list[trio.Event]] = {}
        self._stop = trio.Event()
        self._open = self._published = self._fell_back = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`; readers are told by then and leave by themselves."""
        task_status.started()
        await self._stop.wait()

    def stop(self) -> None:
        """Tell every reader `disconnecting`. Idempotent."""
        self.draining = True
        self._stop.set()
        for readers in self._readers.values():
            for reader in readers:
                reader.buffer.news.set()

    def statistics(self) -> FanoutStatistics:
        """What is open and what was done."""
        return FanoutStatistics(
            subscriptions=self._open, published=self._published, fell_back=self._fell_back
        )

    def watched(self) -> Collection[CommandId]:
        """The streams that somebody reads here."""
        return self._readers.keys()

    def publish(self, chunk: Chunk) -> None:
        """Offer a committed chunk to the readers here and tell the other replicas. Never waits."""
        self._published += 1
        self._tell_replicas(chunk.command)
        if chunk.is_final:
            self._end(chunk.command)
        readers = self._readers.get(chunk.command)
        if not readers:
            return
        live = _framed(chunk, after=chunk.first_seq - 1)
        for reader in readers:
            if not reader.buffer.behind:
                self._fell_back += not reader.buffer.offer(live)

    def wake(self, command: CommandId) -> None:
        """Another replica appended: the readers here look at the log."""
        for reader in self._readers.get(command, ()):
            reader.buffer.fall_back()
        self._end(command)

    def wake_each(self, commands: Iterable[CommandId]) -> None:
        """Another replica appended to several streams."""
        for command in commands:
            self.wake(command)

    def announce(self, command: CommandId) -> None:
        """A stream got events that were not published here (a cancel): everybody looks."""
        self._tell_replicas(command)
        self.wake(command)

    def wake_all(self) -> None:
        """Wake-ups may have been missed: everybody looks at the log."""
        for command in {*self._readers, *self._ends}:
            self.wake(command)

    @contextmanager
    def subscribe(self, command: CommandId, *, after: int) -> Iterator[Subscription]:
        """A subscription for the length of the block; leaving it is synchronous."""
        subscription = Subscription(command=command, after=after, log=self._log, hub=self)
        self._readers.setdefault(command, set()).add(subscription)
        self._open += 1
        try:
            yield subscription
        finally:
            self._open -= 1
            readers = self._readers[command]
            readers.discard(subscription)
            if not readers:
                del self._readers[command]

    @contextmanager
    def end_of(self, command: CommandId) -> Iterator[trio.Event]:
        """An event that is set when the command may have ended; a hint, as all wake-ups are."""
        event = trio.Event()
        waiters = self._ends.setdefault(command, [])
        waiters.append(event)
        try:
            yield event
        finally:
            waiters.remove(event)
            if not waiters:
                self._ends.pop(command, None)

    def _end(self, command: CommandId) -> None:
        for event in self._ends.get(command, ()):
            event.set()


def _framed(chunk: Chunk, *, after: int) -> Frames:
    return Frames(
        data=frames(chunk.payload, chunk.first_seq, chunk.last_seq, after=after),
        first_seq=chunk.first_seq,
        last_seq=chunk.last_seq,
        is_final=chunk.is_final,
        counts=chunk.event_counts,
    )


def _join(parts: list[Frames]) -> Frames:
    if len(parts) == 1:
        return parts[0]
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    return Frames(
        data=b"".join(part.data for part in parts),
        first_seq=parts[0].first_seq,
        last_seq=parts[-1].last_seq,
        is_final=parts[-1].is_final,
        counts=counts,
    )
