"""Bugs to plant: each breaks one promise in one place, and must be found.

They are put where the parts meet (a fake that errs, a service with one method replaced); the
product has no switch for them.
"""

import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from rdev.domain.commands import Claimed, Lease, NewCommand
from rdev.domain.execution import Exit, LostReason, Offsets, Spec, Stream
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import AGE_STEP_S, Lane
from rdev.domain.stream import Chunk
from rdev.ports.commands import Accepted, Beat, Claims
from rdev.ports.output import Append, AppendResult
from rdev.services.appender import Appender, Writer
from tests.fakes.commands import FakeCommands
from tests.fakes.executor import FakeAttachment, FakeExecutor
from tests.fakes.lanes import FakeLanes
from tests.fakes.output import FakeOutput
from tests.fakes.store import StoreState, claimed_of, is_running
from tests.simulation.seams import Plant, Seams
from tests.simulation.streams import LateReaders
from tests.simulation.world import simulate


class OutputWithoutFence(FakeOutput):
    """Append and finish take any lease; the offsets are still compared."""

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        return await super().append([replace(one, lease=self._current(one)) for one in batch])

    def _current(self, append: Append) -> Lease:
        row = self._state.rows[append.lease.command]
        return Lease(command=append.lease.command, id=row.lease_id or 0)


class RepeatsApplyAgain(FakeOutput):
    """An append is taken wherever the log stands: one whose reply was lost lands twice."""

    async def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        return await super().append([self._moved(one) for one in batch])

    def _moved(self, append: Append) -> Append:
        row = self._state.rows[append.lease.command]
        at = row.offsets
        end = Offsets(
            stdout=at.stdout + append.end.stdout - append.start.stdout,
            stderr=at.stderr + append.end.stderr - append.start.stderr,
        )
        return replace(append, start=at, start_seq=row.command.last_seq, end=end)


class ExecutorWithoutGuard(FakeExecutor):
    """Every attach with a spec starts the command (no `go/`)."""

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        attempt: CommandId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator[FakeAttachment]:
        self._runs.pop(attempt, None)
        attaching = super().attach(project, attempt, spec=spec, instance=instance, offsets=offsets)
        async with attaching as attachment:
            yield attachment


class HeartbeatWithoutCompare(FakeCommands):
    """Renews the lease of whatever runs, whoever holds it."""

    async def heartbeat(self, leases: Sequence[Lease]) -> Beat:
        rows = self._state.rows
        current = [
            Lease(command=lease.command, id=rows[lease.command].lease_id or 0) for lease in leases
        ]
        beat = await super().heartbeat(current)
        stale = {lease.command for lease in beat.stale}
        return replace(beat, stale=frozenset(one for one in leases if one.command in stale))


class HeartbeatWithoutCancel(FakeCommands):
    """Does not say what is to be cancelled: only a notification does, and that may be lost."""

    async def heartbeat(self, leases: Sequence[Lease]) -> Beat:
        return replace(await super().heartbeat(leases), cancel_requested=frozenset())


class TakeOverAtOnce(FakeCommands):
    """Does not wait for a lease to run out."""

    async def take_over(
        self, *, reach: str, holder: str, limit: int, closed: Collection[ProjectId] = ()
    ) -> list[Claimed]:
        await self._state.step()
        rows = [row for row in self._state.rows.values() if row.reach == reach and is_running(row)]
        taken = [row for row in rows if row.holder != holder][:limit]
        for row in taken:
            self._state.lease(row, holder, self._lease_s)
        return [claimed_of(row, take_over=True) for row in taken]


class LanesWithoutRepair(FakeLanes):
    """What a crash between a commit and its touch left behind stays so."""

    async def repair(self, *, reach: str) -> int:
        await self._state.step()
        return 0


class LanesWithoutCap(FakeLanes):
    """A lane takes one more than it may."""

    async def claim(
        self,
        *,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        touched: Collection[Lane] = (),
        closed: Collection[ProjectId] = (),
    ) -> Claims:
        lanes = self._state.lanes.values()
        for lane in lanes:
            lane.cap += 1
        try:
            return await super().claim(
                reach=reach,
                instance=instance,
                holder=holder,
                limit=limit,
                touched=touched,
                closed=closed,
            )
        finally:
            for lane in lanes:
                lane.cap -= 1


class LanesWithoutTurns(FakeLanes):
    """Forgets that a lane was served: the oldest command of all is next."""

    async def claim(
        self,
        *,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        touched: Collection[Lane] = (),
        closed: Collection[ProjectId] = (),
    ) -> Claims:
        found = await super().claim(
            reach=reach,
            instance=instance,
            holder=holder,
            limit=limit,
            touched=touched,
            closed=closed,
        )
        for lane, row in self._state.lanes.items():
            row.last_start = 0.0
            self._place(lane)
        return found


class PublishBeforeCommit(Appender):
    """Shows readers what may never be committed."""

    async def _append(self, writers: list[Writer]) -> int:
        for writer in writers:
            append = writer.take()
            seq = append.start_seq
            for new in append.chunks:
                chunk = Chunk(
                    command=append.lease.command,
                    first_seq=seq + 1,
                    last_seq=seq + new.events,
                    source=new.source,
                    raw_bytes=new.raw_bytes,
                    payload=new.payload,
                )
                seq = chunk.last_seq
                self._publish(chunk)
        return await super()._append(writers)


class KeysApart(FakeCommands):
    """The idempotency key in a transaction of its own; every third dies."""

    _keys = 0

    async def insert(self, new: NewCommand) -> Accepted:
        key = new.idempotency
        if key is None or self._state.keys.find(key) is not None:
            return await super().insert(new)
        accepted = await super().insert(replace(new, idempotency=None))
        self._keys += 1
        if self._keys % 3:
            self._state.keys.keep(key, new.id)
        return accepted


class RankUpsideDown(FakeCommands):
    """Low before high."""

    async def insert(self, new: NewCommand) -> Accepted:
        accepted = await super().insert(new)
        row = self._state.rows[accepted.command.id]
        level = row.new.priority.level
        row.rank += (2 * level - 2) * AGE_STEP_S
        return accepted


class SuccessUnread(FakeExecutor):
    """No status could be read: it will have gone well."""

    def lose(self, attempt: CommandId, reason: LostReason, **facts: bool) -> None:
        run = self._runs.get(attempt)
        if run is not None and run.end is None:
            super().lose(attempt, reason, **facts)
            sizes = {stream: len(journal) for stream, journal in run.journals.items()}
            run.end = Exit(
                exit_code=0,
                signal=None,
                why=None,
                stdout_bytes=sizes[Stream.STDOUT],
                stderr_bytes=sizes[Stream.STDERR],
            )


def _fence_off(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.output = OutputWithoutFence(state)


def _repeats_apply_again(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.output = RepeatsApplyAgain(state)


def _heartbeat_without_cancel(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.commands = HeartbeatWithoutCancel(state, lease_s=lease_s)


def _no_turns(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.lanes = LanesWithoutTurns(state, lease_s=lease_s)


def _guard_off(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.executor = ExecutorWithoutGuard


def _heartbeat_without_compare(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.commands = HeartbeatWithoutCompare(state, lease_s=lease_s)


def _replay_before_subscribe(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.fanout = LateReaders


def _take_over_at_once(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.commands = TakeOverAtOnce(state, lease_s=lease_s)


def _no_repair(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.lanes = LanesWithoutRepair(state, lease_s=lease_s)


def _cap_off_by_one(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.lanes = LanesWithoutCap(state, lease_s=lease_s)


def _publish_before_commit(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.appender = PublishBeforeCommit


def _key_apart(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.commands = KeysApart(state, lease_s=lease_s)


def _rank_upside_down(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.commands = RankUpsideDown(state, lease_s=lease_s)


def _success_unread(seams: Seams, state: StoreState, lease_s: float) -> None:
    seams.executor = SuccessUnread


# Bugs are looked for in so many seeds.
SEEDS_MAX = 1_000


def found_at(name: str) -> int | None:
    """The first seed whose run tells of the bug; None when none of `SEEDS_MAX` does."""
    plant, sentence = PLANTED[name]
    for seed in range(SEEDS_MAX):
        violations = simulate(seed, plant).violations
        if any(re.search(sentence, violation) for violation in violations):
            return seed
    return None


# By name: what is planted, and a part of the sentence by which the checker must tell it.
PLANTED: Mapping[str, tuple[Plant, str]] = {
    "fence off": (_fence_off, "a stale write"),
    "guard off": (_guard_off, "a second process"),
    "heartbeat without compare": (_heartbeat_without_compare, "a heartbeat renewed lease"),
    "replay before subscribe": (_replay_before_subscribe, "in time|late"),
    "repeats apply again": (_repeats_apply_again, "end with one complete|not what its process"),
    "heartbeat without cancel": (_heartbeat_without_cancel, "never ended"),
    "no turns": (_no_turns, "whose turn it was"),
    "take-over at once": (_take_over_at_once, "before its lease had run out"),
    "no repair of lanes": (_no_repair, "never ended"),
    "cap off by one": (_cap_off_by_one, "commands run in"),
    "publish before commit": (_publish_before_commit, "before its commit"),
    "key apart": (_key_apart, "two commands for"),
    "rank upside down": (_rank_upside_down, "overtook"),
    "success unread": (_success_unread, "ended succeeded"),
}
