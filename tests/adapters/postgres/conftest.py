"""A PostgreSQL for these tests: the one of RDEV_TEST_DSN, else a throw-away cluster."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.adapters.postgres.proxy import TcpProxy


def _program(name: str) -> str:
    found = shutil.which(name)
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    assert found or places, f"{name} is not installed"
    return found or str(places[-1])


def _server_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="session")
def admin_dsn() -> Iterator[str]:
    if given := os.environ.get("RDEV_TEST_DSN"):
        yield given
        return
    user = _server_user()
    home = Path(tempfile.mkdtemp(prefix="rdev-pg-", dir="/tmp"))
    if user is not None:
        shutil.chown(home, user)
    try:
        with _cluster(home, user):
            yield f"host={home} user=postgres dbname=postgres"
    finally:
        shutil.rmtree(home)


@contextlib.contextmanager
def _cluster(home: Path, user: str | None) -> Iterator[None]:
    data = home / "data"
    subprocess.run(
        [_program("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8"],
        check=True,
        user=user,
        cwd=home,
        stdout=subprocess.DEVNULL,
    )
    settings = [f"-c{s}" for s in ("fsync=off", "listen_addresses=", "max_connections=120")]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            [_program("postgres"), "-D", data, "-k", home, *settings],
            user=user,
            cwd=home,
            stderr=log,
            process_group=0,
        )
    try:
        _wait_until_ready(home, server)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)


def _wait_until_ready(home: Path, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert server.poll() is None, (home / "log").read_text()
        ready = subprocess.run([_program("pg_isready"), "-h", home, "-q"], check=False)
        if ready.returncode == 0:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=0.05)
    raise AssertionError((home / "log").read_text())


@pytest.fixture
def database_dsn(admin_dsn: str) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex[:16]}"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(f"create database {name} template template0")
        yield psycopg.conninfo.make_conninfo(admin_dsn, dbname=name)
        admin.execute(f"drop database {name} with (force)")


@pytest.fixture
async def proxy(database_dsn: str, nursery) -> TcpProxy:
    """The database behind a TCP port that can refuse, cut and black-hole."""
    proxy = TcpProxy(database_dsn)
    await nursery.start(proxy.run)
    return proxy
