"""The state folder of one server and the lock that keeps a second server out of it.

Bounded by the kernel: the lock is a `flock`, so it is gone with the process that held it, however
that process ended. The file itself stays; removing it would let two servers hold "the" lock.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdev.domain.errors import ErrorCode, RdevError

LOCK_NAME = "lock"


@contextmanager
def hold_state(state_dir: Path) -> Iterator[Path]:
    """Make the state folder (mode 0700), hold its lock, give its absolute path.

    Errors: CONFLICT when another process holds it, with that process's id; SERVICE_UNAVAILABLE
    when the folder cannot be made or written.
    Blocks: on the file system only; it never waits for the lock.
    """
    folder = make_state_dir(state_dir)
    with hold_lock(folder / LOCK_NAME, f"the state folder {folder}"):
        yield folder


def make_state_dir(state_dir: Path) -> Path:
    """Make the folder, private to its owner, unless it is there; its absolute path."""
    folder = state_dir.absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    return folder


@contextmanager
def hold_lock(path: Path, subject: str) -> Iterator[None]:
    """Hold an exclusive lock on the file, which is made where missing; the file names the holder.

    Errors: CONFLICT "<subject> is in use by …". Children do not inherit the lock (close on exec).
    """
    try:
        # One descriptor per holder: flock belongs to it, so two holders in one process collide too.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        _lock(descriptor, subject)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, subject: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        # Empty in the instant between the holder's lock and its write.
        pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        holder = f"process {pid}" if pid else "another process"
        message = f"{subject} is in use by {holder}; stop it or choose another state folder"
        raise RdevError(ErrorCode.CONFLICT, message) from error


def _unusable(path: Path, error: OSError) -> RdevError:
    message = f"cannot use {path} for state: {error.strerror}"
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
