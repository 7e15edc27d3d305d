"""A PostgreSQL of a test's own that can be crashed, cut off and filled up.

Owns the cluster's processes and its folder. Commits are as durable as a crash of the server asks
(the machine itself does not crash), so `fsync` is off and `synchronous_commit` on.
"""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL, SIGQUIT

import psycopg
from psycopg.rows import TupleRow

from rdev.adapters.postgres import cluster, migrate
from rdev.adapters.postgres.binaries import choose_identity, find_binaries, server_env

START_S = 60.0
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "on",
    "shared_buffers": "32MB",
    "min_wal_size": "32MB",
    "max_wal_size": "64MB",
    # In its folder, which goes with it: crashes leave what they shared.
    "dynamic_shared_memory_type": "mmap",
}

# The server's parent; it ends with this process, however that ends.
GUARD = """
"$@" &
cat > /dev/null
kill -QUIT $! 2> /dev/null
wait
"""


class Database:
    """One cluster. Everything blocks, for a second at most where not said otherwise."""

    def __init__(self, folder: Path) -> None:
        """Makes the cluster, starts nothing. `folder` is private to it. Blocks: some seconds."""
        self._files = cluster.Files(state_dir=folder)
        self._socket_dir = folder / "run"
        self._binaries = find_binaries()
        self._identity = choose_identity(self._binaries, folder, self._files.data)
        self._identity.own(folder)
        self._guard: subprocess.Popen[bytes] | None = None
        cluster.prepare_initdb(self._files, self._identity)
        argv = cluster.initdb_argv(self._files, self._binaries, self._identity)
        self._run([*argv, "--no-sync", "--wal-segsize=4"])
        cluster.finish_initdb(self._files)
        self._socket_dir.mkdir(mode=0o700)
        self._identity.own(self._socket_dir)

    @property
    def dsn(self) -> str:
        """The conninfo of its superuser."""
        return cluster.conninfo(self._socket_dir, "postgres")

    def dsn_for(self, server: str) -> str:
        """The same for a server, whose sessions the witness recognises by this name."""
        return psycopg.conninfo.make_conninfo(self.dsn, options=f"-c faults.server={server}")

    def connect(self) -> psycopg.Connection[TupleRow]:
        """A session of the test's own."""
        return psycopg.connect(self.dsn, autocommit=True, connect_timeout=10)

    def start(self) -> None:
        """Start it and wait until it serves. Blocks: `START_S` at most."""
        argv = cluster.server_argv(
            self._files,
            self._binaries,
            self._identity,
            self._socket_dir,
            {**cluster.SETTINGS, **SETTINGS},
        )
        with self._files.log.open("ab") as log:
            self._guard = subprocess.Popen(
                ["sh", "-c", GUARD, "sh", *argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._who,
            )
        deadline = time.monotonic() + START_S
        while not self.serves:
            assert time.monotonic() < deadline, self._files.log.read_text()[-4_000:]
            time.sleep(0.01)

    @property
    def serves(self) -> bool:
        """Whether it accepts connections."""
        return psycopg.pq.PGconn.ping(self.dsn.encode()) == psycopg.pq.Ping.OK

    def migrate(self) -> None:
        """Bring it to this build's version."""
        migrate.up(self.dsn)

    def crash(self) -> None:
        """What `pg_ctl stop -m immediate` does: nothing is written, nobody is told."""
        found = cluster.read_pid_file(self._files.data)
        if found is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, SIGQUIT)
        self._end_guard()

    def terminate_sessions(self) -> int:
        """`pg_terminate_backend` on every session of the servers; how many there were."""
        with self.connect() as connection:
            statement = (
                "select count(pg_terminate_backend(pid)) from pg_stat_activity "
                "where application_name like 'rdev%'"
            )
            row = connection.execute(statement).fetchone()
        assert row is not None
        return int(row[0])

    def kill_backend(self, chance: random.Random) -> bool:
        """SIGKILL one session's process: PostgreSQL ends them all and recovers."""
        with self.connect() as connection:
            statement = "select pid from pg_stat_activity where application_name like 'rdev%'"
            pids = [row[0] for row in connection.execute(statement).fetchall()]
        if not pids:
            return False
        os.kill(chance.choice(pids), SIGKILL)
        return True

    def close(self) -> None:
        """End it."""
        self.crash()

    def _end_guard(self) -> None:
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    @property
    def _who(self) -> dict[str, object]:
        return {
            "user": self._identity.uid,
            "group": self._identity.gid,
            "extra_groups": self._identity.groups,
            "cwd": self._files.state_dir,
            "env": server_env(),
        }

    def _run(self, argv: list[str]) -> None:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, **self._who)  # type: ignore[call-overload]


@contextmanager
def open_database(place: Path) -> Iterator[Database]:
    """A migrated, running cluster in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="rdev-faults-", dir=place))
    try:
        database = Database(folder)
        try:
            database.start()
            database.migrate()
            yield database
        finally:
            database.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def small_filesystem(size_bytes: int, place: Path) -> Iterator[Path]:
    """A file system of this size. Errors: PermissionError where this process may not mount."""
    folder = Path(tempfile.mkdtemp(prefix="rdev-small-", dir=place))
    try:
        argv = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "rdev", str(folder)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PermissionError(f"mount: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()
