"""One reader of one stream (a command's, or a feed): where it stands, and how it is given what
comes next. `Key` names a stream; its positions are numbers that grow.

A reader takes by itself (`receive`); while it waits there, it may let the hub write straight to its
client (`Outlet`). Either way its position is the guard: nothing twice, nothing left out. It holds
no events: what it has not taken yet is in the stream's tail, or in the log.
"""

from collections.abc import Callable, Hashable, Sequence
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.services.stream_group import MEMBERS_MAX, Group, Outlet
from rdev.services.stream_pages import Pages
from rdev.services.stream_tail import Frames, Tail

HEARTBEAT_S = 15.0
# So many streams are closed at once; with more, their clients come back over a while.
CLOSE_AT_ONCE = 100

# So long a delivery loop works before others run.
YIELD_S = 0.002

Key = TypeVar("Key", bound=Hashable)

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
        "groups",
        "is_looking",
        "is_stale",
        "key",
        "looked_at_s",
        "marked_at_s",
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
        # Those that are inside `receive` and wait: each by itself, or in groups.
        self.waiting: dict[Subscription[Key], None] = {}
        self.groups: dict[Group[Subscription[Key]], None] = {}
        # The log may hold more than the tail: somebody else appended.
        self.is_stale = self.is_looking = False
        self.looked_at_s = self.written_at_s = float("-inf")
        self.tally: Tally | None = None
        # Since when there is something that not everybody who waits was written.
        self.marked_at_s: float | None = None

    @property
    def all_wait(self) -> bool:
        """Whether every reader waits."""
        grouped = sum([len(group.members) for group in self.groups])
        return len(self.waiting) + grouped == len(self.readers)

    def all_waiting(self) -> list["Subscription[Key]"]:
        """Those that wait, by themselves or in groups."""
        return [*self.waiting, *(reader for group in self.groups for reader in group.members)]

    def groups_behind(self) -> list[Group["Subscription[Key]"]]:
        """Those that can be written to now; whoever is behind and takes by itself is woken."""
        last_seq = self.tail.last_seq
        for reader in tuple(self.waiting):
            if reader.position < last_seq and not reader.lets_write:
                reader.wake()
        self._gather()
        return [group for group in self.groups if group.position < last_seq]

    def write_to(self, group: Group["Subscription[Key]"]) -> tuple[Frames, int] | None:
        """The next frames to all of a group; what was written, and to how many. None: they have
        left meanwhile, or there is a hole, and they read the log."""
        readers = list(group.members)
        given = self.tail.after(group.position) if readers else None
        if given is None:
            for reader in readers:
                reader.wake()
            return None
        for reader in group.write(given):
            reader.block()
        if given.is_final:
            for reader in readers:
                reader.end()
        self.written_at_s = trio.current_time()
        if self.tally is not None:
            for event_type, events in given.counts.items():
                self.tally(event_type, events * len(readers))
        return given, len(readers)

    def regroup(self) -> None:
        """Groups that have become small are dissolved; their members gather anew."""
        small = [group for group in self.groups if 2 * len(group.members) < MEMBERS_MAX]
        if len(small) > 1:
            for group in small:
                for reader in tuple(group.members):
                    reader.leave_group()
                    self.waiting[reader] = None

    def _gather(self) -> None:
        """Those who wait by themselves and let the hub write join a group where they stand."""
        if not self.waiting:
            return
        open_groups = {group.position: group for group in self.groups if group.has_room}
        for reader in tuple(self.waiting):
            group = open_groups.get(reader.position)
            if group is None or not group.has_room:
                group = Group(reader.position)
            if reader.join(group):
                self.groups[group] = None
                open_groups[group.position] = group

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
    """A reader. Made by `Fanout` and `Feed`."""

    __slots__ = (
        "_group",
        "_hub",
        "_is_blocked",
        "_is_dismissed",
        "_is_ended",
        "_log_end",
        "_news",
        "_outlet",
        "_position",
        "_reached",
        "from_log",
        "replays",
        "topic",
    )

    def __init__(self, topic: Topic[Key], hub: Hub[Key], *, after: int) -> None:
        self.topic = topic
        self._position = after
        self._group: Group[Subscription[Key]] | None = None
        # Whether the log may hold events that the tail does not: at first, and after a hole.
        self.replays = True
        # Whether the frames that `receive` gave last were read from the log.
        self.from_log = False
        self._hub = hub
        self._log_end: int | None = None
        self._reached = after
        self._news = trio.Event()
        self._outlet: Outlet | None = None
        self._is_blocked = self._is_ended = False
        self._is_dismissed = hub.draining

    @property
    def position(self) -> int:
        """The last event it was given."""
        return self._position if self._group is None else self._group.position

    @property
    def lets_write(self) -> bool:
        """Whether it waits and the hub may write to its client."""
        return self._outlet is not None

    async def receive(self, outlet: Outlet | None = None) -> Frames | Signal:
        """The next frames, in order, without a hole or a double; or a signal.

        END after the final frames; DISMISSED when the reader was asked to go; HEARTBEAT after 15 s
        of silence. With `outlet` the hub writes by itself while nothing else is to be done;
        BLOCKED then says that the client did not take everything: what was kept must leave
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
            if not await self._wait(outlet):
                return Signal.HEARTBEAT

    def log_reaches(self, last_seq: int) -> None:
        """The log has had all events up to there: where it has them no more, they were pruned."""
        self._reached = max(self._reached, last_seq)

    def log_ends(self, last_seq: int) -> None:
        """The log was seen to end there after this reader had subscribed; saves a look at it."""
        self._log_end = last_seq
        if self.position >= last_seq:
            self._catch_up()

    def join(self, group: Group["Subscription[Key]"]) -> bool:
        """Be written to with a group from now on; whether it lets the hub write at all."""
        if self._outlet is None:
            return False
        del self.topic.waiting[self]
        group.add(self, self._outlet)
        self._group = group
        return True

    def leave_group(self) -> None:
        """Stand by itself, where the group stood. Idempotent."""
        group, self._group = self._group, None
        if group is not None:
            self._position = group.position
            group.remove(self)
            if not group.members:
                self.topic.groups.pop(group, None)

    def block(self) -> None:
        """The hub wrote, and the client did not take everything."""
        self._is_blocked = True
        self.wake()

    def end(self) -> None:
        """The hub wrote the final frames."""
        self._is_ended = True
        self.wake()

    def dismiss(self) -> None:
        """Ask the reader to go: its next signal is DISMISSED. Idempotent."""
        self._is_dismissed = True
        self.wake()

    def wake(self) -> None:
        """Let it look for itself what there is to do."""
        self.stop_waiting()
        self._news.set()

    def stop_waiting(self) -> None:
        """From now on nothing is written to its client by the hub. Idempotent."""
        self._outlet = None
        self.leave_group()
        self.topic.waiting.pop(self, None)

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
        self.from_log = self.replays
        self._position = found.last_seq
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

    async def _wait(self, outlet: Outlet | None) -> bool:
        """Wait until there is something to do; False after 15 s without a write."""
        topic = self.topic
        silent_since_s = trio.current_time()
        self._news = trio.Event()
        self._outlet = outlet
        topic.waiting[self] = None
        try:
            while True:
                if outlet is not None:
                    silent_since_s = max(silent_since_s, topic.written_at_s)
                with trio.move_on_at(silent_since_s + HEARTBEAT_S):
                    await self._news.wait()
                if self._news.is_set():
                    return True
                if outlet is None or topic.written_at_s <= silent_since_s:
                    break
        finally:
            self.stop_waiting()
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


async def let_others_run(moment_s: float) -> float:
    """Let others run where the moment has come; when to do so next."""
    if trio.current_time() < moment_s:
        return moment_s
    await trio.lowlevel.checkpoint()
    return trio.current_time() + YIELD_S
