"""The embedded database with real servers, real kills and real state folders."""

import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg
import pytest
import trio
import trio.testing

from rdev.adapters.postgres import binaries, cluster, embedded
from rdev.adapters.postgres.binaries import NAMESPACE, Binaries, find_binaries, installed
from rdev.adapters.postgres.embedded import open_embedded, running_embedded, turn_log
from rdev.adapters.postgres.state import hold_state
from rdev.domain.errors import ErrorCode, RdevError

DEADLINE_S = 60.0  # for what takes milliseconds: only a hung test meets it

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

ROOT = Path(__file__).parents[3]

# Another rdev: opens the database, says so, waits to be killed.
OTHER = """
import sys, trio
from pathlib import Path
from rdev.adapters.postgres.embedded import open_embedded
from rdev.adapters.postgres.state import hold_state

async def main():
    with hold_state(Path(sys.argv[1])) as folder:
        async with open_embedded(folder) as conninfo:
            print(conninfo, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture(scope="session")
def made_cluster(quick_place: Path) -> Iterator[Path]:
    """A state folder with a cluster that was made, used and stopped: copying it saves an initdb."""

    async def make() -> None:
        async with open_embedded(folder):
            pass

    with short_folder(quick_place) as folder:
        trio.run(make)
        yield folder


@pytest.fixture
def empty_dir(quick_place: Path) -> Iterator[Path]:
    """A state folder for a first start."""
    with short_folder(quick_place) as folder:
        yield folder


@pytest.fixture
def state_dir(made_cluster: Path, empty_dir: Path) -> Path:
    """A state folder with a cluster in it."""
    shutil.copytree(made_cluster, empty_dir, dirs_exist_ok=True)
    return empty_dir


@contextmanager
def short_folder(place: Path) -> Iterator[Path]:
    """A folder whose path leaves room for a socket, and that every user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="rdev-state-", dir=place))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        end_server(folder / "postgres")
        shutil.rmtree(folder)


def end_server(data: Path) -> None:
    """End what a killed rdev, or a failed test, left running."""
    found = cluster.read_pid_file(data)
    if found is not None and cluster.is_postmaster(found, data):
        poll = select.poll()
        poll.register(pidfd := os.pidfd_open(found.pid), select.POLLIN)
        os.kill(found.pid, signal.SIGQUIT)
        assert poll.poll(DEADLINE_S * 1000)
        os.close(pidfd)


@asynccontextmanager
async def other_rdev(state_dir: Path, *wrapper: str) -> AsyncIterator[tuple[trio.Process, str]]:
    """Another rdev on that folder, ready, with its conninfo; killed at the end."""
    process = await trio.lowlevel.open_process(
        [*wrapper, sys.executable, "-c", OTHER, str(state_dir)],
        stdout=subprocess.PIPE,
        env=python_env(),
    )
    assert process.stdout is not None
    try:
        said = b""
        with trio.fail_after(DEADLINE_S):
            while not said.endswith(b"\n"):
                part = await process.stdout.receive_some()
                assert part, "the other rdev ended before it was ready"
                said += part
        yield process, said.decode().strip()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdout.aclose()


def python_env() -> dict[str, str]:
    """Our environment, in which a child finds the modules that we find."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def ask(conninfo: str, query: str) -> object:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
        return None if row is None else row[0]


def keep_seven(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("create table kept as select 7 as n")


async def use_until_killed(state_dir: Path, signum: signal.Signals) -> None:
    """Open the database, keep a row, kill the server and stay in the block."""
    async with open_embedded(state_dir) as conninfo:
        keep_seven(conninfo)
        os.kill(postmaster_pid(state_dir), signum)
        with trio.fail_after(DEADLINE_S):
            await trio.sleep_forever()


def postmaster_pid(state_dir: Path) -> int:
    found = cluster.read_pid_file(state_dir / "postgres")
    assert found is not None
    return found.pid


async def gone(pidfd: int) -> None:
    with trio.fail_after(DEADLINE_S):
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)


@pytest.mark.slow
@pytest.mark.parametrize("programs", list(installed()), ids=lambda found: f"pg{found.version}")
async def test_a_first_start_makes_a_cluster_that_a_second_start_finds(
    empty_dir: Path, programs: Binaries
) -> None:
    async with open_embedded(empty_dir / "state", binaries=programs) as conninfo:
        assert ask(conninfo, "select current_database()") == "rdev"
        assert ask(conninfo, "show server_encoding") == "UTF8"
        assert ask(conninfo, "show data_checksums") == "on"
        assert ask(conninfo, "show fsync") == "on"
        keep_seven(conninfo)
    async with open_embedded(empty_dir / "state", binaries=programs) as conninfo:
        assert ask(conninfo, "select n from kept") == 7
    assert not (empty_dir / "state" / "postgres" / "postmaster.pid").exists()


async def test_the_server_listens_on_a_private_socket_only(state_dir: Path) -> None:
    async with open_embedded(state_dir) as conninfo:
        assert ask(conninfo, "show listen_addresses") == ""
        assert ask(conninfo, "show unix_socket_directories") == f'"{state_dir / "run"}"'
        for folder in ("run", "postgres"):
            assert (state_dir / folder).stat().st_mode & 0o777 == 0o700


async def test_the_server_has_a_session_of_its_own_and_none_of_our_environment(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RDEV_SECRET", "hunter2")
    async with open_embedded(state_dir):
        pid = postmaster_pid(state_dir)
        assert os.getsid(pid) == pid
        assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()


async def test_a_cancelled_block_stops_the_server_in_good_order(state_dir: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_embedded(state_dir):
            pidfd = os.pidfd_open(postmaster_pid(state_dir))
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    await gone(pidfd)
    assert "database system is shut down" in (state_dir / "postgres.log").read_text()


async def test_an_error_of_the_block_leaves_as_itself_and_stops_the_server(
    state_dir: Path,
) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with open_embedded(state_dir):
            raise LookupError("mine")
    assert running_embedded(state_dir) is None


async def test_open_connections_do_not_hold_the_stop(state_dir: Path) -> None:
    async with open_embedded(state_dir) as conninfo:
        connection = psycopg.connect(conninfo)
        connection.execute("select 1")
    with pytest.raises(psycopg.OperationalError):
        connection.execute("select 1")
    connection.close()


async def test_a_server_that_does_not_stop_in_time_is_stopped_at_once(state_dir: Path) -> None:
    # No patience for the fast shutdown: the immediate one must end it, and the next start recover.
    async with open_embedded(state_dir, stop_timeout_s=0.0) as conninfo:
        keep_seven(conninfo)
    assert running_embedded(state_dir) is None
    async with open_embedded(state_dir) as conninfo:
        assert ask(conninfo, "select n from kept") == 7


async def test_the_death_of_the_server_ends_the_block_with_the_reason(state_dir: Path) -> None:
    with pytest.raises(RdevError, match="PostgreSQL ended by itself") as caught:
        await use_until_killed(state_dir, signal.SIGQUIT)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert "shutdown" in caught.value.message


async def test_a_killed_server_is_followed_by_a_new_one_that_recovers(state_dir: Path) -> None:
    with pytest.raises(RdevError, match="ended by itself"):
        await use_until_killed(state_dir, signal.SIGKILL)
    async with open_embedded(state_dir) as conninfo:
        assert ask(conninfo, "select n from kept") == 7


async def test_a_backend_that_outlived_its_server_is_waited_for(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one does in a long query. Until it ends, PostgreSQL refuses to start on the same data.
    orphans: list[int] = []
    with pytest.raises(RdevError, match="ended by itself"):
        await leave_an_orphan(state_dir, orphans)
    looks = 0

    def look(found: cluster.PidFile) -> int:
        nonlocal looks
        looks += 1
        if looks == 3:
            os.kill(orphans[0], signal.SIGCONT)
        return cluster.attached(found)

    monkeypatch.setattr(embedded, "attached", look)
    async with open_embedded(state_dir) as conninfo:
        assert ask(conninfo, "select 1") == 1
    assert looks >= 3


async def leave_an_orphan(state_dir: Path, orphans: list[int]) -> None:
    async with open_embedded(state_dir) as conninfo:
        with psycopg.connect(conninfo) as connection:
            orphans.append(connection.info.backend_pid)
            os.kill(orphans[0], signal.SIGSTOP)
            os.kill(postmaster_pid(state_dir), signal.SIGKILL)
            await trio.sleep_forever()


async def test_a_server_that_outlived_a_killed_rdev_is_adopted_and_stopped(
    state_dir: Path,
) -> None:
    async with other_rdev(state_dir) as (process, conninfo):
        keep_seven(conninfo)
        pid = postmaster_pid(state_dir)
        process.kill()
        with trio.fail_after(DEADLINE_S):
            await process.wait()
    pidfd = os.pidfd_open(pid)
    # The kill released the lock although the server, a child, lives on.
    with hold_state(state_dir) as folder:
        async with open_embedded(folder) as adopted:
            assert adopted == conninfo
            assert postmaster_pid(state_dir) == pid
            assert ask(adopted, "select n from kept") == 7
    await gone(pidfd)
    assert not (state_dir / "postgres" / "postmaster.pid").exists()


async def test_the_death_of_an_adopted_server_ends_the_block_too(state_dir: Path) -> None:
    async with other_rdev(state_dir) as (process, _):
        process.kill()
        with trio.fail_after(DEADLINE_S):
            await process.wait()
    with pytest.raises(RdevError, match="ended by itself"):
        await use_until_killed(state_dir, signal.SIGQUIT)


async def test_a_server_that_is_just_stopping_is_waited_for_and_not_adopted(
    state_dir: Path,
) -> None:
    async with other_rdev(state_dir) as (process, conninfo):
        pid = postmaster_pid(state_dir)
        pidfd = os.pidfd_open(pid)
        process.kill()
        with trio.fail_after(DEADLINE_S):
            await process.wait()
    # A smart shutdown lasts as long as its last client.
    client = psycopg.connect(conninfo)
    os.kill(pid, signal.SIGTERM)
    pid_file = state_dir / "postgres" / "postmaster.pid"
    with trio.fail_after(DEADLINE_S):
        while "stopping" not in pid_file.read_text():
            await trio.sleep(0.01)

    async def hang_up() -> None:
        await trio.testing.wait_all_tasks_blocked()
        client.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        async with open_embedded(state_dir) as conninfo:
            assert postmaster_pid(state_dir) != pid
            assert ask(conninfo, "select 1") == 1
    await gone(pidfd)


async def test_a_stale_pid_file_that_names_a_living_process_is_no_obstacle(
    state_dir: Path,
) -> None:
    # As after a restart of a container, where numbers come again. Our own number would not do:
    # PostgreSQL exempts its parents.
    sleeper = await trio.lowlevel.open_process(["sleep", "600"])
    stale = f"{sleeper.pid}\n{state_dir}/postgres\n1\n5432\n{state_dir}/run\n\n 1 2\nready   \n"
    (state_dir / "postgres" / "postmaster.pid").write_text(stale)
    assert running_embedded(state_dir) is None
    async with open_embedded(state_dir) as conninfo:
        assert ask(conninfo, "select 1") == 1
    assert sleeper.poll() is None
    sleeper.kill()
    await sleeper.wait()


async def test_what_a_killed_initdb_left_is_thrown_away(empty_dir: Path) -> None:
    (empty_dir / "postgres.unfinished").mkdir()
    (empty_dir / "postgres.unfinished" / "PG_VERSION").write_text("15\n")
    async with open_embedded(empty_dir) as conninfo:
        assert ask(conninfo, "select 1") == 1
    assert not (empty_dir / "postgres.unfinished").exists()


async def test_a_second_process_is_refused_with_the_number_of_the_first(state_dir: Path) -> None:
    async with other_rdev(state_dir) as (process, conninfo):
        refused = pytest.raises(RdevError, match=f"in use by process {process.pid}")
        with refused as caught, hold_state(state_dir):
            pytest.fail("two servers have the state folder")
        assert caught.value.code is ErrorCode.CONFLICT
        # The database has a lock of its own: without it, the second would adopt and stop it.
        with pytest.raises(RdevError, match=f"in use by process {process.pid}"):
            async with open_embedded(state_dir):
                pytest.fail("two servers have the database")
        assert running_embedded(state_dir) == conninfo
        assert ask(conninfo, "select 1") == 1
        process.kill()
        with trio.fail_after(DEADLINE_S):
            await process.wait()
    async with open_embedded(state_dir):
        pass


@pytest.mark.parametrize("name", ["d" * 100, "a, comma"], ids=["deep", "comma"])
async def test_a_state_folder_unfit_for_a_socket_works_and_leaves_nothing(
    made_cluster: Path, empty_dir: Path, name: str
) -> None:
    deep = empty_dir / name
    shutil.copytree(made_cluster, deep)
    async with open_embedded(deep) as conninfo:
        assert ask(conninfo, "select 1") == 1
        assert running_embedded(deep) == conninfo
        found = cluster.read_pid_file(deep / "postgres")
        assert found is not None
        assert found.socket_dir is not None
        assert found.socket_dir.stat().st_mode & 0o777 == 0o700
    assert not found.socket_dir.exists()


async def test_data_of_another_major_version_is_refused_with_a_way_out(state_dir: Path) -> None:
    (state_dir / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(RdevError, match="made by PostgreSQL 9, but this machine has 1") as caught:
        async with open_embedded(state_dir):
            pass
    assert "pg_upgrade" in caught.value.message


async def test_a_server_that_cannot_start_says_why(state_dir: Path) -> None:
    with pytest.raises(RdevError, match="unrecognized configuration parameter"):
        async with open_embedded(state_dir, settings={"no_such_setting": "1"}):
            pass
    assert running_embedded(state_dir) is None


async def test_a_start_without_time_is_given_up_and_leaves_no_server(state_dir: Path) -> None:
    with pytest.raises(RdevError, match="not ready in time"):
        async with open_embedded(state_dir, start_timeout_s=0.0):
            pass
    assert running_embedded(state_dir) is None


def test_a_log_over_the_limit_becomes_the_old_log(tmp_path: Path) -> None:
    log = tmp_path / "postgres.log"
    with log.open("ab", buffering=0) as server:
        server.write(b"x" * 100)
        turn_log(log, 100)
        assert log.stat().st_size == 100
        turn_log(log, 99)
        server.write(b"new")
    assert log.read_bytes() == b"new"
    assert (tmp_path / "postgres.log.1").stat().st_size == 100


def test_without_any_binaries_the_message_says_how_to_get_them() -> None:
    with pytest.raises(RdevError, match="no PostgreSQL 15 or newer on this machine"):
        find_binaries(None, [])


async def test_a_normal_user_runs_the_database_plainly(state_dir: Path) -> None:
    # In a user namespace this user is not root for all that the other rdev can see.
    wrapper = NAMESPACE if os.geteuid() == 0 else ()
    if wrapper and subprocess.run([*wrapper, "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces")
    async with other_rdev(state_dir, *wrapper) as (_, conninfo):
        pid = postmaster_pid(state_dir)
        assert ask(conninfo, "select 1") == 1
        assert Path(f"/proc/{pid}/status").read_text().count("CapEff:\t0000000000000000") == 1


@needs_root
async def test_root_runs_data_of_another_user_as_that_user(state_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    for path in (state_dir, *state_dir.rglob("*")):
        os.chown(path, nobody, -1)
    async with open_embedded(state_dir) as conninfo:
        assert Path(f"/proc/{postmaster_pid(state_dir)}").stat().st_uid == nobody
        assert ask(conninfo, "select 1") == 1


@needs_root
async def test_root_without_a_namespace_hands_the_data_to_an_unprivileged_user(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "NAMESPACE", ("false",))
    async with open_embedded(state_dir) as conninfo:
        assert Path(f"/proc/{postmaster_pid(state_dir)}").stat().st_uid != 0
        assert ask(conninfo, "select 1") == 1
        assert state_dir.stat().st_uid == 0


@needs_root
async def test_root_with_no_way_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "NAMESPACE", ("false",))
    tmp_path.chmod(0o700)
    state = tmp_path / "state"
    with pytest.raises(RdevError, match="refuses to run as root") as caught:
        async with open_embedded(state):
            pass
    assert "\n" not in caught.value.message
    assert state.stat().st_mode & 0o777 == 0o700
