"""SUBSYSTEM Housekeeper: what must be done from time to time, by one server at a time.

Each minute, behind turns that one server has at a time; a server that gets none leaves the duties
to the one that has it. Of the store:

| what | from what age on | at once | duty in `rdev_housekeeping_total` |
|---|---|---|---|
| partitions for output and the audit log | `DAYS_AHEAD` days ahead | made | |
| output, by whole days (1) | `retention.days` days | a day, ≤ 100 ms behind others | output_days |
| the audit log, by whole days (3) | `audit_days` days | a day, ≤ 100 ms behind all | audit_days |
| idempotency keys | 24 h | ≤ 1,000 rows, ≤ 100 ms | idempotency_keys |
| windows of rate limits | when their last hit has left | ≤ 1,000 rows, ≤ 100 ms | rate_windows |
| deliveries of webhooks | `retention.delivery_days` | ≤ 1,000 rows, ≤ 100 ms | deliveries |
| events of commands and projects (4) | 7 days | ≤ 1,000 rows, ≤ 100 ms | events |
| ended commands of any reach | `retention.days` + 2 days | ≤ 1,000 rows, ≤ 100 ms | commands |

and of the places of this server's reach:

| what | from what age on | at once | duty |
|---|---|---|---|
| folders of ended commands, all but `go/` | `TIDY_AGE_S` | 200, one exec a project | folders |
| processes of ended commands: killed | with their folder | one by one | orphans |
| processes that a kill left: killed again (2) | none | 200 | survivors |
| ended commands, their folders | `retention.days` + 1 days | 200, one exec a project | commands |

(1) And younger days, oldest first, while all output is over `retention.log_max_bytes`. Never
today's, and none in which a command waits or runs.

(2) Their project is `failed` and starts nothing until nothing is left of them.

(3) Never before the database's owner lets it (`audit_policy`), and nothing that is not sealed.

(4) All but the newest of them, by which the feeds know that something went before it.

A command outlives its output by a day: until then its stream answers 410, after that 404. A place
that cannot be reached is passed by; its rows go a day later than others. Rows go in batches that
shrink where one takes over 100 ms, with a pause as long as the batch took.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, ProjectId, command_of
from rdev.domain.retention import FEED_KEPT_S, BatchSize, Ended, Retention, days_to_drop
from rdev.ports.execution import Executor
from rdev.ports.telemetry import UpkeepTelemetry
from rdev.ports.upkeep import PlaceDuties, StoreDuties, Upkeep

INTERVAL_S = 60.0
DAYS_AHEAD = 3
DAY_S = 86_400.0
# Long after the last reader of a command's folder has read its end.
TIDY_AGE_S = 300.0
# So many folders at once: an exec of about a second.
FOLDERS_MAX = 200
# What an orphan is given between TERM and KILL.
ORPHAN_GRACE_S = 5

_log = logging.getLogger("rdev.housekeeper")


class Housekeeper:
    """One loop; every duty is idempotent and gives way to `stop` between batches."""

    name = "housekeeper"

    def __init__(
        self,
        *,
        upkeep: Upkeep,
        executor: Executor,
        telemetry: UpkeepTelemetry,
        retention: Retention,
        audit_days: int,
        backoff: Callable[[], Backoff],
    ) -> None:
        """Opens nothing."""
        self._upkeep = upkeep
        self._executor = executor
        self._telemetry = telemetry
        self._retention = retention
        self._audit_days = audit_days
        self._backoff = backoff
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Survives a database that is gone: it tries again with pauses."""
        backoff = self._backoff()
        task_status.started()
        while not self._stop.is_set():
            pause_s = INTERVAL_S
            try:
                await self.run_once()
                backoff = self._backoff()
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                pause_s = backoff.next_s()
            with trio.move_on_after(pause_s):
                await self._stop.wait()

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()

    async def run_once(self) -> None:
        """Every duty that is this server's turn, once. Errors: SERVICE_UNAVAILABLE."""
        async with self._upkeep.store_turn() as store:
            if store is not None:
                await self._keep_store(store)
        async with self._upkeep.place_turn(self._executor.reach) as places:
            if places is not None:
                await self._kill_again(places)
                await self._tidy(places)
                await self._prune(places)

    async def _keep_store(self, store: StoreDuties) -> None:
        # First: without a partition for the day no command is accepted.
        await store.ensure_partitions(days_ahead=DAYS_AHEAD)
        await self._drop_output(store)
        await self._drop_audit(store)
        await self._in_batches("idempotency_keys", lambda rows: store.forget_keys(limit=rows))
        await self._in_batches("rate_windows", lambda rows: store.forget_windows(limit=rows))
        deliveries_s = self._retention.delivery_days * DAY_S
        await self._in_batches(
            "deliveries", lambda rows: store.forget_deliveries(older_s=deliveries_s, limit=rows)
        )
        await self._in_batches(
            "events", lambda rows: store.forget_events(older_s=FEED_KEPT_S, limit=rows)
        )
        older_s = (self._retention.days + 2) * DAY_S
        await self._in_batches(
            "commands", lambda rows: store.forget_commands(older_s=older_s, limit=rows)
        )

    async def _drop_output(self, store: StoreDuties) -> None:
        stored = await store.output_days()
        for one in days_to_drop(stored, self._retention):
            if not await store.drop_output(one.day):
                _log.info("output is in use", extra={"day": str(one.day)})
                continue
            stored.remove(one)
            self._telemetry.kept_house("output_days", 1)
            _log.info("output dropped", extra={"day": str(one.day), "bytes": one.size_bytes})
        size_bytes = sum(one.size_bytes for one in stored)
        if size_bytes > self._retention.log_max_bytes:
            _log.warning("output is over its limit", extra={"bytes": size_bytes})

    async def _drop_audit(self, store: StoreDuties) -> None:
        for day in await store.old_audit_days(keep_days=self._audit_days):
            if not await store.drop_audit(day, keep_days=self._audit_days):
                _log.info("audit log is in use", extra={"day": str(day)})
                return
            self._telemetry.kept_house("audit_days", 1)
            _log.info("audit log dropped", extra={"day": str(day)})

    async def _in_batches(self, duty: str, step: Callable[[int], Awaitable[int]]) -> None:
        """Repeat a step that takes at most so many rows, until it finds less than that."""
        size = BatchSize()
        while not self._stop.is_set():
            rows, began_s = size.rows, trio.current_time()
            done = await step(rows)
            took_s = trio.current_time() - began_s
            if done:
                self._telemetry.kept_house(duty, done)
            if done < rows:
                return
            size.took(took_s)
            await trio.sleep(took_s)

    async def _kill_again(self, places: PlaceDuties) -> None:
        """End what kills have left; a project of which nothing is left serves again."""
        for one in await places.unkilled(limit=FOLDERS_MAX):
            try:
                report = await self._executor.kill(one.project, one.attempt, grace_s=ORPHAN_GRACE_S)
            except RdevError as error:
                _passed_by(one.project, error)
                continue
            facts = {"command_id": one.command, "project": one.project}
            if report.confirmed:
                await places.confirm_kill(one.command)
                self._telemetry.kept_house("survivors", 1)
                _log.warning("survivors killed", extra=facts)
            else:
                _log.warning("survivors still run", extra=facts | {"pids": report.survivors})

    async def _tidy(self, places: PlaceDuties) -> None:
        """Clear the folders of what has ended, in the order in which it ended."""
        while not self._stop.is_set():
            batch = await places.untidied(older_s=TIDY_AGE_S, limit=FOLDERS_MAX)
            for project, commands in _by_project(batch):
                await self._tidy_project(project, commands)
            if batch:
                await places.mark_tidied(batch[-1])
            if len(batch) < FOLDERS_MAX:
                return

    async def _tidy_project(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        """Clear these folders; what still runs there has nobody who waits for it: end it first."""
        try:
            orphans = await self._executor.tidy(project, commands)
            for orphan in orphans:
                report = await self._executor.kill(project, orphan, grace_s=ORPHAN_GRACE_S)
                self._telemetry.kept_house("orphans", 1)
                facts = {"command_id": command_of(orphan), "confirmed": report.confirmed}
                _log.warning("orphan killed", extra=facts)
            if orphans:
                await self._executor.tidy(project, [command_of(orphan) for orphan in orphans])
        except RdevError as error:
            _passed_by(project, error)
        else:
            self._telemetry.kept_house("folders", len(commands))

    async def _prune(self, places: PlaceDuties) -> None:
        """Remove the folders of what is old, then its rows: a row without its folder is gone for
        ever, a folder without its row would stay for ever."""
        older_s = (self._retention.days + 1) * DAY_S
        while not self._stop.is_set():
            batch = await places.prunable(older_s=older_s, limit=FOLDERS_MAX)
            removed = True
            for project, commands in _by_project(batch):
                if await self._remove(project, commands):
                    await places.forget(commands)
                    self._telemetry.kept_house("commands", len(commands))
                else:
                    removed = False
            if len(batch) < FOLDERS_MAX or not removed:
                return

    async def _remove(self, project: ProjectId, commands: Sequence[CommandId]) -> bool:
        """Whether the folders are gone."""
        try:
            await self._executor.remove(project, commands)
        except RdevError as error:
            _passed_by(project, error)
            return False
        return True


def _by_project(batch: Iterable[Ended]) -> Iterable[tuple[ProjectId, list[CommandId]]]:
    projects: dict[ProjectId, list[CommandId]] = {}
    for one in batch:
        projects.setdefault(one.project, []).append(one.command)
    return projects.items()


def _passed_by(project: ProjectId, error: RdevError) -> None:
    """A place that cannot be reached concerns its own commands only."""
    if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
        raise error
    _log.warning("project passed by", extra={"project": project, "error": str(error)})
