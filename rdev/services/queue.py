"""SUBSYSTEM CommandQueue: takes queued commands under leases and runs them.

Woken by submissions here and on other replicas, by attempts that end, and by a tick each second,
which also repairs lanes, ends what expired and takes over what others left. What happened in a lane
here is told to the store after its commit, with the next claim, many lanes in one statement.
Bounds: `running_max` attempts in this process; the lanes' caps are the store's. Heartbeats renew
all leases in one statement every third of a lease. At stop the leases are given back at once and
the commands go on; `cancel_running` ends them instead.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.commands import LANE_CLASS, Claimed, Lease, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Why
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.rate import RecentRate
from rdev.ports.commands import Lanes, Leases
from rdev.ports.execution import Executor
from rdev.ports.output import OutputLog
from rdev.ports.telemetry import Telemetry, log_context
from rdev.ports.tracing import Span, Tracing, Untraced, current_trace, within
from rdev.services.appender import Appender, LeaseLostError
from rdev.services.attempts import Attempt
from rdev.services.beat import next_beat_s
from rdev.services.shield import commit_shield

# The floor: with every wake-up lost, nothing waits longer than this.
TICK_S = 1.0
# What a last write to the database may take at stop.
RELEASE_S = 5.0
# One claim takes at most this part of the permits, so that claiming, running and appending overlap
# instead of taking turns (with commands that do nothing).
CLAIMS_IN_TURN = 2
# How many waiting commands one statement ends.
EXPIRE_MAX = 1_000
# Ends that are a fault of their span; a cancel is as it was wanted.
FAULTS = frozenset({Status.FAILED, Status.TIMED_OUT, Status.LOST})

_log = logging.getLogger("rdev.queue")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatistics:
    """Counters since the start, and what runs here now."""

    running: int
    claimed: int
    taken_over: int
    finished: int
    stale: int
    # Over the last ten seconds.
    claims_per_s: float


@dataclass(slots=True, kw_only=True)
class _Running:
    attempt: Attempt
    span: Span
    scope: trio.CancelScope


class CommandQueue:
    """Claim, permit, run, heartbeat."""

    name = "queue"

    def __init__(
        self,
        *,
        lanes: Lanes,
        leases: Leases,
        executor: Executor,
        appender: Appender,
        log: OutputLog,
        telemetry: Telemetry,
        backoff: Callable[[], Backoff],
        announce: Callable[[CommandId], None],
        wake_replicas: Callable[[], None],
        holder: str,
        lease_s: float,
        running_max: int,
        left_alone: Callable[[], Collection[ProjectId]] = tuple,
        tracing: Tracing | None = None,
        is_reachable: Callable[[], bool] = lambda: True,
    ) -> None:
        """`holder` names this server across its restarts: what it held when it died is taken
        back at once. `announce` says that a stream has events which no appender published (a
        claim, an expiry), `wake_replicas` that other servers may find something to claim; neither
        waits. `left_alone` names the projects that the next claim or take-over passes by;
        while not `is_reachable`, all of them are."""
        self._lanes = lanes
        self._leases = leases
        self._executor = executor
        self._appender = appender
        self._output = log
        self._telemetry = telemetry
        self._backoff = backoff
        self._announce = announce
        self._wake_replicas = wake_replicas
        self._holder = holder
        self._lease_s = lease_s
        self._running_max = running_max
        self._left_alone = left_alone
        self._tracing = tracing or Untraced()
        self._is_reachable = is_reachable
        # What a take-over passed by: for the claim that follows it, so that a project's turn to be
        # tried is one turn for both.
        self._passed_by: Collection[ProjectId] | None = None
        # Half: while some are on their way to their commit, the others are being claimed.
        self._claim_max = max(1, running_max // CLAIMS_IN_TURN)
        self._running: dict[Lease, _Running] = {}
        self._touched: set[Lane] = set()
        # Cancels since the last claim began: its reply may be on its way.
        self._unmet_cancels: set[CommandId] = set()
        self._take_over_from_s = 0.0
        self._wakeup = trio.Event()
        self._stop = trio.Event()
        self._cancel_at_stop = False
        self._claimed = self._taken_over = self._finished = self._stale = 0
        self._claims = RecentRate()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then give the leases back (or see the cancelled commands end).

        Survives a database or a project that is out of reach: it tries again with growing pauses.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._appender.run)
            heartbeats = trio.CancelScope()
            nursery.start_soon(self._heartbeat_loop, heartbeats)
            async with trio.open_nursery() as attempts:
                await self._claim_until_stop(attempts, task_status)
                if self._cancel_at_stop:
                    for running in self._running.values():
                        running.attempt.cancel()
                else:
                    # First: a heartbeat behind the release would take the leases again.
                    heartbeats.cancel()
                    await self._give_back()
                    attempts.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Claim nothing more; commands that run here go on without us. Idempotent."""
        self._stop.set()
        self.wake()

    def cancel_running(self) -> None:
        """Make `stop` end the commands that run here instead of leaving them to the next server."""
        self._cancel_at_stop = True

    def wake(self, lane: Lane | None = None) -> None:
        """Something may be claimable; in this lane, where it happened here. Never waits."""
        if lane is not None:
            self._touched.add(lane)
        self._wakeup.set()

    def cancel(self, command: CommandId) -> None:
        """End the command if it runs here, or is being claimed; otherwise its holder hears of it by
        heartbeat."""
        self._unmet_cancels.add(command)
        for lease, running in self._running.items():
            if lease.command == command:
                running.attempt.cancel()

    def statistics(self) -> QueueStatistics:
        """What runs here and what was done."""
        return QueueStatistics(
            running=len(self._running),
            claimed=self._claimed,
            taken_over=self._taken_over,
            finished=self._finished,
            stale=self._stale,
            claims_per_s=self._claims.per_s(trio.current_time()),
        )

    async def claim_once(self, attempts: trio.Nursery) -> int:
        """Touch the lanes where something happened, claim as many commands as there are permits, at
        most one of each lane, and start their attempts. Returns how many were claimed or had
        expired: 0 means that there is nothing more.

        Errors: SERVICE_UNAVAILABLE; the lanes stay to be touched.
        """
        self._unmet_cancels.clear()
        passed_by, self._passed_by = self._passed_by, None
        limit = min(self._running_max - len(self._running), self._claim_max)
        if limit <= 0 or self._stop.is_set() or not self._is_reachable():
            await self._touch()
            return 0
        began_s = trio.current_time()
        with self._to_touch() as touched, commit_shield():
            found = await self._lanes.claim(
                reach=self._executor.reach,
                instance=self._executor.standing_instance,
                holder=self._holder,
                limit=limit,
                touched=touched,
                closed=self._left_alone() if passed_by is None else passed_by,
            )
            for command in found.expired:
                self._announce(command)
            for one in found.claimed:
                self._announce(one.lease.command)
                self._start(one, attempts, began_s)
        if touched or len(found.claimed) == limit:
            # Others passed by the lanes that this claim held, and some are not of this reach.
            self._wake_replicas()
        return len(found.claimed) + len(found.expired)

    async def tick_once(self, attempts: trio.Nursery) -> None:
        """What no wake-up tells of: commands that expired, lanes that were not touched (for those,
        and after a crash), and leases that ran out. Errors: SERVICE_UNAVAILABLE."""
        with commit_shield():
            for command in await self._lanes.expire(holder=self._holder, limit=EXPIRE_MAX):
                self._announce(command)
        if not self._is_reachable():
            return
        await self._lanes.repair(reach=self._executor.reach)
        permits = self._running_max - len(self._running)
        if permits <= 0 or self._stop.is_set() or trio.current_time() < self._take_over_from_s:
            return
        self._passed_by = closed = self._left_alone()
        began_s = trio.current_time()
        with commit_shield():
            for one in await self._leases.take_over(
                reach=self._executor.reach, holder=self._holder, limit=permits, closed=closed
            ):
                self._start(one, attempts, began_s)

    async def _touch(self) -> None:
        """Tell the store which lanes may be claimable, then the other replicas."""
        if self._touched:
            with self._to_touch() as touched, commit_shield():
                await self._lanes.touch(touched)
                self._wake_replicas()

    @contextmanager
    def _to_touch(self) -> Iterator[set[Lane]]:
        """The lanes that are to be touched in the block; they stay so when it fails."""
        touched, self._touched = self._touched, set()
        try:
            yield touched
        except RdevError:
            self._touched |= touched
            raise

    async def heartbeat_once(self) -> None:
        """Renew the leases; leave what is no longer ours, cancel what is to be cancelled.

        Errors: SERVICE_UNAVAILABLE.
        """
        held = list(self._running)
        if not held:
            return
        beat = await self._leases.heartbeat(held)
        for lease in beat.stale:
            # The lease of what has just ended is over, and was nobody else's.
            running = self._running.get(lease)
            if running is not None and not running.attempt.is_ending:
                running.scope.cancel()
        for lease in beat.cancel_requested:
            if (running := self._running.get(lease)) is not None:
                running.attempt.cancel()

    def _start(self, claimed: Claimed, attempts: trio.Nursery, began_s: float) -> None:
        """Run what a statement claimed that began then."""
        self._claimed += 1
        self._claims.add(trio.current_time(), 1)
        self._taken_over += claimed.take_over
        span = self._tracing.attempt(claimed, claim_s=trio.current_time() - began_s)
        attempt = Attempt(
            claimed=claimed,
            writer=self._appender.open(claimed),
            executor=self._executor,
            leases=self._leases,
            log=self._output,
            backoff=self._backoff,
            span=span,
        )
        running = _Running(attempt=attempt, span=span, scope=trio.CancelScope())
        self._running[claimed.lease] = running
        at_stop = self._cancel_at_stop and self._stop.is_set()
        if at_stop or claimed.lease.command in self._unmet_cancels:
            attempt.cancel()  # the claim was under way when it was, or the others were, cancelled
        if not claimed.take_over:
            with within(span.context):
                self._telemetry.command_claimed(claimed.kind, claimed.queue_wait_ms / 1000)
        self._telemetry.command_started(claimed.project, claimed.kind)
        attempts.start_soon(self._run_attempt, running, name=claimed.lease.command)

    async def _run_attempt(self, running: _Running) -> None:
        """One attempt to its end; a fault concerns this command only, and is logged."""
        claimed = running.attempt.claimed
        started_at_s = trio.current_time()
        _work_for(running.span)
        # What is not known better: the server stops, and somebody goes on.
        left, fault = "given_back", None
        try:
            with running.scope:
                finished = await running.attempt.run()
                self._tell(claimed, finished.outcome, trio.current_time() - started_at_s)
                left, fault = "ended", _tell_end(running.span, finished.outcome)
            if running.scope.cancelled_caught:
                self._stale += 1
                left = fault = "lease_lost"
        except* LeaseLostError:
            self._stale += 1
            left = fault = "lease_lost"
            _log.info("lease lost", extra={"command_id": claimed.lease.command})
        except* RdevError as group:
            left = fault = "set_aside"
            self._set_aside(claimed.lease, group)
        finally:
            running.span.tell(left=left)
            running.span.end(fault)
            del self._running[claimed.lease]
            self._telemetry.command_left(claimed.project, claimed.kind)
            self.wake(Lane(project=claimed.project, lane_class=LANE_CLASS[claimed.kind]))

    def _tell(self, claimed: Claimed, outcome: Outcome, attempt_s: float) -> None:
        """An attempt is over, and what came of it is stored. An attempt that another one follows is
        no end. After a take-over the supervisor knows for how long it ran, not we."""
        if outcome.reason == Why.OUTPUT_LIMIT:
            self._telemetry.limit_checked("journal", refused=True)
        if outcome.kill is not None and not outcome.kill.confirmed:
            self._telemetry.kill_unconfirmed(claimed.kind)
        if outcome.status.is_terminal:
            self._finished += 1
            ran_s = attempt_s if outcome.duration_ms is None else outcome.duration_ms / 1000
            self._telemetry.command_finished(claimed.project, claimed.kind, outcome.status, ran_s)

    def _set_aside(self, lease: Lease, group: BaseExceptionGroup[RdevError]) -> None:
        """An attempt that cannot go on now: its lease runs out, and somebody tries again."""
        error = group.exceptions[0]
        _log.warning("attempt set aside", extra={"command_id": lease.command, "error": str(error)})

    async def _claim_until_stop(
        self, attempts: trio.Nursery, task_status: trio.TaskStatus[None]
    ) -> None:
        """At the end no claim is in flight: whatever was claimed is in `_running`."""
        async with trio.open_nursery() as claims:
            claims.start_soon(self._claim_loop, attempts)
            task_status.started()
            await self._stop.wait()
            claims.cancel_scope.cancel()

    async def _claim_loop(self, attempts: trio.Nursery) -> None:
        backoff = self._backoff()
        await self._take_back()
        tick_at_s = 0.0
        while not self._stop.is_set():
            self._wakeup = trio.Event()
            try:
                if backoff.failures:
                    # Our leases may have run out meanwhile: they are not for us to take over.
                    await self.heartbeat_once()
                    self._leave_others_time()
                if trio.current_time() >= tick_at_s:
                    await self.tick_once(attempts)
                    tick_at_s = next_beat_s(TICK_S)
                found = await self.claim_once(attempts)
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                await trio.sleep(backoff.next_s())
                continue
            backoff = self._backoff()
            if not found:
                with trio.move_on_at(tick_at_s):
                    await self._wakeup.wait()

    def _leave_others_time(self) -> None:
        """After an outage: holders could not renew either, and have one heartbeat to do it before
        anything is taken over."""
        self._take_over_from_s = trio.current_time() + self._lease_s / 3

    async def _heartbeat_loop(self, scope: trio.CancelScope) -> None:
        failed = False
        with scope:
            while True:
                await trio.sleep(self._lease_s / 3)
                try:
                    await self.heartbeat_once()
                    if failed:
                        self._leave_others_time()
                    failed = False
                except RdevError as error:
                    if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                        raise
                    _log.warning("heartbeat failed", extra={"error": str(error)})
                    failed = True
                    self._leave_others_time()

    async def _take_back(self) -> None:
        """What this server held when it died can be taken over at once: it is dead (the state
        folder's lock is ours)."""
        backoff = self._backoff()
        while not self._stop.is_set():
            try:
                await self._leases.release_holder(self._holder)
                if backoff.failures:
                    self._leave_others_time()
                return
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
            await trio.sleep(backoff.next_s())

    async def _give_back(self) -> None:
        """Release every lease at once, so that another server goes on within a tick."""
        with trio.move_on_after(RELEASE_S):
            try:
                if self._running:
                    await self._leases.release(list(self._running))
            except RdevError as error:
                _log.warning("leases were not given back", extra={"error": str(error)})


def _work_for(span: Span) -> None:
    """What this task logs and counts, it does for this trace."""
    trace = span.context
    current_trace.set(trace)
    log_context.set(None if trace is None else {"trace_id": trace.trace_id})


def _tell_end(span: Span, outcome: Outcome) -> str | None:
    """What came of the attempt; returns its fault, None where it is none of the command's."""
    span.tell(
        status=outcome.status,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        reason=outcome.reason,
        duration_ms=outcome.duration_ms,
    )
    return outcome.status if outcome.status in FAULTS else None
