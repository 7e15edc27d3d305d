"""SUBSYSTEM Feed: the life of all commands, to everybody who may see it.

One loop reads the record for all who watch: what it brings is encoded once and handed to those
whose projects are concerned. It looks when a status has changed (here, or told by another server),
and each second as the floor; without watchers it does nothing. What is committed but held back by a
transaction that still writes is looked for again soon, then ever more seldom. A reader that is
behind reads the record itself. Bounds: 256 KiB of newest events for each set of projects; a
pause between looks; how many subscriptions there are is bounded by the HTTP edge.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.feed import FeedEvent, Position, event_frame, event_name
from rdev.domain.ids import ProjectId
from rdev.ports.feed import FeedLog
from rdev.services.stream import BUFFER_BYTES
from rdev.services.stream_pages import Pages
from rdev.services.stream_reader import (
    CLOSE_AT_ONCE,
    YIELD_S,
    Subscription,
    Topic,
    dismiss_each,
    let_others_run,
)
from rdev.services.stream_tail import Frames

# Whose events are watched; None for those of all projects.
Projects: TypeAlias = frozenset[ProjectId] | None

# The floor: with every wake-up lost, no event is later than this.
POLL_S = 1.0
# Between two looks, however often it is woken: `REST` times as long as the last one took, within
# these. So looks that bring little take a fifth of the time at most; after a silence it looks at
# once.
PAUSE_S = 0.002
PAUSE_MOST_S = 0.02
REST = 4
# After a look behind which events are held back, so much longer; twice that where the next brings
# nothing, and at most this.
HELD_FIRST_S = 0.005
HELD_MOST_S = 0.25
# What one look brings at most; where there is more, the next one follows.
LOOK_EVENTS = 1_000
# An event on the wire has at least so many bytes.
_EVENT_BYTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedStatistics:
    """Now: watchers, and the age of the transaction that holds events back (0: none does, or
    nobody watches). Since the start: looks, the events they brought, those that were written by
    the loop itself, readers that fell back to the record, and pages they read."""

    subscriptions: int
    held_back_s: float
    looks: int
    events: int
    written: int
    fell_back: int
    log_reads: int


class _Record:
    """The record as readers page through it: frames of single events, or none of a stretch in which
    nothing concerns them."""

    def __init__(self, log: FeedLog) -> None:
        self._log = log

    async def read(self, projects: Projects, /, *, after: int, limit_bytes: int) -> list[Frames]:
        page = await self._log.read(
            after=Position(after), limit=max(1, limit_bytes // _EVENT_BYTES), projects=projects
        )
        frames = _frames(page.events, after=after)
        covered = frames[-1].last_seq if frames else after
        if page.end > covered:
            frames.append(_stretch(b"", covered, page.end, {}))
        return frames


class Feed:
    """The hub of the feeds."""

    name = "feed"

    def __init__(
        self,
        *,
        log: FeedLog,
        tell_replicas: Callable[[], None],
        buffer_bytes: int = BUFFER_BYTES,
        drain_s: float = 0.0,
    ) -> None:
        """`tell_replicas` says to the others that a status has changed; it never waits. `drain_s`
        is how long the closing of very many streams may take."""
        self.draining = False
        self.fell_back = 0
        self.pages: Pages[Projects] = Pages(_Record(log))
        self._log = log
        self._tell_replicas = tell_replicas
        self._buffer_bytes = buffer_bytes
        self._drain_s = drain_s
        self._topics: dict[Projects, Topic[Projects]] = {}
        # How far the loop has read.
        self._position = Position(0)
        self._held_s: float | None = None
        self._held_back_s = 0.0
        self._work = trio.Event()
        self._stop = trio.Event()
        self._is_running = False
        self._open = self._looked = self._events = self._written = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read and deliver until `stop`, then until every reader was told to leave.

        Survives a database that is gone: the feeds are silent, then go on.
        """
        self._is_running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_on)
                task_status.started()
                await self._stop.wait()
                await dismiss_each(self._readers(), over_s=self._drain_s)
                nursery.cancel_scope.cancel()
        finally:
            self._is_running = False

    def stop(self) -> None:
        """Tell every reader `disconnecting`, at once where they are few. Idempotent."""
        self.draining = True
        self._stop.set()
        if not self._is_running or self._open <= CLOSE_AT_ONCE:
            for reader in self._readers():
                reader.dismiss()

    def statistics(self) -> FeedStatistics:
        """What is open and what was done."""
        return FeedStatistics(
            subscriptions=self._open,
            held_back_s=self._held_back_s,
            looks=self._looked,
            events=self._events,
            written=self._written,
            fell_back=self.fell_back,
            log_reads=self.pages.reads,
        )

    def changed(self) -> None:
        """A status was changed here, and is committed. Never waits."""
        self._tell_replicas()
        self.wake()

    def wake(self) -> None:
        """A status may have changed. Never waits."""
        self._work.set()

    async def start(self, after: Position | None) -> tuple[Position, Position]:
        """Where a reader begins, and the head of the feed now: after `after`, after the oldest
        event stored (0), or, where it is None, now.

        Errors: GONE; SERVICE_UNAVAILABLE.
        """
        bounds = await self._log.bounds()
        if after is None:
            return bounds.head, bounds.head
        begin = max(after, bounds.oldest) if after == 0 else after
        # What it has not seen is still there, or the reader is told so before anything else.
        await self._log.read(after=begin, limit=1, projects=frozenset())
        return begin, bounds.head

    @contextmanager
    def subscribe(
        self, projects: Projects, *, after: Position, head: Position
    ) -> Iterator[Subscription[Projects]]:
        """A reader for the length of the block, from a place that `start` gave; leaving it is
        synchronous."""
        if not self._topics:
            self._position = head  # nobody asked for what lies between
        topic = self._topics.get(projects)
        if topic is None:
            topic = self._topics[projects] = Topic(projects, limit_bytes=self._buffer_bytes)
        reader = Subscription(topic, self, after=after)
        topic.readers.add(reader)
        self._open += 1
        self.wake()
        try:
            yield reader
        finally:
            self._open -= 1
            topic.readers.discard(reader)
            reader.stop_waiting()
            if not topic.readers:
                del self._topics[projects]
            if not self._topics:
                self._held_back_s = 0.0

    def seen(self, reader: Subscription[Projects]) -> Position:
        """Where the reader stands: after the last event it was given, or further where nothing
        since then concerns it."""
        has_all = not reader.replays and reader.position >= reader.topic.tail.last_seq
        return Position(max(reader.position, self._position if has_all else 0))

    def mark(self, topic: Topic[Projects]) -> None:
        """See `Hub`."""
        for reader in topic.all_waiting():
            reader.wake()

    async def look(self, topic: Topic[Projects]) -> None:
        """See `Hub`. The loop looks for all of them."""
        topic.is_stale = False
        self.wake()
        await trio.lowlevel.checkpoint()

    async def _read_on(self) -> None:
        while True:
            await self._await_news()
            self._work = trio.Event()
            began_s = trio.current_time()
            try:
                while await self.run_once():
                    pass
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                self._held_s = POLL_S
            took_s = trio.current_time() - began_s
            await trio.sleep(min(max(PAUSE_S, took_s * REST), PAUSE_MOST_S))

    async def _await_news(self) -> None:
        """1. Nobody watches: until somebody does. 2. Held back: a while; news stand behind it too.
        3. Else until news, at most the floor."""
        if not self._topics:
            self._held_s = None
            await self._work.wait()
        elif self._held_s is not None:
            await trio.sleep(self._held_s)
        else:
            with trio.move_on_after(POLL_S):
                await self._work.wait()

    async def run_once(self) -> bool:
        """Look once and deliver; whether there is more. Errors: as `FeedLog.read`."""
        if not self._topics:
            return False
        after = self._position
        self._looked += 1
        page = await self._log.read(after=after, limit=LOOK_EVENTS, projects=None)
        self._events += len(page.events)
        # In one step: whoever joins stands before all of it, or after it.
        news = _frames(page.events, after=after)
        for topic in self._topics.values():
            topic.looked_at_s = trio.current_time()
            _append(topic, page.events, news, after=after)
        self._position = page.end
        await self._deliver()
        await self._note_held(is_held=page.is_held, is_news=bool(page.events))
        return len(page.events) == LOOK_EVENTS

    async def _note_held(self, *, is_held: bool, is_news: bool) -> None:
        """When to look again, and since when somebody holds it back who does so for long."""
        if not is_held:
            self._held_s, self._held_back_s = None, 0.0
        elif is_news or self._held_s is None:
            self._held_s, self._held_back_s = HELD_FIRST_S, 0.0
        else:
            self._held_s = min(self._held_s * 2, HELD_MOST_S)
            if self._held_s == HELD_MOST_S:
                self._held_back_s = await self._log.held_back_s()

    async def _deliver(self) -> None:
        """Write to all readers that wait; yields at least every 2 ms."""
        yield_at_s = trio.current_time() + YIELD_S
        for topic in tuple(self._topics.values()):
            while groups := topic.groups_behind():
                for group in groups:
                    self._count(topic.write_to(group))
                    yield_at_s = await let_others_run(yield_at_s)
            topic.forget_taken()
            topic.regroup()
            yield_at_s = await let_others_run(yield_at_s)

    def _count(self, written: tuple[Frames, int] | None) -> None:
        if written is not None:
            given, readers = written
            self._written += sum(given.counts.values()) * readers

    def _readers(self) -> list[Subscription[Projects]]:
        return [reader for topic in self._topics.values() for reader in topic.readers]


def _append(
    topic: Topic[Projects], events: tuple[FeedEvent, ...], news: list[Frames], *, after: int
) -> None:
    """What concerns a topic, as a run without holes: each event stands for the stretch since the
    one before, since nothing in between concerns the topic."""
    tail = topic.tail
    for event, frames in zip(events, news, strict=True):
        if topic.key is None or event.project in topic.key:
            # A tail that knows nothing yet is joined where the loop has begun.
            since = tail.last_seq or after
            tail.append_page(_stretch(frames.data, since, frames.last_seq, frames.counts))


def _frames(events: tuple[FeedEvent, ...], *, after: int) -> list[Frames]:
    """Each event encoded, with the stretch since the one before."""
    frames: list[Frames] = []
    for event in events:
        counts = {event_name(event).value: 1}
        frames.append(_stretch(event_frame(event), after, event.position, counts))
        after = event.position
    return frames


def _stretch(data: bytes, after: int, last: int, counts: Mapping[str, int]) -> Frames:
    return Frames(data=data, first_seq=after + 1, last_seq=last, is_final=False, counts=counts)
