"""The housekeeper's duties on the stores in memory."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import date, timedelta

from rdev.domain.execution import KillReport
from rdev.domain.idempotency import IDEMPOTENCY_S
from rdev.domain.ids import CommandId, attempt_id
from rdev.domain.retention import Ended, OutputDay
from tests.fakes.store import Row, StoreState, is_unkilled


class FakeUpkeep:
    """`Upkeep`, `StoreDuties` and, by reach, `PlaceDuties`."""

    def __init__(self, state: StoreState) -> None:
        self._state = state
        self._days_ahead = 0
        self._taken: set[str] = set()
        self._places: dict[str, FakePlaceDuties] = {}
        # Days that somebody reads.
        self.in_use: set[date] = set()
        self.audit_days: set[date] = set()
        # Windows of rate limits that are over.
        self.idle_windows = 0

    @asynccontextmanager
    async def store_turn(self) -> AsyncIterator["FakeUpkeep | None"]:
        async with self._turn("store") as has_it:
            yield self if has_it else None

    @asynccontextmanager
    async def place_turn(self, reach: str) -> AsyncIterator["FakePlaceDuties | None"]:
        places = self._places.setdefault(reach, FakePlaceDuties(self._state, reach))
        async with self._turn(f"place {reach}") as has_it:
            yield places if has_it else None

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[bool]:
        await self._state.step()
        if name in self._taken:
            yield False
            return
        self._taken.add(name)
        try:
            yield True
        finally:
            self._taken.discard(name)

    async def ensure_partitions(self, *, days_ahead: int) -> None:
        await self._state.step()
        self._days_ahead = days_ahead

    async def output_days(self) -> list[OutputDay]:
        await self._state.step()
        today = self._state.now.date()
        days = {today + timedelta(days=ahead) for ahead in range(self._days_ahead + 1)}
        rows = self._state.rows.values()
        days |= {_day(row) for row in rows if self._state.chunks[row.command.id]}
        return [
            OutputDay(
                day=day,
                age_days=(today - day).days,
                size_bytes=sum(
                    len(chunk.payload)
                    for row in rows
                    if _day(row) == day
                    for chunk in self._state.chunks[row.command.id]
                ),
                is_settled=all(row.command.finished_at for row in rows if _day(row) == day),
            )
            for day in sorted(days)
        ]

    async def drop_output(self, day: date) -> bool:
        await self._state.step()
        if day in self.in_use:
            return False
        for row in self._state.rows.values():
            if _day(row) == day:
                self._state.chunks[row.command.id] = []
        return True

    async def old_audit_days(self, *, keep_days: int) -> list[date]:
        await self._state.step()
        today = self._state.now.date()
        return sorted(day for day in self.audit_days if (today - day).days > keep_days)

    async def drop_audit(self, day: date, *, keep_days: int) -> bool:
        await self._state.step()
        if day in self.in_use:
            return False
        self.audit_days.discard(day)
        return True

    async def forget_keys(self, *, limit: int) -> int:
        await self._state.step()
        return self._state.keys.forget(IDEMPOTENCY_S + 3_600, limit)

    async def forget_windows(self, *, limit: int) -> int:
        await self._state.step()
        done = min(limit, self.idle_windows)
        self.idle_windows -= done
        return done

    async def forget_events(self, *, older_s: float, limit: int) -> int:
        await self._state.step()
        return self._state.record.forget(older_s, limit)

    async def forget_commands(self, *, older_s: float, limit: int) -> int:
        await self._state.step()
        old = [row for row in _ended(self._state, older_s) if not is_unkilled(row)][:limit]
        for row in old:
            del self._state.rows[row.command.id]
        return len(old)


class FakePlaceDuties:
    """`PlaceDuties`."""

    def __init__(self, state: StoreState, reach: str) -> None:
        self._state = state
        self._reach = reach
        self._last: Ended | None = None

    async def untidied(self, *, older_s: float, limit: int) -> list[Ended]:
        found = await self.prunable(older_s=older_s, limit=len(self._state.rows))
        started = [one for one in found if self._state.rows[one.command].command.started_at]
        last = self._last
        return [one for one in started if last is None or _order(one) > _order(last)][:limit]

    async def mark_tidied(self, last: Ended) -> None:
        await self._state.step()
        self._last = last

    async def unkilled(self, *, limit: int) -> list[Ended]:
        await self._state.step()
        rows = [row for row in self._state.rows.values() if row.reach == self._reach]
        return [_to_ended(row) for row in rows if is_unkilled(row)][:limit]

    async def confirm_kill(self, command: CommandId) -> None:
        await self._state.step()
        row = self._state.rows[command]
        row.command = replace(row.command, kill=KillReport(confirmed=True))

    async def prunable(self, *, older_s: float, limit: int) -> list[Ended]:
        await self._state.step()
        rows = [
            row
            for row in _ended(self._state, older_s)
            if row.reach == self._reach and not is_unkilled(row)
        ]
        return sorted(map(_to_ended, rows), key=_order)[:limit]

    async def forget(self, commands: Sequence[CommandId]) -> None:
        await self._state.step()
        for command in commands:
            if command in self._state.rows and self._state.rows[command].command.finished_at:
                del self._state.rows[command]


def _ended(state: StoreState, older_s: float) -> list[Row]:
    before = state.now - timedelta(seconds=older_s)
    rows = state.rows.values()
    return [row for row in rows if (at := row.command.finished_at) is not None and at < before]


def _to_ended(row: Row) -> Ended:
    command = row.command
    assert command.finished_at is not None
    return Ended(
        command=command.id,
        attempt=attempt_id(command.id, max(1, command.attempt)),
        project=command.project,
        ended_at=command.finished_at,
    )


def _order(one: Ended) -> tuple[object, ...]:
    return one.ended_at, one.command


def _day(row: Row) -> date:
    return row.command.created_at.date()
