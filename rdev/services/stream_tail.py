"""The newest events of one stream, framed once for all who watch it.

What a publisher hands over is kept here until everybody has written it, at most `limit_bytes`: the
buffer of every reader is what lies behind its position. Whoever is further behind reads the log.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rdev.domain.sse import frames
from rdev.domain.stream import Chunk

# What one write carries, where that much is pending (a single chunk may be more).
JOIN_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Encoded SSE frames of the events up to `last_seq`; `counts` by type of event.

    The same object is given to every reader that stands before `first_seq`.
    """

    data: bytes
    first_seq: int
    last_seq: int
    is_final: bool
    counts: Mapping[str, int]


def framed(chunk: Chunk | Frames, *, after: int) -> Frames:
    """The chunk without the events numbered `after` or less; frames as they are."""
    if isinstance(chunk, Frames):
        return chunk
    return Frames(
        data=frames(chunk.payload, chunk.first_seq, chunk.last_seq, after=after),
        first_seq=max(chunk.first_seq, after + 1),
        last_seq=chunk.last_seq,
        is_final=chunk.is_final,
        counts=chunk.event_counts,
    )


def join(parts: Sequence[Frames]) -> Frames:
    """Frames that follow each other as one."""
    if len(parts) == 1:
        return parts[0]
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    return Frames(
        data=b"".join([part.data for part in parts]),
        first_seq=parts[0].first_seq,
        last_seq=parts[-1].last_seq,
        is_final=parts[-1].is_final,
        counts=counts,
    )


class _Kept:
    """A published chunk, framed when the first reader comes for it, or a page of the log."""

    __slots__ = ("first_seq", "last_seq", "size_bytes", "source")

    def __init__(self, source: Chunk | Frames, size_bytes: int) -> None:
        self.first_seq = source.first_seq
        self.last_seq = source.last_seq
        self.size_bytes = size_bytes
        self.source = source

    def framed(self) -> Frames:
        if isinstance(self.source, Chunk):
            self.source = framed(self.source, after=self.first_seq - 1)
        return self.source


class Tail:
    """A run of events without holes; `last_seq` is where it ends, 0 while nothing is known."""

    def __init__(self, *, limit_bytes: int) -> None:
        """Empty; holds at most `limit_bytes`, and always the newest chunk."""
        self.last_seq = 0
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._kept: deque[_Kept] = deque()
        # What was given last; most readers stand at the same place.
        self._given: Frames | None = None

    @property
    def first_seq(self) -> int:
        """The oldest event it holds; one past `last_seq` when it holds none."""
        return self._kept[0].first_seq if self._kept else self.last_seq + 1

    def append(self, chunk: Chunk) -> None:
        """Keep a committed chunk."""
        self._keep(_Kept(chunk, len(chunk.payload)))

    def append_page(self, page: Frames) -> None:
        """Keep a page of the log."""
        self._keep(_Kept(page, len(page.data)))

    def begin(self, last_seq: int) -> None:
        """The log was seen to end here, and whatever comes later will be told."""
        if last_seq > self.last_seq:
            self._clear()
            self.last_seq = last_seq

    def forget(self, position: int) -> None:
        """Let go of what everybody has up to `position`."""
        while self._kept and self._kept[0].last_seq <= position:
            self.size_bytes -= self._kept.popleft().size_bytes
        if not self._kept:
            self._given = None

    def after(self, position: int) -> Frames | None:
        """The next frames for whoever has everything up to `position`; None when the log must be
        read. Ask only where `position` is below `last_seq`."""
        given = self._given
        if given is not None and given.first_seq == position + 1:
            return given
        at = bisect_left(self._kept, position + 1, key=_last_seq)
        # Inside of a chunk stands only who asked for a number there; the log knows how to begin.
        if at == len(self._kept) or self._kept[at].first_seq != position + 1:
            return None
        self._given = given = self._joined(at)
        return given

    def _keep(self, kept: _Kept) -> None:
        """1. Known already: nothing. 2. It continues the run: kept, the oldest make room. 3. A hole
        before it: the run begins anew, and whoever stands behind the hole reads the log."""
        if kept.last_seq <= self.last_seq:
            return
        if kept.first_seq != self.last_seq + 1:
            self._clear()
        self._kept.append(kept)
        self.size_bytes += kept.size_bytes
        self.last_seq = kept.last_seq
        while self.size_bytes > self._limit_bytes and len(self._kept) > 1:
            self.size_bytes -= self._kept.popleft().size_bytes

    def _clear(self) -> None:
        self._kept.clear()
        self._given = None
        self.size_bytes = 0

    def _joined(self, at: int) -> Frames:
        """From one chunk on, until a write is full."""
        parts: list[Frames] = []
        size_bytes = 0
        for index in range(at, len(self._kept)):
            part = self._kept[index].framed()
            size_bytes += len(part.data)
            if parts and size_bytes > JOIN_BYTES:
                break
            parts.append(part)
        return join(parts)


def _last_seq(kept: _Kept) -> int:
    return kept.last_seq
