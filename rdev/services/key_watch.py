"""SUBSYSTEM KeyWatch: sees when a key stops being good, and writes when keys were last used.

Whoever holds something open for a key (a stream) watches it. Woken when a key is changed, here or
elsewhere, and every `TICK_S`, it asks for all watched credentials in one statement (none where
nothing is watched); so a revocation ends what it must within `TICK_S` + `LOOK_S`, also where
every notification is lost. An end that is known beforehand (expiry, grace, the end of a session or
a stream token) needs no database.
`last_used_at` is collected and written with the tick, so that no request waits for it: for each key
at most once in `USED_EVERY_S`. Bounds: watchers are bounded by the HTTP edge, what is collected by
the keys that were used within the last minute.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

import trio

from rdev.domain.errors import RdevError
from rdev.domain.ids import KeyId
from rdev.domain.keys import KeyEnd, Principal, Standing
from rdev.ports.keys import USED_EVERY_S, KeyStore
from rdev.services.beat import next_beat_s

TICK_S = 2.0
# A statement that takes longer has failed; with the tick it stays within the 5 s of the contract.
LOOK_S = 2.0
# Between two looks, however often it is woken.
PAUSE_S = 0.05
# The tick that writes may come this much later than the use: two writes are never too close.
_NOTE_EVERY_S = USED_EVERY_S + TICK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyWatchStatistics:
    """Credentials watched now; since the start: looks, looks that failed, ends told of."""

    watched: int
    looks: int
    failures: int
    ended: int


@dataclass(slots=True, kw_only=True, eq=False)
class Watch:
    """One watcher of one credential. `ended` is set once `reason` is."""

    on_end: Callable[[KeyEnd], None] | None = None
    # When the credential ends although its key does not (`Principal.ends_at`).
    ends_at: datetime | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    reason: KeyEnd | None = None

    def end(self, reason: KeyEnd) -> None:
        """Tell it, once."""
        if self.reason is None:
            self.reason = reason
            self.ended.set()
            if self.on_end is not None:
                self.on_end(reason)


@dataclass(slots=True)
class _Watched:
    """One credential, and when its end is due as far as is known."""

    watches: set[Watch] = field(default_factory=set)
    ended: KeyEnd | None = None
    ends_at_s: float = float("inf")
    ends_as: KeyEnd = KeyEnd.EXPIRED


class KeyWatch:
    """See the module."""

    name = "keys"

    def __init__(self, *, store: KeyStore, now: Callable[[], datetime]) -> None:
        self._store = store
        self._now = now
        self._watched: dict[str, _Watched] = {}
        self._ending: set[Watch] = set()
        # When each key was last collected, and what is not yet written.
        self._noted_at_s: dict[KeyId, float] = {}
        self._used: set[KeyId] = set()
        self._work = trio.Event()
        self._stop = trio.Event()
        self._looks = self._failures = self._ended = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look until `stop`, then write what is left. Survives a database that is gone."""
        task_status.started()
        again_at_s = 0.0
        while not self._stop.is_set():
            with trio.move_on_at(next_beat_s(TICK_S)):
                await self._work.wait()
            if trio.current_time() < again_at_s:
                with trio.move_on_at(again_at_s):
                    await self._stop.wait()
            self._work = trio.Event()
            await self.run_once()
            again_at_s = trio.current_time() + PAUSE_S
        await self._write_used()

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()
        self._work.set()

    def wake(self) -> None:
        """A key may have changed. Never waits."""
        self._work.set()

    @contextmanager
    def watch(
        self, principal: Principal, on_end: Callable[[KeyEnd], None] | None = None
    ) -> Iterator[Watch]:
        """Watch the credential of an authenticated request for the length of the block.

        When it stops being good, `ended` is set and `on_end` called, once; `on_end` never waits.
        The bootstrap key never ends, but a session or a token of it does.
        """
        watch = Watch(on_end=on_end, ends_at=principal.ends_at)
        if watch.ends_at is not None:
            self._ending.add(watch)
        try:
            if principal.public_id is None:
                yield watch
            else:
                with self._watching(principal.public_id, watch):
                    yield watch
        finally:
            self._ending.discard(watch)

    @contextmanager
    def _watching(self, public_id: str, watch: Watch) -> Iterator[None]:
        """Watch one secret of a key."""
        watched = self._watched.get(public_id)
        if watched is None:
            # The request may have been let in by what was true up to the cache's TTL ago.
            watched = self._watched[public_id] = _Watched()
            self.wake()
        watched.watches.add(watch)
        if watched.ended is not None:
            watch.end(watched.ended)
        try:
            yield
        finally:
            watched.watches.discard(watch)
            if not watched.watches and self._watched.get(public_id) is watched:
                del self._watched[public_id]

    def used(self, key: KeyId, now_s: float) -> None:
        """The key was used now (`trio.current_time()`). Never waits."""
        if now_s >= self._noted_at_s.get(key, float("-inf")) + _NOTE_EVERY_S:
            self._noted_at_s[key] = now_s
            self._used.add(key)

    async def run_once(self) -> None:
        """Look once at all that is watched, and write what was used."""
        # Before the look too: where the database hangs, look and write take `LOOK_S` each.
        self._end_due()
        await self._look()
        self._end_due()
        await self._write_used()

    def statistics(self) -> KeyWatchStatistics:
        """What is and what was."""
        return KeyWatchStatistics(
            watched=len(self._watched),
            looks=self._looks,
            failures=self._failures,
            ended=self._ended,
        )

    def _end_due(self) -> None:
        """Tell of the ends that were known beforehand."""
        now_s = trio.current_time()
        for watched in list(self._watched.values()):
            if now_s >= watched.ends_at_s:
                self._end(watched, watched.ends_as)
        now = self._now()
        self._end_each([w for w in self._ending if w.ends_at and now >= w.ends_at], KeyEnd.EXPIRED)

    async def _look(self) -> None:
        asked = dict(self._watched)
        if not asked:
            return
        began_s = trio.current_time()
        self._looks += 1
        try:
            with trio.fail_after(LOOK_S):
                standings = await self._store.standings(asked.keys())
        except (RdevError, trio.TooSlowError):
            self._failures += 1
            return
        gone = Standing(ended=KeyEnd.REVOKED)
        for public_id, watched in asked.items():
            standing = standings.get(public_id, gone)
            if standing.ended is not None:
                self._end(watched, standing.ended)
            elif standing.good_for_s is not None:
                watched.ends_at_s = began_s + standing.good_for_s
                watched.ends_as = standing.ends_as

    def _end(self, watched: _Watched, reason: KeyEnd) -> None:
        watched.ended = reason
        self._end_each(list(watched.watches), reason)

    def _end_each(self, watches: Sequence[Watch], reason: KeyEnd) -> None:
        for watch in watches:
            self._ended += watch.reason is None
            watch.end(reason)

    async def _write_used(self) -> None:
        used, self._used = self._used, set()
        if not used:
            return
        try:
            with trio.fail_after(LOOK_S):
                await self._store.note_used(used)
        except (RdevError, trio.TooSlowError):
            self._failures += 1
            self._used |= used
        old_s = trio.current_time() - _NOTE_EVERY_S
        for key in [key for key, at_s in self._noted_at_s.items() if at_s <= old_s]:
            del self._noted_at_s[key]
