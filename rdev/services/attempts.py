"""One attempt: attach, hand its output to the appender, and end the command with what was read.

Started at most once, observed at least once: an attempt that is interrupted anywhere (restart,
lost lease, cancelled task) leaves the command running, and the next one who takes it over continues
at the offsets that the log holds. With `retry: safe` an attempt that provably did not finish queues
its command again; the next attempt begins anew, behind it in the same log. Bounds: pieces ≤ 1 MiB,
one in hand; an unfinished line is shown after 100 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.claude import AgentLines, AgentSplitter
from rdev.domain.commands import (
    AgentReport,
    Claimed,
    Kind,
    Outcome,
    Status,
    judge,
    may_run_again,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import (
    Exit,
    KillReport,
    Lost,
    LostReason,
    Piece,
    Spec,
    Stream,
    UnfitProjectError,
)
from rdev.domain.ids import attempt_id
from rdev.domain.lines import Encoded, LineSplitter
from rdev.domain.stream import CHUNK_MAX_BYTES, Source, final_lines, status_line
from rdev.domain.traces import TraceContext
from rdev.ports.commands import Leases
from rdev.ports.execution import Attachment, Executor
from rdev.ports.output import NewChunk, OutputLog
from rdev.ports.tracing import Passed, Span, Step
from rdev.services.appender import SOURCE, LeaseLostError, Writer

# A line without its end is shown after this much silence (the contract).
PARTIAL_AFTER_S = 0.1
# A CLI that does not exit after its `result` is ended (claude-code#25629 and others).
HANG_AFTER_RESULT_S = 30.0
KILL_GRACE_S = 5
# How long an end that was read waits for the kill to look again (the executor's bound).
KILL_REPORT_S = KILL_GRACE_S + 5.0
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
        span: Span | None = None,
    ) -> None:
        """`span` is ended by whoever gave it."""
        self.claimed = claimed
        self._span = span or Passed(claimed.trace)
        # Of its output, from the first piece on.
        self._output_span: Span | None = None
        self._id = attempt_id(claimed.lease.command, claimed.attempt)
        self._claimed_at = trio.current_time()
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
        # When the unfinished line of a stream is shown, and when a CLI that said its result is
        # ended, if nothing more comes.
        self._show_at: dict[Stream, float] = {}
        self._hangs_at = float("inf")
        self._hung = False
        self._cancel_asked = claimed.cancel_requested
        self._is_killing = False
        self._kill: KillReport | None = None
        self._killed = trio.Event()
        # While `run` observes.
        self._nursery: trio.Nursery | None = None

    @property
    def is_ending(self) -> bool:
        """Whether the outcome was handed over: its append says whether the lease was ours."""
        return self._writer.is_ending

    def cancel(self) -> None:
        """End the command: TERM, grace, KILL. The attempt goes on until the end is read."""
        self._cancel_asked = True
        self._end_command()

    async def run(self) -> Finished:
        """Observe the command to its end and store the outcome.

        Errors: LeaseLostError when another server took over; SERVICE_UNAVAILABLE when the project
        is out of reach, or the database at the beginning; INTERNAL_ERROR when the log refuses the
        output. The lease then runs out, and somebody tries again.
        Cancellation: at any point; the command goes on, and what was committed stays.
        """
        try:
            instance = await self._instance()
        except UnfitProjectError as error:
            return await self._refuse(error)
        await self._replay()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                if self._cancel_asked:
                    self._end_command()
                outcome = await self._observe(instance)
            finally:
                # Who cancels from here on comes too late, also where it failed.
                self._nursery = None
            nursery.cancel_scope.cancel()
        return Finished(claimed=self.claimed, outcome=outcome)

    async def _refuse(self, error: UnfitProjectError) -> Finished:
        """End a command of a project in which nothing can run: it was never started."""
        outcome = Outcome(status=Status.FAILED, reason=f"project_unfit: {error.lacks}")
        if self._cancel_asked:
            outcome = Outcome(status=Status.CANCELLED, reason="cancelled")
        self._hand_in(outcome)
        await self._writer.finished()
        return Finished(claimed=self.claimed, outcome=outcome)

    async def _instance(self) -> str:
        """What the project is; recorded before anything can start in it."""
        if self.claimed.instance is not None:
            return self.claimed.instance
        instance = await self._executor.instance(self.claimed.project)
        if not await self._leases.record_instance(self.claimed.lease, instance):
            raise LeaseLostError(self.claimed.lease)
        return instance

    async def _replay(self) -> None:
        """After a take-over the agent's stream in this attempt is read again as far as it is
        stored."""
        if self._agent is None or not self.claimed.take_over:
            return
        after = self.claimed.attempt_seq
        while chunks := await self._log.read(
            self.claimed.lease.command, after=after, limit_bytes=REPLAY_BYTES
        ):
            after = chunks[-1].last_seq
            for chunk in chunks:
                if chunk.source is Source.STDOUT:
                    self._agent.replay(chunk.payload)
        self._watch_agent()

    async def _observe(self, instance: str) -> Outcome:
        """Store what the attachment gives, to its end. Not asking it is the back-pressure."""
        attaching = self._span.step(Step.ATTACH)
        attachment = self._executor.attach(
            self.claimed.project,
            self._id,
            spec=_told_of(self.claimed.spec, self._span.context),
            instance=instance,
            offsets=self.claimed.offsets,
        )
        async with attachment as attached:
            attaching.end()
            outcome = await self._hand_over(attached)
        # Committed while the attachment was being closed.
        await self._writer.finished()
        return outcome

    async def _hand_over(self, attached: Attachment) -> Outcome:
        """Everything that comes, and the outcome."""
        while True:
            item = await self._next(attached)
            match item:
                case Piece():
                    await self._take(item)
                case Exit() | Lost():
                    return await self._finish(item)
                case None:
                    pass
            await self._heed_clock()

    def _end_command(self) -> None:
        """Kill it beside the observation; once."""
        if self._nursery is not None and not self._is_killing:
            self._is_killing = True
            self._nursery.start_soon(self._kill_it)

    async def _kill_it(self) -> None:
        """A place that cannot be reached is asked again until the attempt ends."""
        backoff = self._backoff()
        while True:
            try:
                self._kill = await self._executor.kill(
                    self.claimed.project, self._id, grace_s=KILL_GRACE_S
                )
                self._killed.set()
                return
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
            await trio.sleep(backoff.next_s())

    async def _next(self, attached: Attachment) -> Piece | Exit | Lost | None:
        """The next item; None when something else is due before it."""
        due_at = min([self._hangs_at, *self._show_at.values()])
        if due_at == float("inf"):
            return await attached.receive()
        with trio.move_on_at(due_at):
            return await attached.receive()
        return None

    async def _heed_clock(self) -> None:
        """Show unfinished lines that have waited long enough; end a CLI that hangs."""
        now = trio.current_time()
        for stream in [stream for stream, at in self._show_at.items() if at <= now]:
            del self._show_at[stream]
            await self._write(stream, self._splitters[stream].flush(idle=True))
        if self._hangs_at <= now:
            self._hangs_at = float("inf")
            self._hung = True
            self._end_command()

    def _watch_agent(self) -> None:
        """From its result on a CLI has half a minute to exit."""
        if self._agent is not None and self._agent.agent.result_seen and not self._hung:
            self._hangs_at = min(self._hangs_at, trio.current_time() + HANG_AFTER_RESULT_S)

    async def _take(self, piece: Piece) -> None:
        """Split a piece in slices whose events make chunks of about 64 KiB."""
        if self._output_span is None:
            self._output_span = self._span.step(Step.OUTPUT)
        splitter, slices = self._splitters[piece.stream], self._slices[piece.stream]
        view = memoryview(piece.data)
        while len(view) > 0:
            part, view = view[: slices.bytes], view[slices.bytes :]
            encoded = splitter.feed(bytes(part))
            slices.learn(raw_bytes=len(part), encoded_bytes=len(encoded.payload))
            await self._write(piece.stream, encoded)
        self._show_at[piece.stream] = trio.current_time() + PARTIAL_AFTER_S
        self._watch_agent()

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
        """Everything that is left goes out, then the outcome; a kill in progress ends first."""
        for stream, splitter in self._splitters.items():
            await self._write(stream, splitter.flush())
        if self._output_span is not None:
            ends = self._writer.end
            self._output_span.tell(stdout_bytes=ends.stdout, stderr_bytes=ends.stderr)
            self._output_span.end()
        self._span.step(Step.FINISH)
        if _is_out_of_sight(end):
            self._end_command()
        if self._is_killing:
            with trio.move_on_after(KILL_REPORT_S):
                await self._killed.wait()
        elif isinstance(end, Lost) and self._may_run_again(end):
            if await self._queue_again(end):
                return Outcome(status=Status.QUEUED, reason=end.reason)
            self._cancel_asked = True
        return await self._end(end)

    async def _end(self, end: Exit | Lost) -> Outcome:
        """End the command."""
        report = None if self._agent is None else _report(self._agent.agent)
        outcome = judge(
            end,
            cancel_requested=self._cancel_asked,
            hung=self._hung,
            agent=report,
            kill=self._kill,
        )
        self._hand_in(outcome)
        return outcome

    def _hand_in(self, outcome: Outcome) -> None:
        """The outcome with its last events, to be stored."""
        payload = final_lines(
            outcome,
            attempt=self.claimed.attempt,
            truncated=self._writer.truncated,
            stdout_bytes=self._writer.end.stdout,
            stderr_bytes=self._writer.end.stderr,
        )
        last = NewChunk(source=Source.LIFE, events=2, raw_bytes=0, payload=payload)
        self._writer.finish(outcome, last)

    def _may_run_again(self, end: Lost) -> bool:
        """An agent that has said its result has finished, whatever became of its process."""
        if self._agent is not None and self._agent.agent.result_seen:
            return False
        running_s = self.claimed.running_s + trio.current_time() - self._claimed_at
        return may_run_again(end, self.claimed, running_s=running_s)

    async def _queue_again(self, end: Lost) -> bool:
        """Whether the command waits for another attempt now; not when its cancel came first."""
        event = status_line(Status.QUEUED, attempt=self.claimed.attempt, reason=end.reason)
        last = NewChunk(source=Source.LIFE, events=1, raw_bytes=0, payload=event)
        return await self._writer.queue_again(last, reason=end.reason)


@dataclass(slots=True)
class _SliceSize:
    """How many raw bytes to split at once, so that their events fill a chunk.

    Short lines grow most when encoded (two bytes become thirty), so it learns from the last slice.
    """

    bytes: int = 4_096

    def learn(self, *, raw_bytes: int, encoded_bytes: int) -> None:
        growth = max(1.0, encoded_bytes / max(1, raw_bytes))
        self.bytes = max(2_048, min(2 * self.bytes, int(0.9 * CHUNK_MAX_BYTES / growth)))


def _told_of(spec: Spec, trace: TraceContext | None) -> Spec:
    """The spec with the trace that the command works for; what its client says goes before it."""
    if trace is None:
        return spec
    told = {"TRACEPARENT": trace.traceparent}
    if trace.state:
        told["TRACESTATE"] = trace.state
    return replace(spec, env={**told, **spec.env} if "TRACEPARENT" not in spec.env else spec.env)


def _is_out_of_sight(end: Exit | Lost) -> bool:
    """Whether it may be running where nobody can follow it any more: it must be ended."""
    return (
        isinstance(end, Lost) and end.reason is LostReason.JOURNAL_TRUNCATED and not end.unfinished
    )


def _report(agent: AgentLines) -> AgentReport:
    return AgentReport(session_id=agent.session_id, usage=agent.usage, is_error=agent.is_error)
