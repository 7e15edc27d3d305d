"""`rdev serve` on an executor that runs nothing and a webhook sender that sends nothing: they note
what they would have done, and say done.

For tests that let a program invent commands. Everything else is the product's own.
"""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

import rdev.execution_wiring
import rdev.webhook_wiring
from rdev.adapters.webhooks.sender import SenderStatistics
from rdev.cli import main
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import (
    Exit,
    KillReport,
    Lost,
    LostReason,
    Offsets,
    Piece,
    Spec,
    Stream,
)
from rdev.domain.ids import AttemptId, CommandId, ProjectId, attempt_ids
from rdev.domain.sending import Outcome, OutgoingRequest

OUTPUT = b"recorded\n"


class RecordingExecutor:
    """Implements `Executor`; every attempt writes one line and succeeds."""

    standing_instance = "recording"

    def __init__(self, **ignored: object) -> None:
        self._projects: set[ProjectId] = set()
        self._seen: dict[AttemptId, bool] = {}  # whether it was started

    @property
    def reach(self) -> str:
        return "recording:here"

    async def prepare(self, project: ProjectId) -> None:
        await trio.lowlevel.checkpoint()
        self._projects.add(project)

    async def instance(self, project: ProjectId) -> str:
        await trio.lowlevel.checkpoint()
        if project not in self._projects:
            raise RdevError(ErrorCode.NOT_FOUND, "project has no folder")
        return self.standing_instance

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        attempt: AttemptId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator["RecordedAttachment"]:
        started = self._seen.setdefault(attempt, spec is not None)
        yield RecordedAttachment(OUTPUT[offsets.stdout :] if started else None, offsets.stdout)

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        await trio.lowlevel.checkpoint()
        self._seen.setdefault(attempt, False)
        return KillReport(confirmed=True)

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[AttemptId]:
        await trio.lowlevel.checkpoint()
        return []

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        await trio.lowlevel.checkpoint()
        for command in commands:
            for attempt in attempt_ids(command):
                self._seen.pop(attempt, None)


class RecordedAttachment:
    """Implements `Attachment`; `left` None: it was never started."""

    def __init__(self, left: bytes | None, offset: int) -> None:
        self._left = left
        self._offset = offset

    async def receive(self) -> Piece | Exit | Lost:
        await trio.lowlevel.checkpoint()
        if self._left is None:
            return Lost(reason=LostReason.NOT_STARTED)
        if self._left:
            data, self._left = self._left, b""
            return Piece(stream=Stream.STDOUT, offset=self._offset, data=data)
        return Exit(
            exit_code=0,
            signal=None,
            why=None,
            stdout_bytes=len(OUTPUT),
            stderr_bytes=0,
            runtime_ms=1,
            kill=None,
        )


class RecordingSender:
    """Implements `WebhookSender`; resolves, dials and sends nothing. Every receiver takes it."""

    def __init__(self, **ignored: object) -> None:
        self._taken = 0

    async def send(self, request: OutgoingRequest) -> Outcome:
        await trio.lowlevel.checkpoint()
        self._taken += 1
        return Outcome(
            status=204,
            fault=None,
            detail="",
            latency_s=0.001,
            request_headers={"host": request.target.authority},
            body=b"",
            truncated=False,
            http_version="HTTP/1.1",
            retry_after=None,
        )

    def statistics(self) -> SenderStatistics:
        return SenderStatistics(dialled=0, reused=self._taken, idle=0)

    def close(self) -> None:
        """There is nothing to close."""


if __name__ == "__main__":
    rdev.webhook_wiring.HttpWebhookSender = RecordingSender  # type: ignore[assignment,misc]
    rdev.execution_wiring.LocalExecutor = RecordingExecutor  # type: ignore[assignment,misc]
    sys.argv[0] = "rdev"
    main()
