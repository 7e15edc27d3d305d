"""`rdev serve` that dies at named points and whose clock can be wrong; the product has no hooks.

The ordinary composition root, over cursors and a transport that look for the armed point first.
`clock` in the state folder holds seconds to be added to this process's wall clock.
"""

import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self
from uuid import UUID

import trio
import uuid_utils.compat
from psycopg import AsyncCursor, pq
from psycopg.rows import Row

import rdev.adapters.execution.local
import rdev.adapters.postgres.connection
import rdev.webhook_wiring
import rdev.wiring
from rdev.adapters.execution.transport import Streams
from rdev.adapters.postgres import commands, deliveries, lanes, leases, notifier, output
from rdev.adapters.webhooks.sender import HttpWebhookSender
from rdev.cli import main
from rdev.domain.ids import ProjectId
from rdev.domain.sending import Outcome, OutgoingRequest
from tests.faults.points import Points

STATE_DIR = Path(os.environ["RDEV_STATE_DIR"])
POINTS = Points(folder=STATE_DIR)
RECEIVE_BYTES = 65_536

NAMES = {
    commands._INSERT: "insert",
    commands._CANCEL: "cancel",
    commands._REQUEST_CANCEL: "request_cancel",
    lanes._TOUCH: "touch",
    lanes._CLAIM: "claim",
    lanes._REPAIR: "repair",
    lanes._EXPIRE: "expire",
    leases._TAKE_OVER: "take_over",
    leases._HEARTBEAT: "heartbeat",
    leases._RELEASE: "release",
    leases._RELEASE_HOLDER: "release_holder",
    notifier._NOTIFY: "notify",
    deliveries._CLAIM: "claim_deliveries",
    deliveries._SETTLE: "settle",
}


def name_of(query: object, params: object) -> str | None:
    """What the statement is called; None for one without points."""
    if query in (output._APPEND, output._APPEND_ENDS):
        assert isinstance(params, dict)
        return "finish" if any(params["status"]) else "append"
    return NAMES.get(query) if isinstance(query, str) else None


class PointedCursor(AsyncCursor[Row]):
    """Looks for the armed point around each statement that has a name."""

    async def execute(self, query: object, params: object = None, **more: object) -> Self:
        name = name_of(query, params)
        if name is None:
            return await super().execute(query, params, **more)  # type: ignore[arg-type]
        POINTS.reach(f"{name}.before")
        status = self.connection.info.transaction_status
        if POINTS.is_armed(f"{name}.uncommitted") and status == pq.TransactionStatus.IDLE:
            await self.connection.execute("begin")
            await super().execute(query, params, **more)  # type: ignore[arg-type]
            POINTS.reach(f"{name}.uncommitted")
            await self.connection.execute("commit")
        else:
            await super().execute(query, params, **more)  # type: ignore[arg-type]
        POINTS.reach(f"{name}.committed")
        return self


class PointedConnection(rdev.adapters.postgres.connection.TrioConnection[Row]):
    """A connection with such cursors."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.cursor_factory = PointedCursor


class PointedTransport(rdev.adapters.execution.local.LocalTransport):
    """Looks for the armed point around each exec."""

    @asynccontextmanager
    async def run(self, project: ProjectId, argv: Sequence[str]) -> AsyncIterator[Streams]:
        verb = next((word for word in argv if word in ("attach", "kill_command")), "other")
        POINTS.reach(f"{verb}.before")
        async with super().run(project, argv) as streams:
            POINTS.reach(f"{verb}.opened")
            if verb == "attach":
                yield Streams(PointedStdin(streams.stdin), PointedStdout(streams.stdout))
            else:
                yield streams


class PointedStdin(trio.abc.SendStream):
    def __init__(self, inner: trio.abc.SendStream) -> None:
        self._inner = inner

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if POINTS.is_armed("attach.half_spec"):
            half = len(data) // 2
            await self._inner.send_all(data[:half])
            POINTS.reach("attach.half_spec")
            data = data[half:]
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._inner.aclose()


class PointedStdout(trio.abc.ReceiveStream):
    def __init__(self, inner: trio.abc.ReceiveStream) -> None:
        self._inner = inner

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._inner.receive_some(max_bytes)
        POINTS.reach("attach.read")
        return data

    async def aclose(self) -> None:
        await self._inner.aclose()


class PointedSender(HttpWebhookSender):
    """Looks for the armed point around each request to a receiver."""

    async def send(self, request: OutgoingRequest) -> Outcome:
        POINTS.reach("send.before")
        outcome = await super().send(request)
        POINTS.reach("send.after")
        return outcome


def clock_is_off_by_s() -> float:
    """How wrong this process's clock is now."""
    try:
        return float((STATE_DIR / "clock").read_text() or 0)
    except FileNotFoundError:
        return 0.0


def step_clock() -> None:
    """Everything here that asks what time it is gets the wrong answer."""
    right_time, right_time_ns, right_now = time.time, time.time_ns, rdev.wiring._now

    def wrong_now() -> datetime:
        return right_now() + timedelta(seconds=clock_is_off_by_s())

    def wrong_uuid7() -> UUID:
        wrong_ms = int((right_time() + clock_is_off_by_s()) * 1_000)
        return UUID(int=(wrong_ms << 80) | (right_uuid7().int & ((1 << 80) - 1)))

    right_uuid7 = uuid_utils.compat.uuid7
    time.time = lambda: right_time() + clock_is_off_by_s()
    time.time_ns = lambda: right_time_ns() + int(clock_is_off_by_s() * 1e9)
    rdev.wiring._now = wrong_now
    uuid_utils.compat.uuid7 = wrong_uuid7


if __name__ == "__main__":
    rdev.adapters.postgres.connection.TrioConnection = PointedConnection  # type: ignore[misc]
    rdev.adapters.execution.local.LocalTransport = PointedTransport  # type: ignore[misc]
    rdev.webhook_wiring.HttpWebhookSender = PointedSender  # type: ignore[misc]
    step_clock()
    sys.argv[0] = "rdev"
    main()
