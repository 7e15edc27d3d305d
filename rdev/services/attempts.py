"""One attempt: attach, hand its output to the appender, and end the command with what was read.

Started at most once, observed at least once: an attempt that is interrupted anywhere (restart,
lost lease, cancelled task) leaves the command running, and the next one continues at the offsets
that the log holds. Bounds: pieces ≤ 1 MiB, one in hand; an unfinished line is shown after 100 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.claude import AgentLines, AgentSplitter
from rdev.domain.commands import AgentReport, Claimed, Kind, Outcome, judge
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Exit, KillReport, Lost, Piece, Stream
from rdev.domain.lines import Encoded, LineSplitter
from rdev.domain.stream import CHUNK_MAX_BYTES, Source, final_lines
from rdev.ports.commands import Leases
from rdev.ports.execution import Executor
from rdev.ports.output import NewChunk, OutputLog
from rdev.services.appender import SOURCE, Writer

# A line without its end is shown after this much silence (the contract).
PARTIAL_AFTER_S = 0.1
# A CLI that does not exit after its `result` is ended (claude-code#25629 and others).
HANG_AFTER_RESULT_S = 30.0
KILL_GRACE_S = 5
# One page of the log when it is read again after a take-over.
REPLAY_BYTES = 1_048_576


class Splitter(Protocol):
    """Bytes of one journal in, encoded events out (`LineSplitter`, `AgentSplitter`)."""

    def feed(self, data: bytes) -> Encoded: ...

    def flush(self, *, idle: bool = False) -> Encoded: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What an attempt came to, for metrics and logs."""

    claimed: Claimed
    outcome: Outcome


class Attempt:
    """One claimed command being observed. `run` is called once."""

    def __init__(
        self,
        *,
        claimed: Claimed,
        writer: Writer,
        executor: Executor,
        leases: Leases,
        log: OutputLog,
        backoff: Callable[[], Backoff],
    ) -> None:
        self.claimed = claimed
        self._writer = writer
        self._executor = executor
        self._leases = leases
        self._log = log
        self._backoff = backoff
        self._agent = AgentSplitter() if claimed.kind is Kind.CLAUDE else None
        self._splitters: dict[Stream, Splitter] = {
            Stream.STDOUT: self._agent or LineSplitter(Stream.STDOUT),
            Stream.STDERR: LineSplitter(Stream.STDERR),
        }
        self._slices = {Stream.STDOUT: _SliceSize(), Stream.STDERR: _SliceSize()}
        self._unfinished: set[Stream] = set()
        self._cancel = trio.Event()
        self._kill: KillReport | None = None
        self._cancel_asked = claimed.cancel_requested
        if claimed.cancel_requested:
            self._cancel.set()

    def cancel(self) -> None:
        """End the command: TERM, grace, KILL. The attempt goes on until the end is read."""
        self._cancel_asked = True
        self._cancel.set()

    async def run(self) -> Finished:
        """Observe the command to its end and store the outcome.

        Errors: LeaseLostError when another server took over; SERVICE_UNAVAILABLE when the project
        or the database is out of reach at the beginning (the lease is then given back).
        Cancellation: at any point; the command goes on, and what was committed stays.
        """
        instance = await self._instance()
        await self._replay()
        send, receive = trio.open_memory_channel[Piece | Exit | Lost](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._observe, instance, send)
            nursery.start_soon(self._obey_cancel)
            outcome = await self._store(receive)
            nursery.cancel_scope.cancel()
        return Finished(claimed=self.claimed, outcome=outcome)

    async def _instance(self) -> str:
        """What the project is; recorded before anything can start in it."""
        if self.claimed.instance is not None:
            return self.claimed.instance
        instance = await self._executor.instance(self.claimed.project)
        if not await self._leases.record_instance(self.claimed.lease, instance):
            message = f"{self.claimed.lease.command} was taken over before it began"
            raise RdevError(ErrorCode.CONFLICT, message)
        return instance

    async def _replay(self) -> None:
        """After a take-over the agent's stream is read again as far as it is stored."""
        if self._agent is None or not self.claimed.take_over:
            return
        after = 0
        while chunks := await self._log.read(
            self.claimed.lease.command, after=after, limit_bytes=REPLAY_BYTES
        ):
            after = chunks[-1].last_seq
            for chunk in chunks:
                if chunk.source is Source.STDOUT:
                    self._agent.replay(chunk.payload)

    async def _observe(
        self, instance: str, send: trio.MemorySendChannel[Piece | Exit | Lost]
    ) -> None:
        """Hand on what the attachment gives; a full channel is the back-pressure."""
        attachment = self._executor.attach(
            self.claimed.project,
            self.claimed.lease.command,
            spec=self.claimed.spec,
            instance=instance,
            offsets=self.claimed.offsets,
        )
        async with attachment as attached:
            while True:
                item = await attached.receive()
                await send.send(item)
                if not isinstance(item, Piece):
                    return

    async def _obey_cancel(self) -> None:
        """A place that cannot be reached is asked again until the attempt ends."""
        await self._cancel.wait()
        backoff = self._backoff()
        while True:
            try:
                self._kill = await self._executor.kill(
                    self.claimed.project, self.claimed.lease.command, grace_s=KILL_GRACE_S
                )
                return
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
            await trio.sleep(backoff.next_s())

    async def _store(self, receive: trio.MemoryReceiveChannel[Piece | Exit | Lost]) -> Outcome:
        while True:
            item = await self._next(receive)
            match item:
                case None:
                    await self._flush(idle=True)
                case Piece():
                    await self._take(item)
                case Exit() | Lost():
                    await self._flush(idle=False)
                    return await self._finish(item)

    async def _next(
        self, receive: trio.MemoryReceiveChannel[Piece | Exit | Lost]
    ) -> Piece | Exit | Lost | None:
        """The next item; None when an unfinished line has waited long enough."""
        if self._agent is not None and self._agent.agent.result_seen and not self._cancel.is_set():
            with trio.move_on_after(HANG_AFTER_RESULT_S):
                return await receive.receive()
            self._cancel.set()
        with trio.move_on_after(PARTIAL_AFTER_S if self._unfinished else float("inf")):
            return await receive.receive()
        return None

    async def _take(self, piece: Piece) -> None:
        """Split a piece in slices whose events make chunks of about 64 KiB."""
        splitter, slices = self._splitters[piece.stream], self._slices[piece.stream]
        view = memoryview(piece.data)
        while len(view) > 0:
            part, view = view[: slices.bytes], view[slices.bytes :]
            encoded = splitter.feed(bytes(part))
            slices.learn(raw_bytes=len(part), encoded_bytes=len(encoded.payload))
            await self._write(piece.stream, encoded)
        self._unfinished.add(piece.stream)

    async def _flush(self, *, idle: bool) -> None:
        """Show unfinished lines; at the end (`idle` false) everything goes out."""
        for stream, splitter in self._splitters.items():
            await self._write(stream, splitter.flush(idle=idle))
        self._unfinished.clear()

    async def _write(self, stream: Stream, encoded: Encoded) -> None:
        if encoded.events:
            chunk = NewChunk(
                source=SOURCE[stream],
                events=encoded.events,
                raw_bytes=encoded.consumed_bytes,
                payload=encoded.payload,
            )
            await self._writer.write(stream, chunk)

    async def _finish(self, end: Exit | Lost) -> Outcome:
        report = None if self._agent is None else _report(self._agent.agent)
        outcome = judge(end, cancel_requested=self._cancel_asked, agent=report, kill=self._kill)
        payload = final_lines(
            outcome,
            attempt=self.claimed.attempt,
            truncated=self._writer.truncated,
            stdout_bytes=self._writer.end.stdout,
            stderr_bytes=self._writer.end.stderr,
        )
        last = NewChunk(source=Source.LIFE, events=2, raw_bytes=0, payload=payload)
        await self._writer.finish(outcome, last)
        return outcome


@dataclass(slots=True)
class _SliceSize:
    """How many raw bytes to split at once, so that their events fill a chunk.

    Short lines grow most when encoded (two bytes become thirty), so it learns from the last slice.
    """

    bytes: int = 4_096

    def learn(self, *, raw_bytes: int, encoded_bytes: int) -> None:
        growth = max(1.0, encoded_bytes / max(1, raw_bytes))
        self.bytes = max(2_048, min(2 * self.bytes, int(0.9 * CHUNK_MAX_BYTES / growth)))


def _report(agent: AgentLines) -> AgentReport:
    return AgentReport(session_id=agent.session_id, usage=agent.usage, is_error=agent.is_error)
