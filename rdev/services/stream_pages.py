"""Pages of the log that many readers want at once: read and framed once.

Bounds: bytes of a page, and bytes of the pages that are remembered (the least recently wanted goes
first; small ones for a second only, since later readers would take small steps). A page is a fact:
committed events after a number. That a page is empty is none: it is told only to those who asked
before the read began.
"""

from collections import OrderedDict
from math import inf

import trio

from rdev.domain.ids import CommandId
from rdev.ports.output import OutputLog
from rdev.services.stream_tail import Frames, framed, join

PAGE_BYTES = 262_144
REMEMBERED_BYTES = 8 * 1024 * 1024
SMALL_PAGE_S = 1.0

_Key = tuple[CommandId, int]


class _Reading:
    """A read under way; `page` is what it brought, None for nothing."""

    __slots__ = ("done", "page", "succeeded")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.succeeded = False
        self.page: Frames | None = None


class Pages:
    """The log, read in pages."""

    def __init__(
        self,
        log: OutputLog,
        *,
        page_bytes: int = PAGE_BYTES,
        remembered_bytes: int = REMEMBERED_BYTES,
    ) -> None:
        """`page_bytes` of payload are read at once."""
        self.reads = 0
        self._log = log
        self._page_bytes = page_bytes
        self._room_bytes = remembered_bytes
        self._under_way: dict[_Key, _Reading] = {}
        # Each with the time until which it is good.
        self._remembered: OrderedDict[_Key, tuple[Frames, float]] = OrderedDict()

    async def after(self, command: CommandId, position: int) -> Frames | None:
        """The events after `position`, or None when there were none when it was asked.

        Errors: as `OutputLog.read`. Cancellation: whoever waits for the same read begins it anew.
        """
        key = command, position
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

    async def _read(self, key: _Key) -> Frames | None:
        command, position = key
        reading = self._under_way[key] = _Reading()
        self.reads += 1
        try:
            chunks = await self._log.read(command, after=position, limit_bytes=self._page_bytes)
            reading.succeeded = True
            if chunks:
                reading.page = join([framed(chunk, after=position) for chunk in chunks])
                self._remember(key, reading.page)
            return reading.page
        finally:
            if self._under_way.get(key) is reading:
                del self._under_way[key]
            reading.done.set()

    def _known(self, key: _Key) -> Frames | None:
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

    def _remember(self, key: _Key, page: Frames) -> None:
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
