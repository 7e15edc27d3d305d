"""Fixtures shared by all rooms: a PostgreSQL cluster of this test session, databases cloned in it.

`RDEV_TEST_DSN` (the conninfo of a superuser) replaces the cluster, to test on another version.
"""

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from rdev.adapters.postgres import cluster, migrate
from rdev.adapters.postgres.binaries import (
    Binaries,
    Identity,
    choose_identity,
    find_binaries,
    server_env,
)

START_DEADLINE_S = 60.0

# A database is cloned in 10 ms in memory, in 120–300 ms on a disk (some 300 files each).
MEMORY = Path("/dev/shm")
MEMORY_MIN_BYTES = 2 << 30

# Nothing here has to survive a power cut.
THROWAWAY_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_wal_size": "128MB",
}

# The server's parent. Its stdin is a pipe that this session alone holds open: it ends with the
# session however that ends (a kill -9 too), and then the server goes, and its folder.
GUARD = """
"$@" &
cat > /dev/null
kill -QUIT $! 2> /dev/null
wait
rm -rf "$FOLDER"
"""


@pytest.fixture(scope="session")
def quick_place() -> Path:
    """Where to make folders for clusters: in memory if there is room, else with temporary files."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= MEMORY_MIN_BYTES:
        return MEMORY
    return Path(tempfile.gettempdir())


@pytest.fixture(scope="session")
def server_dsn(quick_place: Path) -> Iterator[str]:
    """The conninfo of a superuser on the session's server (database `postgres`)."""
    if given := os.environ.get("RDEV_TEST_DSN"):
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="rdev-test-", dir=quick_place))
    files = cluster.Files(state_dir=folder)
    binaries = find_binaries()
    identity = choose_identity(binaries, folder, files.data)
    identity.own(folder)
    guard = _start_cluster(files, binaries, identity)
    try:
        dsn = cluster.conninfo(folder / "run", "postgres")
        _wait_until_ready(dsn, files.log)
        yield dsn
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


@pytest.fixture(scope="session")
def migrated_template(server_dsn: str) -> Iterator[str]:
    """The name of a database at this build's version, without connections: it can be cloned."""
    with _database(server_dsn, template="template0") as name:
        if migrate.packaged().is_dir():
            migrate.up(make_conninfo(server_dsn, dbname=name))
        yield name


@pytest.fixture
def database_dsn(server_dsn: str) -> Iterator[str]:
    """The conninfo of a fresh, empty database of this test's own."""
    with _database(server_dsn, template="template0") as name:
        yield make_conninfo(server_dsn, dbname=name)


@pytest.fixture
def migrated_dsn(server_dsn: str, migrated_template: str) -> Iterator[str]:
    """The conninfo of a fresh database of this test's own, at this build's version."""
    with _database(server_dsn, template=migrated_template) as name:
        yield make_conninfo(server_dsn, dbname=name)


@contextmanager
def _database(server_dsn: str, *, template: str) -> Iterator[str]:
    """A database while the block runs, under a name that no other session draws."""
    name = f"rdev_test_{uuid.uuid4().hex}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        create = sql.SQL("create database {} template {}")
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    yield name
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        # force: a test that failed may have left connections.
        drop = sql.SQL("drop database {} with (force)")
        connection.execute(drop.format(sql.Identifier(name)))


def _start_cluster(
    files: cluster.Files, binaries: Binaries, identity: Identity
) -> subprocess.Popen[bytes]:
    who = {
        "user": identity.uid,
        "group": identity.gid,
        "extra_groups": identity.groups,
        "cwd": files.state_dir,
    }
    cluster.prepare_initdb(files, identity)
    argv = cluster.initdb_argv(files, binaries, identity)
    subprocess.run(
        [*argv, "--no-sync"], check=True, stdout=subprocess.DEVNULL, env=server_env(), **who
    )
    cluster.finish_initdb(files)
    socket_dir = files.state_dir / "run"
    socket_dir.mkdir(mode=0o700)
    identity.own(socket_dir)
    settings = {**cluster.SETTINGS, **THROWAWAY_SETTINGS}
    serve = cluster.server_argv(files, binaries, identity, socket_dir, settings)
    with files.log.open("wb") as log:
        return subprocess.Popen(
            ["sh", "-c", GUARD, "sh", *serve],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**server_env(), "FOLDER": str(files.state_dir)},
            start_new_session=True,
            **who,
        )


def _wait_until_ready(dsn: str, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while psycopg.pq.PGconn.ping(dsn.encode()) != psycopg.pq.Ping.OK:
        if time.monotonic() > deadline:
            pytest.fail(f"the test server did not start:\n{log.read_text()}")
        time.sleep(0.01)
