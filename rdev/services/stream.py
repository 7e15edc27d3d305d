"""SUBSYSTEM Fanout: the hub between the log and everybody who watches.

The log is the truth; the hub only saves a reader the trip. A reader subscribes first, then reads
the log, then joins what is published, with the sequence number as the guard against doubles.
Publishing marks the stream and waits for nobody; the delivery loop writes to the readers that wait
and yields at least every 2 ms. Bounds: 256 KiB of newest events for each stream (whoever is further
behind reads the log, one read for all who stand at the same place); how many subscriptions there
are is bounded by the HTTP edge. At stop every stream is told `disconnecting`: a hundred at once,
more of them spread over the time given.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId
from rdev.domain.stream import Chunk, Source
from rdev.ports.output import OutputLog
from rdev.services.beat import next_beat_s
from rdev.services.stream_group import OfferEach, Outlet
from rdev.services.stream_pages import Pages
from rdev.services.stream_reader import (
    CLOSE_AT_ONCE,
    HEARTBEAT_S,
    YIELD_S,
    Signal,
    Subscription,
    Topic,
    dismiss_each,
    let_others_run,
)
from rdev.services.stream_tail import Frames

__all__ = [
    "BUFFER_BYTES",
    "HEARTBEAT_S",
    "Fanout",
    "Frames",
    "OfferEach",
    "Outlet",
    "Signal",
    "Subscription",
]

BUFFER_BYTES = 262_144
# Reads of the log at once for streams that other servers append to; the pool has more connections.
LOOKS_AT_ONCE = 4
# After a look that failed, and between two looks of a server that drains and is told nothing more.
LOOK_PAUSE_S = 1.0
_SWEEP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutStatistics:
    """Counters since the start, and what is open now. `written`: by the hub itself."""

    subscriptions: int
    published: int
    written: int
    fell_back: int
    log_reads: int


class Fanout:
    """The hub. Readers that take by themselves need no running loop."""

    name = "stream"

    def __init__(
        self,
        *,
        log: OutputLog,
        tell_replicas: Callable[[CommandId], None],
        status_changed: Callable[[], None] = lambda: None,
        buffer_bytes: int = BUFFER_BYTES,
        drain_s: float = 0.0,
        told: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`tell_replicas` says to the others that a stream has news, `status_changed` that a
        command has another status; neither waits. `drain_s` is how long the closing of very many
        streams may take. `told` learns how old (seconds) the news is that a stream's readers have
        just been written."""
        self._told = told
        self.draining = False
        self.fell_back = 0
        self.pages: Pages[CommandId] = Pages(log)
        self._tell_replicas = tell_replicas
        self._status_changed = status_changed
        self._buffer_bytes = buffer_bytes
        self._drain_s = drain_s
        self._topics: dict[CommandId, Topic[CommandId]] = {}
        self._ends: dict[CommandId, list[trio.Event]] = {}
        self._marked: dict[Topic[CommandId], None] = {}
        self._work = trio.Event()
        self._stop = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._looks = trio.CapacityLimiter(LOOKS_AT_ONCE)
        self._is_writing = False
        self._open = self._published = self._written = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver until `stop`, then until every reader was told to leave.

        Survives a database that is gone: the streams are silent, then go on.
        """
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._deliver)
                self._nursery.start_soon(self._sweep)
                task_status.started()
                await self._stop.wait()
                await dismiss_each(self._readers(), over_s=self._drain_s)
                self._nursery.cancel_scope.cancel()
        finally:
            self._nursery = None

    def stop(self) -> None:
        """Tell every reader `disconnecting`, at once where they are few. Idempotent."""
        self.draining = True
        self._stop.set()
        if self._nursery is None or self._open <= CLOSE_AT_ONCE:
            for reader in self._readers():
                reader.dismiss()

    def statistics(self) -> FanoutStatistics:
        """What is open and what was done."""
        return FanoutStatistics(
            subscriptions=self._open,
            published=self._published,
            written=self._written,
            fell_back=self.fell_back,
            log_reads=self.pages.reads,
        )

    def watched(self) -> Collection[CommandId]:
        """The streams that somebody reads here."""
        return self._topics.keys()

    @property
    def is_idle(self) -> bool:
        """Whether the loop has written everything that was marked."""
        return not self._marked and not self._is_writing

    def publish(self, chunk: Chunk) -> None:
        """Hand a committed chunk to the readers here and tell the other replicas. Never waits."""
        self._published += 1
        self._tell_replicas(chunk.command)
        if chunk.source is Source.LIFE:
            self._status_changed()
        if chunk.is_final:
            self._end(chunk.command)
        topic = self._topics.get(chunk.command)
        if topic is not None:
            topic.tail.append(chunk)
            self.mark(topic)

    def wake(self, command: CommandId) -> None:
        """Another replica appended: the readers here look at the log."""
        topic = self._topics.get(command)
        if topic is not None:
            topic.is_stale = True
            self.mark(topic)
        self._end(command)

    def wake_each(self, commands: Iterable[CommandId]) -> None:
        """Another replica appended to several streams."""
        for command in commands:
            self.wake(command)

    def announce(self, command: CommandId) -> None:
        """A stream got events that were not published here (a cancel): everybody looks."""
        self._tell_replicas(command)
        self._status_changed()
        self.wake(command)

    def wake_all(self) -> None:
        """Wake-ups may have been missed: everybody looks at the log."""
        for command in {*self._topics, *self._ends}:
            self.wake(command)

    @contextmanager
    def subscribe(self, command: CommandId, *, after: int) -> Iterator[Subscription[CommandId]]:
        """A reader for the length of the block; leaving it is synchronous."""
        topic = self._topics.get(command)
        if topic is None:
            topic = self._topics[command] = Topic(command, limit_bytes=self._buffer_bytes)
        reader = Subscription(topic, self, after=after)
        topic.readers.add(reader)
        self._open += 1
        try:
            yield reader
        finally:
            self._open -= 1
            topic.readers.discard(reader)
            reader.stop_waiting()
            if not topic.readers:
                del self._topics[command]
                self._marked.pop(topic, None)

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

    def mark(self, topic: Topic[CommandId]) -> None:
        """The topic has something for its readers. Never waits."""
        if self._nursery is None:
            for reader in topic.all_waiting():
                reader.wake()
        else:
            if topic.marked_at_s is None:
                topic.marked_at_s = trio.current_time()
            self._marked[topic] = None
            self._work.set()

    async def look(self, topic: Topic[CommandId]) -> None:
        """Bring into the tail what somebody else appended; where the loop runs, it does that.

        Errors: as `OutputLog.read`; the next one looks again.
        """
        if self._nursery is None:
            await self._look(topic)
        elif not topic.is_looking:
            self.mark(topic)

    async def _deliver(self) -> None:
        """Write what is marked, stream by stream, a write for each reader at a time."""
        yield_at_s = 0.0
        while True:
            while not self._marked:
                self._work = trio.Event()
                await self._work.wait()
                yield_at_s = trio.current_time() + YIELD_S
            topic = next(iter(self._marked))
            del self._marked[topic]
            self._is_writing = True
            yield_at_s = await self._deliver_to(topic, yield_at_s)
            self._is_writing = False

    async def _deliver_to(self, topic: Topic[CommandId], yield_at_s: float) -> float:
        """One write to each reader of a stream that waits; returns when to yield again."""
        self._start_look(topic)
        before = self._written
        for group in topic.groups_behind():
            written = topic.write_to(group)
            self._written += written[1] if written else 0
            yield_at_s = await let_others_run(yield_at_s)
        # Also where nothing was written: very many streams may be marked at once.
        yield_at_s = await let_others_run(yield_at_s)
        if topic.groups_behind():
            self._marked[topic] = None
            return yield_at_s
        if self._written > before and topic.marked_at_s is not None:
            self._told(trio.current_time() - topic.marked_at_s)
            topic.marked_at_s = None
        elif not topic.is_looking:
            topic.marked_at_s = None
        if topic.all_wait:
            topic.tail.forget(topic.tail.last_seq)
        return yield_at_s

    def _start_look(self, topic: Topic[CommandId]) -> None:
        if self._nursery is None or topic.is_looking or not topic.is_stale:
            return
        # While all of them still replay, the log after the tail is what they read anyway.
        if not all(reader.replays for reader in topic.readers):
            topic.is_looking = True
            self._nursery.start_soon(self._look_for_all, topic)

    async def _look_for_all(self, topic: Topic[CommandId]) -> None:
        """One look for all readers of a stream; after one that failed, another."""
        try:
            while topic.is_stale and topic.readers:
                try:
                    async with self._looks:
                        await self._look(topic)
                except RdevError as error:
                    if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                        raise
                    await trio.sleep(LOOK_PAUSE_S)
        finally:
            topic.is_looking = False

    async def _look(self, topic: Topic[CommandId]) -> None:
        topic.is_stale = False
        topic.looked_at_s = trio.current_time()
        try:
            # For nobody it is not read to its end, which may be far.
            while topic.readers and (
                page := await self.pages.after(topic.key, topic.tail.last_seq)
            ):
                topic.tail.append_page(page)
                self.mark(topic)
        except BaseException:
            topic.is_stale = True
            self.mark(topic)
            raise

    async def _sweep(self) -> None:
        """Let go of what all have; a draining server is told nothing more, so it looks."""
        while True:
            await trio.sleep_until(next_beat_s(_SWEEP_S))
            yield_at_s = trio.current_time() + YIELD_S
            for topic in tuple(self._topics.values()):
                topic.forget_taken()
                topic.regroup()
                yield_at_s = await let_others_run(yield_at_s)
            if self.draining:
                self.wake_all()

    def _readers(self) -> list[Subscription[CommandId]]:
        return [reader for topic in self._topics.values() for reader in topic.readers]

    def _end(self, command: CommandId) -> None:
        for event in self._ends.get(command, ()):
            event.set()
