"""A repository with a short memory, which every request may ask.

What was read is good for `ttl_s` from the moment the reading began, or until an invalidation, which
may be lost: then the TTL is the bound. One load for each key at a time; whoever comes meanwhile
waits for it. An invalidation during a load wins: what that load brings is given to its caller, who
asked before, and to nobody else. Bounds: `size_max` entries that were found, and as many that were
not (so that made-up keys push out no real ones); the oldest goes first. A load has `LOAD_S`: a
database can be silent without being gone.
"""

from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from rdev.domain.errors import ErrorCode, RdevError

TTL_S = 5.0
SIZE_MAX = 10_000
# A load that takes longer has failed: nobody waits for a dead network.
LOAD_S = 5.0

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedStatistics:
    """Entries now; since the start: loads, those that failed, and entries that were invalidated."""

    entries: int
    hits: int
    loads: int
    failures: int
    invalidated: int


@dataclass(slots=True)
class _Load:
    """One load under way."""

    done: trio.Event = field(default_factory=trio.Event)
    failure: RdevError | None = None


class Cached(Generic[K, V]):
    """See the module. `None` is remembered like everything else."""

    def __init__(
        self,
        load: Callable[[K], Awaitable[V | None]],
        *,
        tag: Callable[[K, V | None], str | None],
        ttl_s: float = TTL_S,
        size_max: int = SIZE_MAX,
    ) -> None:
        """`tag` names what an entry is invalidated by; None: by `flush` alone."""
        self._load = load
        self._tag = tag
        self._ttl_s, self._size_max = ttl_s, size_max
        # What was found and what was not, each with the time until which it is good, oldest first.
        self._found: dict[K, tuple[V, float]] = {}
        self._missing: dict[K, float] = {}
        self._tagged: dict[str, set[K]] = {}
        self._loads: dict[K, _Load] = {}
        self._generation = 0
        self._hits = self._load_count = self._failures = self._invalidated = 0

    def peek(self, key: K) -> V | None:
        """What is remembered now; None also where that is nothing."""
        entry = self._found.get(key)
        return entry[0] if entry is not None and trio.current_time() < entry[1] else None

    async def get(self, key: K) -> V | None:
        """What the repository has, or had at most `ttl_s` ago.

        Errors: those of the load, the same for all who waited for it; SERVICE_UNAVAILABLE when it
        takes more than `LOAD_S`; nothing is remembered then.
        Cancellation: of the one who loads: another one who waits loads.
        Blocks: as long as the load does.
        """
        while True:
            now_s = trio.current_time()
            entry = self._found.get(key)
            if entry is not None and now_s < entry[1]:
                self._hits += 1
                return entry[0]
            if now_s < self._missing.get(key, now_s):
                self._hits += 1
                return None
            under_way = self._loads.get(key)
            if under_way is None:
                return await self._load_now(key)
            await under_way.done.wait()
            if (failure := under_way.failure) is not None:
                raise RdevError(failure.code, failure.message, retry_after_s=failure.retry_after_s)
            # It is stored now, unless it was invalidated or took too long: then it is read again.

    def invalidate(self, tags: Iterable[str]) -> None:
        """What bears these tags has changed, and was committed. Never waits."""
        self._generation += 1
        for tag in tags:
            for key in list(self._tagged.get(tag, ())):
                self._forget(key)
                self._invalidated += 1

    def flush(self) -> None:
        """Anything may have changed."""
        self._generation += 1
        self._invalidated += len(self._found) + len(self._missing)
        self._found.clear()
        self._missing.clear()
        self._tagged.clear()

    def statistics(self) -> CachedStatistics:
        """What is and what was."""
        return CachedStatistics(
            entries=len(self._found) + len(self._missing),
            hits=self._hits,
            loads=self._load_count,
            failures=self._failures,
            invalidated=self._invalidated,
        )

    async def _load_now(self, key: K) -> V | None:
        load = self._loads[key] = _Load()
        generation = self._generation
        until_s = trio.current_time() + self._ttl_s
        self._load_count += 1
        try:
            value = await self._bounded(key)
        except RdevError as error:
            self._failures += 1
            load.failure = error
            raise
        else:
            if generation == self._generation:
                self._store(key, value, until_s)
            return value
        finally:
            del self._loads[key]
            load.done.set()

    async def _bounded(self, key: K) -> V | None:
        with trio.move_on_after(LOAD_S):
            return await self._load(key)
        message = f"the database did not answer within {LOAD_S:g} s"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=1.0)

    def _store(self, key: K, value: V | None, until_s: float) -> None:
        self._forget(key)
        if value is None:
            self._missing[key] = until_s
        else:
            self._found[key] = value, until_s
        tag = self._tag(key, value)
        if tag is not None:
            self._tagged.setdefault(tag, set()).add(key)
        if len(self._missing) > self._size_max:
            self._forget(next(iter(self._missing)))
        if len(self._found) > self._size_max:
            self._forget(next(iter(self._found)))

    def _forget(self, key: K) -> None:
        if key in self._found:
            value: V | None = self._found.pop(key)[0]
        elif key in self._missing:
            value = None
            del self._missing[key]
        else:
            return
        tag = self._tag(key, value)
        if tag is not None:
            keys = self._tagged[tag]
            keys.discard(key)
            if not keys:
                del self._tagged[tag]
