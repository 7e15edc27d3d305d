"""One reader of one stream (a command's, or a feed): where it stands, and how it is given what
comes next. `Key` names a stream; its positions are numbers that grow.

A reader takes by itself (`receive`); while it waits there, it may let the hub write straight to its
client (`offer`). Either way its position is the guard: nothing twice, nothing left out. It holds no
events: what it has not taken yet is in the stream's tail, or in the log.
"""

from collections.abc import Callable, Hashable, Sequence
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.services.stream_pages import Pages
from rdev.services.stream_tail import Frames, Tail

HEARTBEAT_S = 15.0
# So many streams are closed at once; with more, their clients come back over a while.
CLOSE_AT_ONCE = 100

Key = TypeVar("Key", bound=Hashable)

# Writes frames to the client as far as it takes them at once and keeps the rest; says whether
# everything left. Never waits.
Offer = Callable[[Frames], bool]
# Told what the hub wrote: a type of event, and how many.
Tally = Callable[[str, int], None]


class Signal(StrEnum):
    """What a subscription can say besides frames."""

    HEARTBEAT = "heartbeat"
    BLOCKED = "blocked"
    DISMISSED = "dismissed"
    END = "end"


class Topic(Generic[Key]):
    """One stream that is watched here: its newest events and its readers."""

    __slots__ = (
        "is_looking",
        "is_stale",
        "key",
        "looked_at_s",
        "readers",
        "tail",
        "tally",
        "waiting",
        "written_at_s",
    )

    def __init__(self, key: Key, *, limit_bytes: int) -> None:
        self.key = key
        self.tail = Tail(limit_bytes=limit_bytes)
        self.readers: set[Subscription[Key]] = set()
        # Those that are inside `receive` and wait.
        self.waiting: dict[Subscription[Key], None] = {}
        # The log may hold more than the tail: somebody else appended.
        self.is_stale = self.is_looking = False
        self.looked_at_s = self.written_at_s = float("-inf")
        self.tally: Tally | None = None

    def forget_taken(self) -> None:
        """Let go of what all have that do not read the log anyway."""
        behind = [reader.position for reader in self.readers if not reader.replays]
        self.tail.forget(min(behind, default=self.tail.last_seq))


class Hub(Protocol[Key]):
    """What a reader needs of the hub."""

    pages: Pages[Key]
    draining: bool
    fell_back: int

    def mark(self, topic: Topic[Key]) -> None:
        """The topic has something for its readers. Never waits."""
        ...

    async def look(self, topic: Topic[Key]) -> None:
        """Bring into the tail what somebody else appended, unless the hub's loop does."""
        ...


class Subscription(Generic[Key]):
    """A reader. `position` is the last event it was given. Made by `Fanout` and `Feed`."""

    __slots__ = (
        "_hub",
        "_is_blocked",
        "_is_dismissed",
        "_is_ended",
        "_log_end",
        "_news",
        "_offer",
        "_reached",
        "position",
        "replays",
        "topic",
    )

    def __init__(self, topic: Topic[Key], hub: Hub[Key], *, after: int) -> None:
        self.topic = topic
        self.position = after
        # Whether the log may hold events that the tail does not: at first, and after a hole.
        self.replays = True
        self._hub = hub
        self._log_end: int | None = None
        self._reached = after
        self._news = trio.Event()
        self._offer: Offer | None = None
        self._is_blocked = self._is_ended = False
        self._is_dismissed = hub.draining

    async def receive(self, offer: Offer | None = None) -> Frames | Signal:
        """The next frames, in order, without a hole or a double; or a signal.

        END after the final frames; DISMISSED when the reader was asked to go; HEARTBEAT after 15 s
        of silence. With `offer` the hub writes by itself while nothing else is to be done;
        BLOCKED then says that the client did not take everything: what `offer` kept must leave
        before anything else does. Errors: SERVICE_UNAVAILABLE when the log cannot be read (resume
        later), GONE when what comes next was pruned meanwhile. Cancellation: nothing is lost; the
        position is that of the last frames given.
        """
        while True:
            signal = self._signal()
            if signal is not None:
                return signal
            found = await self._from_log() if self.replays else self._from_tail()
            if found is not None:
                self._take(found)
                return found
            if self.replays:
                continue
            if self.topic.is_stale:
                await self._hub.look(self.topic)
            # A stop may have come, or news, while the log was read.
            if self._signal() is not None or self.position < self.topic.tail.last_seq:
                continue
            if not await self._wait(offer):
                return Signal.HEARTBEAT

    def log_reaches(self, last_seq: int) -> None:
        """The log has had all events up to there: where it has them no more, they were pruned."""
        self._reached = max(self._reached, last_seq)

    def log_ends(self, last_seq: int) -> None:
        """The log was seen to end there after this reader had subscribed; saves a look at it."""
        self._log_end = last_seq
        if self.position >= last_seq:
            self._catch_up()

    def give(self) -> Frames | None:
        """The hub's own way: write the next frames to the client of a reader that waits; what was
        written, or None when there is nothing the hub can do."""
        offer, tail = self._offer, self.topic.tail
        if self.position >= tail.last_seq:
            return None
        found = tail.after(self.position) if offer is not None else None
        if found is None or offer is None:
            self.wake()  # it takes by itself, or reads the log where there is a hole
            return None
        self.takes(found)
        return found

    def takes(self, found: Frames) -> bool:
        """Write frames that follow its position to the client of a reader that waits; whether it
        let the hub write."""
        offer = self._offer
        if offer is None:
            return False
        self.position = found.last_seq
        if not offer(found):
            self._is_blocked = True
            self.wake()
        if found.is_final:
            self._is_ended = True
            self.wake()
        return True

    def dismiss(self) -> None:
        """Ask the reader to go: its next signal is DISMISSED. Idempotent."""
        self._is_dismissed = True
        self.wake()

    def wake(self) -> None:
        """Let it look for itself what there is to do."""
        self._offer = None
        self.topic.waiting.pop(self, None)
        self._news.set()

    def _signal(self) -> Signal | None:
        """1. What was begun must leave first. 2. The end is an end, also for who is to go."""
        if self._is_blocked:
            self._is_blocked = False
            return Signal.BLOCKED
        if self._is_ended:
            return Signal.END
        return Signal.DISMISSED if self._is_dismissed else None

    async def _from_log(self) -> Frames | None:
        """One page of the log. What is published meanwhile is kept in the tail."""
        reached = max(self._reached, self.topic.tail.last_seq)
        page = await self._hub.pages.after(self.topic.key, self.position)
        if page is None:
            if self.position < reached:
                message = f"the events after {self.position} are no longer stored"
                raise RdevError(ErrorCode.GONE, message)
            self._catch_up()
        return page

    def _from_tail(self) -> Frames | None:
        tail = self.topic.tail
        if self.position >= tail.last_seq:
            return None
        found = tail.after(self.position)
        if found is None:
            self._hub.fell_back += 1
            self.replays = True
        return found

    def _take(self, found: Frames) -> None:
        tail = self.topic.tail
        self.position = found.last_seq
        self._is_ended = found.is_final
        if self.replays and tail.first_seq <= self.position + 1 <= tail.last_seq + 1:
            self.replays = False
        elif self.replays and self._log_end is not None and self.position >= self._log_end:
            self._catch_up()

    def _catch_up(self) -> None:
        """Everything that is not in the log yet will be told."""
        self.replays = False
        if self.position > self.topic.tail.last_seq:
            self.topic.tail.begin(self.position)
            self._hub.mark(self.topic)

    async def _wait(self, offer: Offer | None) -> bool:
        """Wait until there is something to do; False after 15 s without a write."""
        topic = self.topic
        silent_since_s = trio.current_time()
        self._news = trio.Event()
        self._offer = offer
        topic.waiting[self] = None
        try:
            while True:
                if offer is not None:
                    silent_since_s = max(silent_since_s, topic.written_at_s)
                with trio.move_on_at(silent_since_s + HEARTBEAT_S):
                    await self._news.wait()
                if self._news.is_set():
                    return True
                if offer is None or topic.written_at_s <= silent_since_s:
                    break
        finally:
            topic.waiting.pop(self, None)
            self._offer = None
        if trio.current_time() - topic.looked_at_s > HEARTBEAT_S / 2:
            # A lost wake-up costs this much at most.
            topic.is_stale = True
            self._hub.mark(topic)
        return False


async def dismiss_each(readers: Sequence[Subscription[Key]], *, over_s: float) -> None:
    """Ask them all to go: a hundred at once, the others evenly over the time given."""
    pause_s = over_s / max(1, len(readers) - CLOSE_AT_ONCE)
    for number, reader in enumerate(readers):
        if number >= CLOSE_AT_ONCE:
            await trio.sleep(pause_s)
        reader.dismiss()
