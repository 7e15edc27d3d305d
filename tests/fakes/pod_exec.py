"""The exec of a fake API server: argv runs as a local process, a group of its own, as in a pod.

Like a kubelet it does not end the process when the socket goes: its stdin ends, no more. It speaks
v4 and v5, and can misbehave in the ways that were reported of real ones.
"""

import os
import signal
import subprocess
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec
import trio
from quart import websocket

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"


class StatusFault(StrEnum):
    """What is wrong with the status on channel 3."""

    NONE = "none"
    ABSENT = "absent"  # an orderly close without one
    FIRST = "first"  # before the output
    FALSE_SUCCESS = "false success"  # before the output, which is then not sent
    NOISE = "noise"


@dataclass
class PodExec:
    """How execs behave; fields may be changed at any time."""

    env: dict[str, str]
    supported: tuple[str, ...] = (V5, V4)
    message_bytes: int = 32_768  # of output; small ones split lines and characters
    status_fault: StatusFault = StatusFault.NONE
    is_deaf: bool = False  # reads nothing from the socket
    is_mute: bool = False  # sends nothing on it, not even a close
    seen: list[list[str]] = field(default_factory=list)  # each exec's argv
    open_now: int = 0
    open_most: int = 0
    sent_bytes: int = 0  # of output, by all execs
    stdin_ends: int = 0  # that came by v5's message
    _processes: dict[int, trio.Process] = field(default_factory=dict)
    _stderr_ended: dict[int, trio.Event] = field(default_factory=dict)

    async def serve(self, argv: list[str], subprotocol: str) -> None:
        """One accepted exec, until it is over."""
        self.seen.append(argv)
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        try:
            await self._serve(argv, subprotocol)
        finally:
            self.open_now -= 1

    async def _serve(self, argv: list[str], subprotocol: str) -> None:
        for channel in (0, 1, 3):
            await websocket.send(bytes((channel,)))  # as real ones do: it is open
        try:
            process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env=self.env,
                start_new_session=True,
            )
        except OSError as error:
            text = f'exec: "{argv[0]}": {error.strerror}'
            await self._send_status(
                {"status": "Failure", "reason": "InternalError", "message": text}
            )
            return
        self._processes[process.pid] = process
        self._stderr_ended[process.pid] = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._copy_stdin, process, subprotocol)
                nursery.start_soon(self._drop_stderr, process)
                await self._copy_output(process)
                nursery.cancel_scope.cancel()
        finally:
            # What a kubelet does when the socket goes: stdin ends. The process is its own.
            # shielded: closing needs no waiting, and a cancellation would skip the second
            with trio.CancelScope(shield=True):
                for stream in (process.stdin, process.stdout, process.stderr):
                    assert stream is not None
                    await trio.aclose_forcefully(stream)

    async def _copy_stdin(self, process: trio.Process, subprotocol: str) -> None:
        assert process.stdin is not None
        while True:
            if self.is_deaf:
                await trio.sleep_forever()
            message = await websocket.receive()
            assert isinstance(message, bytes)
            if message == b"\xff\x00" and subprotocol == V5:
                self.stdin_ends += 1
                await process.stdin.aclose()
            elif message[0] == 0:
                try:
                    await process.stdin.send_all(message[1:])
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

    async def _drop_stderr(self, process: trio.Process) -> None:
        """containerd takes the end of stderr for the end of stdin, also where nobody asked for it;
        and before both have ended it tells no status."""
        assert process.stderr is not None
        assert process.stdin is not None
        async for _ in process.stderr:
            pass
        self._stderr_ended[process.pid].set()
        await process.stdin.aclose()

    async def _copy_output(self, process: trio.Process) -> None:
        assert process.stdout is not None
        if self.status_fault in (StatusFault.FIRST, StatusFault.FALSE_SUCCESS):
            await self._send_status({"status": "Success"})
        if self.status_fault is StatusFault.FALSE_SUCCESS:
            return
        async for data in process.stdout:
            if self.is_mute:
                await trio.sleep_forever()
            for at in range(0, len(data), self.message_bytes):
                await websocket.send(b"\x01" + data[at : at + self.message_bytes])
            self.sent_bytes += len(data)
        await self._stderr_ended[process.pid].wait()
        code = await process.wait()
        self._processes.pop(process.pid, None)
        if self.status_fault is StatusFault.NOISE:
            await websocket.send(b"\x03{half a sta")
        elif self.status_fault is StatusFault.NONE:
            await self._send_status(exit_status(code))

    async def _send_status(self, status: dict[str, Any]) -> None:
        await websocket.send(b"\x03" + msgspec.json.encode({"metadata": {}, **status}))

    async def end_all(self) -> None:
        """End what execs left behind, and reap."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def exit_status(code: int) -> dict[str, Any]:
    """What a kubelet says of an exit; a signal is 128 and its number."""
    if code == 0:
        return {"status": "Success"}
    number = 128 - code if code < 0 else code
    return {
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {number}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(number)}]},
    }
