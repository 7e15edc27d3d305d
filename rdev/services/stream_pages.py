"""Pages of the log that many readers want at once: read and framed once.

Bounds: bytes of a page, and bytes of the pages that are remembered (the least recently wanted goes
first; small ones for a second only, since later readers would take small steps). A page is a fact:
committed events after a number. That a page is empty is none: it is told only to those who asked
before the read began.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from math import inf
from typing import Generic, Protocol, TypeVar

import trio

from rdev.domain.stream import Chunk
from rdev.services.stream_tail import Frames, framed, join

PAGE_BYTES = 262_144
REMEMBERED_BYTES = 8 * 1024 * 1024
SMALL_PAGE_S = 1.0

Key = TypeVar("Key", bound=Hashable)
_Named = TypeVar("_Named", contravariant=True)


class Log(Protocol[_Named]):
    """What pages are read from: `OutputLog`, or a feed."""

    async def read(
        self, key: _Named, /, *, after: int, limit_bytes: int
    ) -> Sequence[Chunk] | Sequence[Frames]:
        """What follows a position, in order, until `limit_bytes` of it; the first may begin
        earlier where it is a chunk."""
        ...


class _Reading:
    """A read under way; `page` is what it brought, None for nothing."""

    __slots__ = ("done", "page", "succeeded")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.succeeded = False
        self.page: Frames | None = None


class Pages(Generic[Key]):
    """The log, read in pages."""

    def __init__(
        self,
        log: Log[Key],
        *,
        page_bytes: int = PAGE_BYTES,
        remembered_bytes: int = REMEMBERED_BYTES,
    ) -> None:
        """`page_bytes` of payload are read at once."""
        self.reads = 0
        self._log = log
        self._page_bytes = page_bytes
        self._room_bytes = remembered_bytes
        self._under_way: dict[tuple[Key, int], _Reading] = {}
        # Each with the time until which it is good.
        self._remembered: OrderedDict[tuple[Key, int], tuple[Frames, float]] = OrderedDict()

    async def after(self, name: Key, position: int) -> Frames | None:
        """The events after `position`, or None when there were none when it was asked.

        Errors: as the log's `read`. Cancellation: whoever waits for the same read begins it anew.
        """
        key = name, position
        known = self._known(key)
        if known is not None:
            # Whoever replays a long history out of memory lets the others run too.
            await trio.lowlevel.checkpoint()
            return known
        began_after_us = False
        while (reading := self._under_way.get(key)) is not None:
            await reading.done.wait()
            if reading.page is not None or (reading.succeeded and began_after_us):
                return reading.page
            began_after_us = True
        return await self._read(key)

    async def _read(self, key: tuple[Key, int]) -> Frames | None:
        name, position = key
        reading = self._under_way[key] = _Reading()
        self.reads += 1
        try:
            chunks = await self._log.read(name, after=position, limit_bytes=self._page_bytes)
            reading.succeeded = True
            if chunks:
                reading.page = join([framed(chunk, after=position) for chunk in chunks])
                self._remember(key, reading.page)
            return reading.page
        finally:
            if self._under_way.get(key) is reading:
                del self._under_way[key]
            reading.done.set()

    def _known(self, key: tuple[Key, int]) -> Frames | None:
        found = self._remembered.get(key)
        if found is None:
            return None
        page, until_s = found
        if trio.current_time() >= until_s:
            del self._remembered[key]
            self._room_bytes += _size_bytes(page)
            return None
        self._remembered.move_to_end(key)
        return page

    def _remember(self, key: tuple[Key, int], page: Frames) -> None:
        is_small = len(page.data) < self._page_bytes // 2
        until_s = trio.current_time() + SMALL_PAGE_S if is_small else inf
        replaced = self._remembered.pop(key, None)
        if replaced is not None:
            self._room_bytes += _size_bytes(replaced[0])
        self._remembered[key] = page, until_s
        self._room_bytes -= _size_bytes(page)
        while self._room_bytes < 0:
            self._room_bytes += _size_bytes(self._remembered.popitem(last=False)[1][0])


def _size_bytes(page: Frames) -> int:
    """What a page takes in memory, about."""
    return len(page.data) + 500
