"""One command being observed, over any transport: connects, reads frames, connects again.

A pump in its own nursery owns the exec (an exec may not outlive the task that opened it, and
`receive` is called under other people's deadlines). Between pump and reader is a channel without
room: the pump holds one read of at most 64 KiB, the pipe and the journal hold the rest.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import trio
import trio.abc

from rdev.adapters.execution.frames import Alive, Frame, FrameDecoder, Hello, ProtocolError
from rdev.adapters.execution.transport import Streams, TransportError
from rdev.domain.execution import Exit, Lost, LostReason, Offsets, Piece, Stream

_READ_BYTES: Final = 65_536
_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_MOST_S: Final = 2.0

_TOLD_MOST_S: Final = 5.0  # of a pause that the place asks for

_BROKEN: Final = (ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When an exec is given up, and when the place is.

    `heartbeat_s`: how often the project is asked for a sign; it also bounds how late the death of a
    supervisor is seen. `silence_s`: an exec that says nothing for so long is broken (a half-open
    connection). `unreachable_s`: how long connecting may fail before the command is lost. `away_s`:
    the same for the time in which no place at all can be reached, which says nothing of this one.
    """

    heartbeat_s: float = 5.0
    silence_s: float = 20.0
    unreachable_s: float = 30.0
    away_s: float = 3_600.0


@dataclass(slots=True)
class _Failures:
    """Tries in a row that brought no sign of life, since when, and for how long of it no place
    could be reached."""

    since_s: float
    away_s: float = 0.0
    failed_s: float = 0.0
    tries: int = 0

    def are_too_many(self, patience: Patience, *, is_away: bool) -> bool:
        """After one more that failed."""
        now_s = trio.current_time()
        took_s, self.since_s = now_s - self.since_s, now_s
        if is_away:
            self.away_s += took_s
        else:
            self.failed_s += took_s
            self.tries += 1
        return self.failed_s >= patience.unreachable_s or self.away_s >= patience.away_s


# Opens the exec that attaches at these offsets, and what is sent to it first.
Open = Callable[[Offsets], AbstractAsyncContextManager[Streams]]


class ScriptAttachment:
    """Implements `Attachment`; an async context manager around the observation."""

    def __init__(
        self,
        open_exec: Open,
        payload: Sequence[bytes],
        offsets: Offsets,
        patience: Patience,
        *,
        is_away: Callable[[], bool] = lambda: False,
        again: Callable[[], None] = lambda: None,
    ) -> None:
        """`payload` is sent in order on each connect; nothing is opened before the block. `is_away`
        says whether no place at all can be reached now; `again` is told of each connect but the
        first."""
        self._is_away = is_away
        self._again = again
        self._open = open_exec
        self._payload = payload
        self._at = {Stream.STDOUT: offsets.stdout, Stream.STDERR: offsets.stderr}
        self._patience = patience
        self._send, self._receive = trio.open_memory_channel[Piece | Exit | Lost](0)
        self._nursery_manager = trio.open_nursery()
        self._stdin: trio.abc.SendStream | None = None  # of the exec that is being followed
        self._signs = 0  # of life, from any exec

    async def __aenter__(self) -> "ScriptAttachment":
        """Begin to observe."""
        nursery = await self._nursery_manager.__aenter__()
        self._scope = nursery.cancel_scope
        nursery.start_soon(self._pump)
        nursery.start_soon(self._beat)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the observation. The block's own error passes by, in no group."""
        self._scope.cancel()
        await self._nursery_manager.__aexit__(None, None, None)  # noqa: ASYNC102  # the nursery was cancelled

    async def receive(self) -> Piece | Exit | Lost:
        """See `Attachment.receive`."""
        return await self._receive.receive()

    async def _pump(self) -> None:
        """One exec after the other until the end is delivered."""
        pause_s, failures = _BACKOFF_FIRST_S, _Failures(since_s=trio.current_time())
        while True:
            before, told_s = self._signs, 0.0
            try:
                if await self._observe_once():
                    return
            except TransportError as error:
                told_s = min(error.retry_after_s, _TOLD_MOST_S)
            except _BROKEN:
                pass  # the end of an exec says nothing about the command: ask again
            finally:
                self._stdin = None
            if self._signs != before:
                pause_s, failures = _BACKOFF_FIRST_S, _Failures(since_s=trio.current_time())
            elif failures.are_too_many(self._patience, is_away=self._is_away()):
                reason = LostReason.UNREACHABLE
                await self._send.send(Lost(reason=reason, may_still_run=True, tries=failures.tries))
                return
            await trio.sleep(told_s + pause_s * random.uniform(0.5, 1))
            pause_s = min(pause_s * 2, _BACKOFF_MOST_S)
            self._again()

    async def _observe_once(self) -> bool:
        """Follow one exec; whether the end was delivered. Errors: those of a broken exec."""
        offsets = Offsets(stdout=self._at[Stream.STDOUT], stderr=self._at[Stream.STDERR])
        decoder = FrameDecoder(offsets)
        async with self._open(offsets) as streams:
            with self._unless_silent():
                for part in self._payload:
                    await streams.stdin.send_all(part)
            self._stdin = streams.stdin
            while True:
                with self._unless_silent():
                    data = await streams.stdout.receive_some(_READ_BYTES)
                if not data:
                    return False
                for frame in decoder.feed(bytes(data)):
                    if await self._deliver(frame):
                        return True

    async def _deliver(self, frame: Frame) -> bool:
        """Whether this was the end. Blocks while the reader does not ask: the back-pressure."""
        match frame:
            case Hello():
                return False
            case Alive():
                self._signs += 1
                return False
            case Piece():
                self._signs += 1
                self._at[frame.stream] += len(frame.data)
                await self._send.send(frame)
                return False
            case Exit() | Lost():
                await self._send.send(frame)
                return True

    async def _beat(self) -> None:
        """Ask for a sign of life; also while the reader pauses, so that no proxy cuts the exec."""
        while True:
            await trio.sleep(self._patience.heartbeat_s)
            try:
                if self._stdin is not None:
                    await self._stdin.send_all(b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the pump sees it too

    @contextmanager
    def _unless_silent(self) -> Iterator[None]:
        """Errors: TransportError when the block takes longer than `silence_s`."""
        with trio.move_on_after(self._patience.silence_s) as scope:
            yield
        if scope.cancelled_caught:
            raise TransportError("the exec is silent")
