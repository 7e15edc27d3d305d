"""Projects as pods: the transport is an exec of the API server, over a WebSocket.

An exec is expendable: what runs in the pod goes on when it ends, whoever ended it, and its own exit
status proves nothing about a command. So only bytes count here, and reasons for people to read.
Bounds: `execs_max` execs of one pod at once through this server; one message of stdin.
"""

import math
import re
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import trio
import trio.abc

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.channels import (
    STDIN_END,
    V5,
    Demultiplexer,
    ExecStatus,
    Part,
    stdin_message,
)
from rdev.adapters.execution.executor import Place, ScriptExecutor, ScriptSettings
from rdev.adapters.execution.transport import NeverRanError, Streams, TransportError
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Exit, Lost, LostReason, Offsets, Piece, Spec
from rdev.domain.ids import AttemptId, ProjectId
from rdev.ports.execution import Attachment

# More than some 30 execs that end together in one container hold each other up for a second each
# (containerd issue #8557: a buffer of 32 exits). A guard: a project has five commands at once.
_EXECS_MAX: Final = 16
_SLOT_S: Final = 10.0  # for one of them to become free
_REASON_CHARACTERS: Final = 120  # each layer puts its words in front: the reason is at the end
_STDIN_BYTES: Final = 32_768  # of one message; servers take at least 64 KiB
# What runtimes say of a program that is not there (runc, crun, gVisor), and the exit codes that
# shells, and runtimes that say nothing, give for it.
_IS_MISSING: Final = re.compile(r'executable file|exec: ".*no such file', re.IGNORECASE)
_NOT_FOUND: Final = frozenset({126, 127})
# For so long the instance of a pod that the watch says nothing new of is taken for what it was: a
# row of commands costs one exec each, not two.
FRESH_S: Final = 5.0
_PREPARED_MAX: Final = 10_000


class ExecSocket(Protocol):
    """The WebSocket of one exec. One task may send while another receives."""

    @property
    def subprotocol(self) -> str:
        """What was agreed, of `channels.SUBPROTOCOLS`."""
        ...

    async def send(self, message: bytes) -> None:
        """Send a binary message. Errors: BrokenResourceError."""
        ...

    async def receive(self) -> Part | None:
        """The next part of a message, or None when the other side closed in order.

        Errors: BrokenResourceError. Cancellation: nothing is lost.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecStatistics:
    """Execs `open` now. Since the start: `opened`; `failed` to open; not tried because the pod was
    `full`; `reconnects` of those who observe a command."""

    open: int
    opened: int
    failed: int
    full: int
    reconnects: int


# Starts an argv in a project's pod with stdin and stdout; RdevError on entry where that fails.
OpenExec = Callable[[ProjectId, Sequence[str]], AbstractAsyncContextManager[ExecSocket]]

# What the cluster knows of why a project's processes are gone, None for nothing. The flag says
# whether it is certain that they are; else only a pod that is over is a reason.
ReasonOf = Callable[[ProjectId, bool], LostReason | None]


class _Stdin(trio.abc.SendStream):
    def __init__(self, socket: ExecSocket) -> None:
        self._socket = socket
        self._is_closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send it in messages. Errors: BrokenResourceError, ClosedResourceError."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        for at in range(0, len(view), _STDIN_BYTES):
            self._check()
            await self._socket.send(stdin_message(bytes(view[at : at + _STDIN_BYTES])))

    async def wait_send_all_might_not_block(self) -> None:
        """Always: there is nobody to ask."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """End the process's stdin: by v5 at once, by v4 with the whole exec."""
        if not self._is_closed:
            self._is_closed = True
            if self._socket.subprotocol == V5:
                try:
                    await self._socket.send(STDIN_END)
                except trio.BrokenResourceError:
                    pass  # it ends with the connection
                return
        await trio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("stdin is closed")


class _Stdout(trio.abc.ReceiveStream):
    def __init__(self, socket: ExecSocket) -> None:
        self._socket = socket
        self._channels = Demultiplexer()
        self._left = b""
        self._has_ended = self._has_spoken = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes of stdout; empty when the exec is over and all of it was read.

        Errors: BrokenResourceError for an exec that ended without a status, or that never was a
        process (`message` says why, e.g. that the image has no shell).
        """
        await trio.lowlevel.checkpoint()
        while not self._left and not self._has_ended:
            await self._read()
        most = len(self._left) if max_bytes is None else max_bytes
        data, self._left = self._left[:most], self._left[most:]
        return data

    async def _read(self) -> None:
        try:
            part = await self._socket.receive()
        except trio.BrokenResourceError:
            if self._channels.status is None:
                raise
            part = None  # it was over: only the farewell is missing
        if part is not None:
            # Output may come behind the status: each channel is copied by itself. Read on.
            self._left = self._channels.feed(part)
            self._has_spoken |= bool(self._left)
            _check_ran(self._channels.status)
            return
        if self._channels.status is None:
            raise trio.BrokenResourceError("the exec ended without a status")
        if self._channels.status.exit_code in _NOT_FOUND and not self._has_spoken:
            raise NeverRanError("the image has no shell, or not what it needs")
        self._has_ended = True

    async def aclose(self) -> None:
        """Nothing: the exec ends with its block."""
        await trio.lowlevel.checkpoint()


def _check_ran(status: ExecStatus | None) -> None:
    if status is not None and status.exit_code is None:
        words = status.message or status.reason or "the exec failed"
        if _IS_MISSING.search(words) is not None:
            raise NeverRanError(words[-_REASON_CHARACTERS:])
        raise trio.BrokenResourceError(words[-_REASON_CHARACTERS:])


class KubernetesTransport:
    """Implements `Transport` with execs. Leaving the block drops the connection, and with it the
    process's stdin ends, as the API server and the kubelet see to."""

    def __init__(
        self, open_exec: OpenExec, *, execs_max: int = _EXECS_MAX, slot_s: float = _SLOT_S
    ) -> None:
        """Opens nothing."""
        self._open = open_exec
        self._execs_max = execs_max
        self._slot_s = slot_s
        self.open_now = self.opened = self.failed = self.full = 0
        # One for each project with an exec now: whoever uses it holds it.
        self._slots: weakref.WeakValueDictionary[ProjectId, trio.Semaphore] = (
            weakref.WeakValueDictionary()
        )

    @asynccontextmanager
    async def run(self, project: ProjectId, argv: Sequence[str]) -> AsyncIterator[Streams]:
        """See `Transport.run`. Blocks: at most `slot_s` for others of this project to end."""
        slots = self._slots.get(project)
        if slots is None:
            slots = self._slots[project] = trio.Semaphore(self._execs_max)
        with trio.move_on_after(self._slot_s) as waiting:
            await slots.acquire()
        if waiting.cancelled_caught:
            self.full += 1
            raise TransportError(f"{self._execs_max} execs are open in the pod")
        try:
            async with AsyncExitStack() as stack:
                try:
                    socket = await stack.enter_async_context(self._open(project, argv))
                except RdevError as error:
                    self.failed += 1
                    raise TransportError(
                        error.message, retry_after_s=error.retry_after_s or 0.0
                    ) from error
                self.opened += 1
                self.open_now += 1
                stack.callback(self._closed)
                yield Streams(_Stdin(socket), _Stdout(socket))
        finally:
            slots.release()

    def _closed(self) -> None:
        self.open_now -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a project was when it was asked."""

    instance: str
    until_s: float


class KubernetesExecutor(ScriptExecutor):
    """`Executor` for the projects of one namespace of one cluster."""

    def __init__(
        self,
        *,
        cluster: Callable[[], str],
        namespace: str,
        transport: KubernetesTransport,
        reason_of: ReasonOf,
        base_env: Mapping[str, str],
        place: Callable[[ProjectId], Place],
        shell: str = "sh",
        journal_max_bytes: int = 1 << 30,
        patience: Patience | None = None,
        is_away: Callable[[], bool] = lambda: False,
    ) -> None:
        """`cluster` gives what no other cluster has; SERVICE_UNAVAILABLE while that is not known.
        What `base_env` does not say, PATH included, is as the container has it."""
        super().__init__(
            reach=lambda: f"kubernetes:{cluster()}/{namespace}",
            transport=transport,
            place=place,
            settings=ScriptSettings(
                base_env=base_env,
                path=base_env.get("PATH"),
                shell=shell,
                journal_max_bytes=journal_max_bytes,
                patience=patience or Patience(),
            ),
            is_away=is_away,
        )
        self._execs = transport
        self._reason_of = reason_of
        # The instance in which each project was prepared last; the least recently used go.
        self._prepared: OrderedDict[ProjectId, str] = OrderedDict()
        # What each project was a moment ago, and until when that is taken for now.
        self._fresh: dict[ProjectId, _Known] = {}

    def statistics(self) -> ExecStatistics:
        """What is now, and what was since the start."""
        return ExecStatistics(
            open=self._execs.open_now,
            opened=self._execs.opened,
            failed=self._execs.failed,
            full=self._execs.full,
            reconnects=self._reconnects,
        )

    async def instance(self, project: ProjectId) -> str:
        """See `Executor.instance`; at most `FRESH_S` old, and never from before the last `forget`.
        A pod that is new to us is prepared first, whoever made it. Errors: also UnfitProjectError.
        """
        known, asked_at_s = self._fresh.get(project), trio.current_time()
        if known is not None and asked_at_s < known.until_s:
            return known.instance
        asking = self._fresh[project] = _Known(instance="", until_s=-math.inf)
        found = await self._asked_for(project)
        if self._fresh.get(project) is asking:  # else it was forgotten, or asked for later
            self._fresh[project] = _Known(instance=found, until_s=asked_at_s + FRESH_S)
        return found

    def forget(self, project: ProjectId) -> None:
        """The project's pod may have changed: what is known of it is asked for again."""
        self._fresh.pop(project, None)

    async def _asked_for(self, project: ProjectId) -> str:
        found = await self._instance_if_any(project)
        if found is None or self._prepared.get(project) != found:
            await self.prepare(project)
            found = found or await super().instance(project)
            self._prepared[project] = found
            if len(self._prepared) > _PREPARED_MAX:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(project)
        return found

    async def _instance_if_any(self, project: ProjectId) -> str | None:
        try:
            return await super().instance(project)
        except RdevError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            return None

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        attempt: AttemptId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator[Attachment]:
        """See `Executor.attach`; a `Lost` says what the cluster knows of it."""
        observing = super().attach(project, attempt, spec=spec, instance=instance, offsets=offsets)
        async with observing as attachment:
            yield _Explained(attachment, partial(self._reason_of, project))


class _Explained:
    """An attachment whose `Lost` has the cluster's reason, where it is about the pod."""

    def __init__(
        self, attachment: Attachment, reason_of: Callable[[bool], LostReason | None]
    ) -> None:
        self._attachment = attachment
        self._reason_of = reason_of

    async def receive(self) -> Piece | Exit | Lost:
        """See `Attachment.receive`."""
        item = await self._attachment.receive()
        return explain(item, self._reason_of) if isinstance(item, Lost) else item


def explain(lost: Lost, reason_of: Callable[[bool], LostReason | None]) -> Lost:
    """Put the cluster's reason in place of what was seen from inside.

    Only where the pod's processes are gone: another instance answered, or nobody could be reached
    and the cluster says that the pod is over (then nothing runs any more).
    """
    match lost.reason, lost.unfinished:
        case (LostReason.POD_GONE, _) | (LostReason.SUPERVISOR_GONE, True):
            reason = reason_of(True)
        case (LostReason.UNREACHABLE, _):
            reason = reason_of(False)
        case _:
            return lost
    return lost if reason is None else Lost(reason=reason, unfinished=lost.unfinished)
