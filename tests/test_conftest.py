"""The database fixtures: what they promise to tests and leave to nobody."""

import os
import select
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from rdev.adapters.postgres.cluster import read_pid_file

DEADLINE_MS = 60_000  # for what takes milliseconds: only a hung test meets it


def test_databases_of_a_test_are_its_own_and_start_empty(
    database_dsn: str, migrated_dsn: str
) -> None:
    with psycopg.connect(database_dsn) as mine, psycopg.connect(migrated_dsn) as other:
        mine.execute("create table only_mine (a int)")
        mine.commit()
        count = "select count(*) from pg_tables where schemaname = 'public'"
        assert mine.execute(count).fetchone() == (1,)
        gone = "select to_regclass('only_mine')"
        assert other.execute(gone).fetchone() == (None,)


@pytest.mark.slow
def test_a_test_session_that_is_killed_takes_its_server_along(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import quick_place, server_dsn\n")
    (tmp_path / "test_forever.py").write_text(
        "import sys, time\n"
        "def test_forever(server_dsn):\n"
        "    print(server_dsn, file=sys.__stderr__, flush=True)\n"
        "    time.sleep(600)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    session = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "RDEV_TEST_DSN": ""},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with session:
        assert session.stderr is not None
        try:
            dsn = session.stderr.readline().strip()
            folder = Path(str(psycopg.conninfo.conninfo_to_dict(dsn)["host"])).parent
            found = read_pid_file(folder / "postgres")
            assert found is not None
            pidfd = os.pidfd_open(found.pid)
        finally:
            session.kill()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(DEADLINE_MS)
    os.close(pidfd)
