"""The lanes in memory: what `sql/0002_lanes.sql` does, on the state of the other fakes."""

from collections.abc import Collection
from dataclasses import replace

import trio

from rdev.domain.commands import Status
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane, due
from rdev.domain.stream import Source, status_line
from rdev.ports.commands import Claims
from tests.fakes.store import Row, StoreState, claimed_of, is_queued


class FakeLanes:
    """`Lanes`."""

    def __init__(self, state: StoreState, *, lease_s: float = 30.0) -> None:
        self._state = state
        self._lease_s = lease_s

    async def touch(self, lanes: Collection[Lane]) -> None:
        await self._state.step()
        for lane in lanes:
            if lane in self._state.lanes:
                self._place(lane)
        self._state.reply()

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
        await self._state.step()
        for lane in touched:
            if lane in self._state.lanes:
                self._place(lane)
        found = Claims(claimed=[], expired=[])
        while self._claim_in_order(reach, instance, holder, limit, found, closed):
            pass
        self._state.reply()
        return found

    def _claim_in_order(
        self,
        reach: str,
        instance: str | None,
        holder: str,
        limit: int,
        found: Claims,
        closed: Collection[ProjectId],
    ) -> bool:
        """One pass over the lanes, up to one that stood too early; whether there was one."""
        for lane in self._in_order(reach):
            if lane.project in closed:
                continue
            found.expired.extend(self._expire_heads(lane, holder))
            stood_at = self._state.lanes[lane].due
            self._place(lane)
            stands_at = self._state.lanes[lane].due
            if stands_at is None or stood_at is None:
                continue
            if stands_at > stood_at:
                return True
            head = self._state.queued(lane)[0]
            self._begin(head, instance, holder)
            found.claimed.append(claimed_of(head, take_over=False))
            self._place(lane)
            if len(found.claimed) == limit:
                return False
        return False

    async def repair(self, *, reach: str) -> int:
        await self._state.step()
        late = [
            lane
            for lane, row in self._state.lanes.items()
            if row.reach == reach
            and (exact := self._due(lane)) is not None
            and (row.due is None or row.due > exact)
        ]
        for lane in late:
            self._place(lane)
        self._state.reply()
        return len(late)

    async def expire(self, *, holder: str, limit: int) -> list[CommandId]:
        await self._state.step()
        queued = [row for row in self._state.rows.values() if is_queued(row)]
        late = [row for row in queued if row.expires_at <= trio.current_time()][:limit]
        for row in late:
            self._state.end(row, Status.EXPIRED, holder)
        self._state.reply()
        return [row.command.id for row in late]

    def _in_order(self, reach: str) -> list[Lane]:
        waiting = [
            (row.due, lane)
            for lane, row in self._state.lanes.items()
            if row.reach == reach and row.due is not None
        ]
        return [lane for _, lane in sorted(waiting, key=lambda pair: pair[0])]

    def _due(self, lane: Lane) -> float | None:
        """Where the lane stands; None while it cannot be served."""
        queued = self._state.queued(lane)
        if not queued or not self._state.has_room(lane):
            return None
        head = queued[0]
        return due(
            head_rank=head.rank,
            head_level=head.new.priority.level,
            last_start_s=self._state.lanes[lane].last_start,
        )

    def _place(self, lane: Lane) -> None:
        self._state.lanes[lane].due = self._due(lane)

    def _expire_heads(self, lane: Lane, holder: str) -> list[CommandId]:
        ended = []
        while self._state.has_room(lane) and (queued := self._state.queued(lane)):
            if queued[0].expires_at > trio.current_time():
                break
            self._state.end(queued[0], Status.EXPIRED, holder)
            ended.append(queued[0].command.id)
        return ended

    def _begin(self, row: Row, instance: str | None, holder: str) -> None:
        attempt = row.command.attempt + 1
        wait = self._state.now - row.command.created_at
        row.command = replace(
            row.command,
            status=Status.RUNNING,
            attempt=attempt,
            started_at=self._state.now,
            queue_wait_ms=int(wait.total_seconds() * 1000),
        )
        row.instance = instance
        row.started_at_s = trio.current_time()
        row.expires_at = float("inf")
        self._state.lease(row, holder, self._lease_s)
        self._state.lanes[row.lane].last_start = self._state.moment()
        self._state.put(row, Source.LIFE, 1, 0, status_line(Status.RUNNING, attempt=attempt))
        self._state.record.changed(row.command, "command.started", holder)
