"""SUBSYSTEM Notifier: tells the other processes that something changed.

Debounced at the leading edge: the first change goes out at once, then at most one statement per
20 ms, after the commit and never inside the transaction (a pending NOTIFY holds a global lock until
its commit: 8,406 → 4,234 transactions/s). All of it is hints: what is lost is found by polling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.errors import RdevError
from rdev.domain.ids import CommandId, KeyId, ProjectId

QUEUE_CHANNEL = "rdev_queue"
CANCEL_CHANNEL = "rdev_cancel"
STREAM_CHANNEL = "rdev_stream"
FEED_CHANNEL = "rdev_feed"
KEYS_CHANNEL = "rdev_keys"
PROJECTS_CHANNEL = "rdev_projects"
PAUSE_S = 0.02
# A notification carries at most 8,000 bytes: 100 ids of at most 40 characters, and commas.
IDS_PER_PAYLOAD = 100

_NOTIFY = """
select pg_notify(channel, payload)
from unnest(%s::text[], %s::text[]) as n (channel, payload)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotifierStatistics:
    """Statements sent, and statements that failed (their hints are lost)."""

    sent: int
    lost: int


class Notifier:
    """Collects changes and sends them; also reads what others sent."""

    name = "notifier"

    def __init__(self, *, pool: Pool, server: str) -> None:
        """`server` marks our own notifications, which we do not heed."""
        self._pool = pool
        self._server = server
        # What changed since the last statement: for each channel the ids concerned.
        self._changes: dict[str, set[str]] = {}
        self._work = trio.Event()
        self._stop = trio.Event()
        self._sent = self._lost = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then send what is left. Survives a database that is gone."""
        task_status.started()
        while not self._stop.is_set():
            await self._work.wait()
            self._work = trio.Event()
            await self.run_once()
            with trio.move_on_after(PAUSE_S):
                await self._stop.wait()
        await self.run_once()

    def stop(self) -> None:
        """End the loop. Idempotent."""
        self._stop.set()
        self._work.set()

    async def run_once(self) -> None:
        """Send everything that was collected as one statement; a failure loses the hints."""
        channels, payloads = self._collected()
        if not channels:
            return
        try:
            with translate_errors():
                async with self._pool.connection() as connection:
                    await connection.execute(_NOTIFY, (channels, payloads))
            self._sent += 1
        except RdevError:
            self._lost += 1

    def statistics(self) -> NotifierStatistics:
        """Counters since the start."""
        return NotifierStatistics(sent=self._sent, lost=self._lost)

    def queue_changed(self) -> None:
        """Something may be claimable. Never waits."""
        self._collect(QUEUE_CHANNEL)

    def cancel_asked(self, command: CommandId) -> None:
        """Whoever holds the command should end it. Never waits."""
        self._collect(CANCEL_CHANNEL, command)

    def stream_changed(self, command: CommandId) -> None:
        """The command's stream has new committed events. Never waits."""
        self._collect(STREAM_CHANNEL, command)

    def feed_changed(self) -> None:
        """The status of some command was changed. Never waits."""
        self._collect(FEED_CHANNEL)

    def key_changed(self, key: KeyId) -> None:
        """What the other servers remember of the key is out of date. Never waits."""
        self._collect(KEYS_CHANNEL, key)

    def project_changed(self, project: ProjectId) -> None:
        """What the other servers remember of the project is out of date. Never waits."""
        self._collect(PROJECTS_CHANNEL, project)

    def heard(self, heed: Callable[[Sequence[CommandId]], None]) -> Callable[[str], None]:
        """A callback for the listener: hands on the commands that other servers named."""
        return self.heard_ids(lambda ids: heed([CommandId(text) for text in ids]))

    def heard_ids(self, heed: Callable[[Sequence[str]], None]) -> Callable[[str], None]:
        """The same for ids of any kind."""

        def listen(payload: str) -> None:
            server, _, ids = payload.partition(":")
            if server != self._server:
                heed([text for text in ids.split(",") if text])

        return listen

    def _collect(self, channel: str, *ids: str) -> None:
        self._changes.setdefault(channel, set()).update(ids)
        self._work.set()

    def _collected(self) -> tuple[list[str], list[str]]:
        """Channels and payloads of everything since the last time; a channel without ids
        still says that something changed."""
        changes, self._changes = self._changes, {}
        channels: list[str] = []
        payloads: list[str] = []
        for channel, changed in changes.items():
            ids = sorted(changed)
            for first in range(0, max(1, len(ids)), IDS_PER_PAYLOAD):
                channels.append(channel)
                payloads.append(f"{self._server}:{','.join(ids[first : first + IDS_PER_PAYLOAD])}")
        return channels, payloads
