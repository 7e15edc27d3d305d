"""The embedded database: a PostgreSQL server that starts and stops with rdev.

Owns the server process. It has a session of its own: Ctrl-C at the terminal stops rdev first, and
rdev stops the database. A server that outlived a killed rdev is adopted. Unexpected death of the
server ends the block that uses it. Bounded by `start_timeout_s`, `stop_timeout_s` and
`LOG_MAX_BYTES`. Linux only (pidfd, /proc).
"""

import os
import select
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import trio
from psycopg import sql

from rdev.adapters.postgres.binaries import (
    Binaries,
    Identity,
    choose_identity,
    find_binaries,
    server_env,
)
from rdev.adapters.postgres.cluster import (
    DATABASE,
    SETTINGS,
    Files,
    attached,
    conninfo,
    data_major,
    finish_initdb,
    initdb_argv,
    is_postmaster,
    make_socket_dir,
    prepare_initdb,
    read_pid_file,
    remove_temporary,
    server_argv,
)
from rdev.adapters.postgres.state import hold_lock, make_state_dir
from rdev.domain.errors import ErrorCode, RdevError

LOG_MAX_BYTES = 16 << 20  # then it becomes postgres.log.1: at most twice this on disk
LOG_CHECK_S = 60.0
LOG_TAIL_LINES = 5  # of the server's log in an error message
LOG_TAIL_BYTES = 4096

# When the fast shutdown took too long: immediate (recovery at the next start), then by force.
IMMEDIATE_STOP_S = 5.0

# A first ping finds a warm server in its ~30 ms of starting; the last pauses are for recovery.
FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Postmaster:
    """A running server: our child, or adopted (`child` None)."""

    pidfd: int
    socket_dir: Path
    child: trio.Process | None
    log: Path
    log_start: int  # the size in bytes of what others wrote before

    @property
    def ended(self) -> bool:
        """Whether the process is gone, or only waits to be reaped."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def wait(self) -> None:
        """Return when the process has ended; one caller at a time. Cancellation: harmless."""
        await trio.lowlevel.wait_readable(self.pidfd)


@asynccontextmanager
async def open_embedded(
    state_dir: Path,
    *,
    binaries: Binaries | None = None,
    settings: Mapping[str, str] | None = None,
    start_timeout_s: float = 60.0,
    stop_timeout_s: float = 30.0,
) -> AsyncIterator[str]:
    """Run the database of this state folder while the block runs; gives its conninfo.

    `binaries` None: what is installed and fits the data. `settings` go over `cluster.SETTINGS`.
    Errors: CONFLICT when another process runs this database; SERVICE_UNAVAILABLE, with the end of
    the server's log, when it cannot start, or when it ends by itself (the block is cancelled then).
    Cancellation: the server is stopped: fast shutdown for `stop_timeout_s`, immediate after that.
    Blocks: up to `start_timeout_s`; the first start makes the cluster (about a second).
    """
    files = Files(state_dir=make_state_dir(state_dir))
    every = {**SETTINGS, **(settings or {})}
    deadline = trio.current_time() + start_timeout_s
    with hold_lock(files.state_dir / "postgres.lock", f"the database in {files.state_dir}"):
        with _in_time(deadline, files):
            postmaster = await _adopt(files) or await _spawn(files, binaries, every)
        try:
            with _in_time(deadline, files):
                await _until_ready(postmaster)
            async with _supervised(postmaster):
                yield conninfo(postmaster.socket_dir)
        finally:
            # shielded: a server left behind by a cancelled rdev serves nobody; bounded in `_stop`.
            with trio.CancelScope(shield=True):
                await _stop(postmaster, stop_timeout_s)


def running_embedded(state_dir: Path) -> str | None:
    """The conninfo of the server that runs on this state folder, whoever started it, or None."""
    data = Files(state_dir=state_dir.absolute()).data
    found = read_pid_file(data)
    if found is None or found.socket_dir is None or not is_postmaster(found, data):
        return None
    return conninfo(found.socket_dir)


async def _adopt(files: Files) -> Postmaster | None:
    """The server that outlived its rdev. While it is starting or stopping, it is waited for."""
    while (found := read_pid_file(files.data)) is not None and is_postmaster(found, files.data):
        if found.socket_dir is not None and not found.stopping:
            return _open_adopted(found.pid, found.socket_dir, files)
        await trio.sleep(FIRST_PAUSE_S)
    return None


def _open_adopted(pid: int, socket_dir: Path, files: Files) -> Postmaster | None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    log_start = _size_bytes(files.log)
    return Postmaster(
        pidfd=pidfd, socket_dir=socket_dir, child=None, log=files.log, log_start=log_start
    )


async def _spawn(
    files: Files, binaries: Binaries | None, settings: Mapping[str, str]
) -> Postmaster:
    """Start a server on the data folder, which is made first where there is none."""
    programs, identity = await trio.to_thread.run_sync(_choose, files, binaries)
    if data_major(files.data) is None:
        await _initdb(files, programs, identity)
    previous = await _clear_pid_file(files)
    identity.own(files.data)
    socket_dir = make_socket_dir(files, identity, previous)
    log_start = _size_bytes(files.log)
    log = os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = await trio.lowlevel.open_process(
            server_argv(files, programs, identity, socket_dir, settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=files.state_dir,
            env=server_env(),
            start_new_session=True,
            user=identity.uid,
            group=identity.gid,
            extra_groups=identity.groups,
        )
    except OSError as error:
        raise _unavailable(f"cannot start PostgreSQL: {error.strerror}") from error
    finally:
        os.close(log)
    return Postmaster(
        pidfd=os.pidfd_open(child.pid),
        socket_dir=socket_dir,
        child=child,
        log=files.log,
        log_start=log_start,
    )


def _choose(files: Files, binaries: Binaries | None) -> tuple[Binaries, Identity]:
    among = None if binaries is None else [binaries]
    programs = find_binaries(data_major(files.data), among)
    return programs, choose_identity(programs, files.state_dir, files.data)


async def _initdb(files: Files, binaries: Binaries, identity: Identity) -> None:
    prepare_initdb(files, identity)
    done = await trio.run_process(
        initdb_argv(files, binaries, identity),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=files.state_dir,  # ours may be out of the other user's reach
        env=server_env(),
        start_new_session=True,
        user=identity.uid,
        group=identity.gid,
        extra_groups=identity.groups,
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").splitlines()
        raise _unavailable(f"cannot make the database: {_joined(lines)}")
    finish_initdb(files)


async def _clear_pid_file(files: Files) -> Path | None:
    """Remove what a killed server left; gives the socket folder that it used.

    PostgreSQL refuses to start while *any* process of ours has the number in a stale file, as after
    a restart of the container. Whoever is in it is known not to be a server here, and the lock is
    ours. Its orphans (backends in a long query) are waited for: the next server would refuse them.
    """
    stale = read_pid_file(files.data)
    pause_s = FIRST_PAUSE_S
    while stale is not None and attached(stale):
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    (files.data / "postmaster.pid").unlink(missing_ok=True)
    return None if stale is None else stale.socket_dir


async def _until_ready(postmaster: Postmaster) -> None:
    """Return when the server takes connections and the database exists."""
    pause_s = FIRST_PAUSE_S
    target = conninfo(postmaster.socket_dir, "postgres").encode()
    while not postmaster.ended:
        answer = await trio.to_thread.run_sync(psycopg.pq.PGconn.ping, target)
        if answer == psycopg.pq.Ping.OK:
            await trio.to_thread.run_sync(_ensure_database, postmaster.socket_dir)
            return
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    raise _ended(postmaster)


def _ensure_database(socket_dir: Path) -> None:
    try:
        with psycopg.connect(conninfo(socket_dir, "postgres"), autocommit=True) as connection:
            found = connection.execute("select 1 from pg_database where datname = %s", [DATABASE])
            if found.fetchone() is None:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
    except psycopg.Error as error:
        raise _unavailable(f"cannot make the database: {error}") from error


@asynccontextmanager
async def _supervised(postmaster: Postmaster) -> AsyncIterator[None]:
    """Cancel the block and raise when the server ends before the block does.

    An error of the block leaves as itself, not in a group; when the server died, it is the cause
    of whatever the block raised, and the block's error is kept as `__cause__`.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, postmaster, nursery.cancel_scope)
            nursery.start_soon(_bound_log, postmaster.log)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = group.exceptions[0] if len(group.exceptions) == 1 else group
    if postmaster.ended:
        raise _ended(postmaster) from failure
    if failure is not None:
        raise failure


async def _watch(postmaster: Postmaster, block: trio.CancelScope) -> None:
    await postmaster.wait()
    block.cancel()


async def _bound_log(log: Path) -> None:
    while True:
        await trio.to_thread.run_sync(turn_log, log, LOG_MAX_BYTES)
        await trio.sleep(LOG_CHECK_S)


def turn_log(log: Path, max_bytes: int) -> None:
    """Move a log over the limit to `.1`. The server keeps writing to the same, now empty, file."""
    if _size_bytes(log) > max_bytes:
        shutil.copyfile(log, log.with_name(log.name + ".1"))
        os.truncate(log, 0)


async def _stop(postmaster: Postmaster, stop_timeout_s: float) -> None:
    """End the server, the gentlest way that works in time, and release what it held."""
    for signum, patience_s in (
        (signal.SIGINT, stop_timeout_s),  # fast: clients are cut, everything is written
        (signal.SIGQUIT, IMMEDIATE_STOP_S),
        (signal.SIGKILL, IMMEDIATE_STOP_S),
    ):
        if postmaster.ended:
            break
        signal.pidfd_send_signal(postmaster.pidfd, signum)
        with trio.move_on_after(patience_s):
            await postmaster.wait()
    if postmaster.child is not None and postmaster.ended:
        await postmaster.child.wait()
    os.close(postmaster.pidfd)
    remove_temporary(postmaster.socket_dir)


@contextmanager
def _in_time(deadline: float, files: Files) -> Iterator[None]:
    with trio.CancelScope(deadline=deadline) as scope:
        yield
    if scope.cancelled_caught:
        message = f"PostgreSQL was not ready in time; its log is {files.log}"
        raise _unavailable(message)


def _ended(postmaster: Postmaster) -> RdevError:
    with postmaster.log.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        # Smaller than at the start: turned meanwhile.
        start = postmaster.log_start if postmaster.log_start <= size else 0
        log.seek(max(start, size - LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return _unavailable(f"PostgreSQL ended by itself: {_joined(lines)}")


def _joined(lines: list[str]) -> str:
    return " | ".join(lines[-LOG_TAIL_LINES:]) or "it said nothing"


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unavailable(message: str) -> RdevError:
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
