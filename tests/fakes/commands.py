"""Commands and their leases in memory."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

import trio

from rdev.domain.audit import Actor
from rdev.domain.commands import Claimed, Command, Kind, Lease, NewCommand, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import rank
from rdev.domain.pages import PAGE_BYTES, Page
from rdev.domain.stream import Source, queued_line
from rdev.ports.commands import POSITION_MAX, Accepted, Beat, CancelResult
from tests.fakes.store import Row, StoreState, claimed_of, is_queued, is_running


class FakeCommands:
    """`CommandStore` and `Leases`."""

    def __init__(self, state: StoreState, *, lease_s: float = 30.0) -> None:
        self._state = state
        self._lease_s = lease_s

    async def insert(self, new: NewCommand) -> Accepted:
        state = self._state
        await state.step()
        project = state.projects.get(new.project)
        if project is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no project {new.project!r}")
        if new.idempotency is not None:
            if (made := state.keys.find(new.idempotency)) is not None:
                return self._replayed(CommandId(made))
            state.keys.keep(new.idempotency, new.id)
        expires_in_s = float("inf") if new.expires_in_s is None else new.expires_in_s
        row = Row(
            new=new,
            command=_accepted(new, state.now),
            reach=project.reach,
            rank=rank(accepted_at_s=state.moment(), level=new.priority.level),
            expires_at=trio.current_time() + expires_in_s,
        )
        state.rows[new.id] = row
        state.chunks[new.id] = []
        position = self._position(row)
        state.put(row, Source.LIFE, 1, 0, queued_line(queue_position=position))
        state.record.changed(row.command, "command.submitted", new.actor)
        state.reply()
        return Accepted(command=row.command, queue_position=position)

    async def replay(self, idempotency: Idempotency) -> Accepted | None:
        await self._state.step()
        made = self._state.keys.find(idempotency)
        return None if made is None else self._replayed(CommandId(made))

    def _replayed(self, command: CommandId) -> Accepted:
        row = self._state.rows.get(command)
        if row is None:
            raise RdevError(ErrorCode.GONE, f"command {command!r} is no longer stored")
        position = self._position(row) if is_queued(row) else None
        return Accepted(command=row.command, queue_position=position, is_replay=True)

    async def get(self, command: CommandId) -> Command | None:
        await self._state.step()
        row = self._state.rows.get(command)
        return None if row is None else row.command

    async def list_for_project(
        self,
        project: ProjectId,
        *,
        status: Status | None,
        kind: Kind | None,
        before: CommandId | None,
        limit: int,
    ) -> Page[Command]:
        await self._state.step()
        found = [
            row.command
            for row in self._state.rows.values()
            if row.command.project == project
            and status in (None, row.command.status)
            and kind in (None, row.command.kind)
            and (before is None or row.command.id < before)
        ]
        found.sort(key=lambda command: command.id, reverse=True)
        given: list[Command] = []
        size_bytes = 0
        for command in found[:limit]:
            if size_bytes >= PAGE_BYTES:
                break
            given.append(command)
            size_bytes += sum(len(word.encode()) for word in command.argv)
        return Page(items=given, has_more=len(given) < len(found))

    async def queue_position(self, command: CommandId) -> int | None:
        await self._state.step()
        row = self._state.rows.get(command)
        if row is None or row.command.status is not Status.QUEUED:
            return None
        return self._position(row)

    async def request_cancel(self, command: CommandId, actor: Actor) -> CancelResult | None:
        await self._state.step()
        row = self._state.rows.get(command)
        if row is None:
            return None
        ended_now = row.command.status is Status.QUEUED
        if ended_now:
            self._state.end(row, Status.CANCELLED, actor)
        elif row.command.status is Status.RUNNING and not row.cancel_requested:
            row.cancel_requested = True
            self._state.record.did(row.command, "command.cancel_requested", actor)
        self._state.reply()
        return CancelResult(command=row.command, ended_now=ended_now)

    async def take_over(
        self, *, reach: str, holder: str, limit: int, closed: Collection[ProjectId] = ()
    ) -> list[Claimed]:
        await self._state.step()
        rows = [row for row in self._state.rows.values() if row.reach == reach and is_running(row)]
        rows = [row for row in rows if row.command.project not in closed]
        late = [row for row in rows if row.lease_until < trio.current_time()]
        taken = [row for row in late if row.command.id not in self._state.held][:limit]
        for row in taken:
            self._state.lease(row, holder, self._lease_s)
            self._state.record.did(row.command, "command.taken_over", holder)
        self._state.reply()
        return [claimed_of(row, take_over=True) for row in taken]

    async def heartbeat(self, leases: Sequence[Lease]) -> Beat:
        await self._state.step()
        alive = {lease: row for lease in leases if (row := self._state.leased(lease)) is not None}
        for row in alive.values():
            row.lease_until = trio.current_time() + self._lease_s
        self._state.reply()
        return Beat(
            stale=frozenset(leases) - alive.keys(),
            cancel_requested=frozenset(
                [lease for lease, row in alive.items() if row.cancel_requested]
            ),
        )

    async def record_instance(self, lease: Lease, instance: str) -> bool:
        await self._state.step()
        row = self._state.leased(lease)
        if row is None or row.instance not in (None, instance):
            return False
        row.instance = instance
        self._state.reply()
        return True

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._state.step()
        for lease in leases:
            if (row := self._state.leased(lease)) is not None:
                row.lease_until = float("-inf")
        self._state.reply()

    async def release_holder(self, holder: str) -> int:
        await self._state.step()
        now = trio.current_time()
        rows = [row for row in self._state.rows.values() if row.holder == holder]
        held = [row for row in rows if is_running(row) and row.lease_until >= now]
        for row in held:
            row.lease_until = float("-inf")
        self._state.reply()
        return len(held)

    def _position(self, row: Row) -> int:
        ahead = sum(other.place <= row.place for other in self._state.queued(row.lane))
        return min(POSITION_MAX, ahead)


def _accepted(new: NewCommand, now: datetime) -> Command:
    nothing: Mapping[str, None] = dict.fromkeys(
        ("exit_code", "signal", "reason", "started_at", "finished_at", "duration_ms",
         "queue_wait_ms", "session_id", "usage", "kill")
    )  # fmt: skip
    return Command(
        id=new.id,
        project=new.project,
        kind=new.kind,
        status=Status.QUEUED,
        priority=new.priority,
        attempt=0,
        created_at=now,
        stdout_bytes=0,
        stderr_bytes=0,
        dropped_bytes=0,
        truncated=False,
        argv=new.argv,
        key_id=new.actor.key_id,
        last_seq=0,
        attempt_seq=0,
        **nothing,
    )
