"""Where checkpoints go: a file that is only ever appended to, or a URL that takes each by POST."""

import errno
import os
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import trio

from rdev.adapters.checkpoints.lines import Signer
from rdev.domain.audit_chain import Place
from rdev.domain.errors import ErrorCode, RdevError

POST_S = 10.0


class FileSink:
    """The `CheckpointSink` port on a file. Each line is one append, on disk before it counts."""

    def __init__(self, path: Path, *, signer: Signer) -> None:
        """Opens nothing; the file is made with the first line (mode 0600)."""
        self._path = path
        self._signer = signer

    async def keep(self, place: Place, *, at: datetime) -> None:
        """See `CheckpointSink.keep`. Blocks: a thread, for an fsync."""
        line = self._signer.line(place, _stamp(at))
        try:
            await trio.to_thread.run_sync(_append, self._path, line)
        except OSError as error:
            message = f"RDEV_AUDIT_CHECKPOINT: {self._path}: {error.strerror}"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message) from error


class UrlSink:
    """The `CheckpointSink` port on a URL that answers 2xx for what it has kept."""

    def __init__(self, url: str, *, signer: Signer) -> None:
        """Opens nothing; each line has a connection of its own."""
        self._url = url
        self._signer = signer

    async def keep(self, place: Place, *, at: datetime) -> None:
        """See `CheckpointSink.keep`. Blocks: `POST_S` at most."""
        line = self._signer.line(place, _stamp(at))
        headers = {"Content-Type": "application/x-ndjson"}
        try:
            async with httpx2.AsyncClient(timeout=POST_S, trust_env=False) as client:
                answer = await client.post(self._url, content=line, headers=headers)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            message = f"RDEV_AUDIT_CHECKPOINT: cannot be reached ({type(error).__name__})"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message) from error
        if not answer.is_success:
            message = f"RDEV_AUDIT_CHECKPOINT: answered {answer.status_code}"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)


def _append(path: Path, line: bytes) -> None:
    """Append and sync. A torn line of a crash is ended first: it must not spoil this one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        whole = b"\n" + line if torn else line
        if os.write(descriptor, whole) != len(whole):
            # What was left of the disk; the next append ends the torn line.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
