"""SUBSYSTEM Audit: seals what was entered, writes denials, and puts checkpoints outside.

Wakes every `EVERY_S`: denials that were noted go into the log, then what ended transactions have
entered is sealed in batches of `BATCH`, by one server at a time (the others find its lock and do
nothing). At most every `CHECKPOINT_S`, and only where something was sealed since, the last seal
goes to the checkpoints, signed. Nothing is lost by a server that is down: whoever runs next seals
it.
At stop: denials and seals once more, then a checkpoint.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import trio

from rdev.domain.audit import Sealed
from rdev.domain.audit_chain import Place
from rdev.domain.errors import ErrorCode, RdevError
from rdev.ports.audit import AuditLog, CheckpointSink
from rdev.services.beat import next_beat_s
from rdev.services.denials import Denials

EVERY_S = 1.0
BATCH = 5_000
CHECKPOINT_S = 60.0

_log = logging.getLogger("rdev.audit")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditStatistics:
    """`lag_s`: the age of the oldest entry that was not sealed when this server last looked; for as
    long as it cannot look, the time goes on, as nobody knows better."""

    seals: int
    last_seq: int
    lag_s: float
    checkpoints: int
    checkpoint_failures: int
    denials_waiting: int
    denials_lost: int


class AuditKeeper:
    """One loop. Survives a database and a checkpoint sink that are gone."""

    name = "audit"

    def __init__(
        self,
        *,
        log: AuditLog,
        denials: Denials,
        sink: CheckpointSink | None,
        now: Callable[[], datetime],
    ) -> None:
        """`sink` None: no checkpoints are kept."""
        self._audit = log
        self._denials = denials
        self._sink = sink
        self._now = now
        self._stop = trio.Event()
        self._seals = self._checkpoints = self._failures = 0
        self._lag_s = 0.0
        self._looked_at_s: float | None = None
        self._last: Place | None = None
        self._kept_seq = 0
        self._kept_at_s = float("-inf")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then once more."""
        task_status.started()
        while not self._stop.is_set():
            await self.run_once()
            with trio.move_on_at(next_beat_s(EVERY_S)):
                await self._stop.wait()
        await self.run_once(is_last=True)

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()

    async def run_once(self, *, is_last: bool = False) -> None:
        """Write, seal, keep. What cannot be done now is done the next time."""
        try:
            await self._write(is_last=is_last)
            await self._seal()
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            _log.debug("audit log out of reach", extra={"error": str(error)})
        if is_last or trio.current_time() >= self._kept_at_s + CHECKPOINT_S:
            await self._keep()

    def statistics(self) -> AuditStatistics:
        """What was done so far, by this server."""
        denials = self._denials.statistics()
        return AuditStatistics(
            seals=self._seals,
            last_seq=0 if self._last is None else self._last.seq,
            lag_s=self._lag_s + self._blind_s(),
            checkpoints=self._checkpoints,
            checkpoint_failures=self._failures,
            denials_waiting=denials.waiting,
            denials_lost=denials.lost,
        )

    async def _write(self, *, is_last: bool) -> None:
        taken = self._denials.take(is_last=is_last)
        if not taken:
            return
        try:
            await self._audit.add_denials(taken)
        except RdevError:
            self._denials.give_back(taken)
            raise

    async def _seal(self) -> None:
        while True:
            sealed = await self._audit.seal(limit=BATCH)
            self._looked_at_s = trio.current_time()
            if sealed is None:
                # Another server has the turn, and tells.
                self._lag_s = 0.0
                return
            self._heed(sealed)
            if sealed.count < BATCH:
                return

    def _blind_s(self) -> float:
        """For how long a look has been overdue."""
        if self._looked_at_s is None:
            return 0.0
        return max(0.0, trio.current_time() - self._looked_at_s - 2 * EVERY_S)

    def _heed(self, sealed: Sealed) -> None:
        self._seals += sealed.count
        self._lag_s = max(0.0, sealed.lag_s or 0.0)
        if sealed.last_seq is not None and sealed.last_hash is not None:
            self._last = Place(seq=sealed.last_seq, hash=sealed.last_hash)

    async def _keep(self) -> None:
        """Put the last seal outside. A sink that fails is asked again in a moment."""
        if self._sink is None or self._last is None or self._last.seq <= self._kept_seq:
            return
        try:
            await self._sink.keep(self._last, at=self._now())
        except RdevError as error:
            self._failures += 1
            self._kept_at_s = trio.current_time() - CHECKPOINT_S / 2
            _log.warning("audit checkpoint not kept", extra={"error": str(error)})
            return
        self._checkpoints += 1
        self._kept_seq = self._last.seq
        self._kept_at_s = trio.current_time()
