"""The release before serves on this checkout's schema: beside it while versions change, and after
a rollback, which leaves the database as it is.

Of code that was, as git has it: the newest tag `v*` before this commit or, where there is none,
what was there before the newest migration. Skipped where git has no history.
"""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.app.server import ROOT, Server, open_api, open_server, open_state, output_of
from tests.app.test_replicas import who_runs

GIT_DEADLINE_S = 60

pytestmark = pytest.mark.slow


def git(*argv: str) -> bytes:
    """Errors: skips where git cannot say."""
    ended = subprocess.run(
        ["git", "-C", str(ROOT), *argv], capture_output=True, check=False, timeout=GIT_DEADLINE_S
    )
    if ended.returncode != 0:
        pytest.skip(f"git {argv[0]}: {ended.stderr.decode().strip()}")
    return ended.stdout


def former() -> str:
    """The commit of the code that the newest migration must leave serving."""
    tags = git("tag", "--merged", "HEAD", "--no-contains", "HEAD", "--sort=-v:refname", "v[0-9]*")
    if tags:
        return tags.split()[0].decode()
    newest = max((ROOT / "sql").glob("*.sql"))
    added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(newest)).decode().strip()
    # One that is not committed yet: the code before it is what is.
    return git("rev-parse", f"{added}^" if added else "HEAD").decode().strip()


@dataclass(slots=True, kw_only=True)
class _FormerServer(Server):
    """A server of the code in a folder, on this environment's packages."""

    code: Path

    def spawn(self) -> None:
        (self.state_dir / "address").unlink(missing_ok=True)
        with (self.state_dir / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rdev", "serve"],
                # First of all places that are imported from.
                cwd=self.code,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The former release, laid out as a checkout."""
    folder = tmp_path_factory.mktemp("former")
    archive = git("archive", "--format=tar", former(), "rdev", "sql")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="fully_trusted")
    return folder


@pytest.fixture
def pair(
    quick_place: Path, migrated_dsn: str, tmp_path: Path, code: Path
) -> Iterator[tuple[Server, Server]]:
    """The former release and this one, on one database of this one's schema."""
    settings = {
        "RDEV_DATABASE_DSN": migrated_dsn,
        "RDEV_PROJECTS_DIR": str(tmp_path / "projects"),
        "RDEV_LEASE_S": "2",
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_DRAIN_DELAY_S": "0",
    }
    with ExitStack() as stack:
        state = stack.enter_context(open_state(quick_place, **settings))
        old = _FormerServer(
            state_dir=state.state_dir, settings=state.settings, key=state.key, code=code
        )
        new = stack.enter_context(open_server(quick_place, **settings))
        try:
            old.start()
            yield old, new
        finally:
            state.process = old.process


def test_it_is_other_code_and_knows_fewer_migrations(code: Path) -> None:
    here = {path.name for path in (ROOT / "sql").glob("*.sql")}
    assert {path.name for path in (code / "sql").glob("*.sql")} <= here
    printed = subprocess.run(
        [sys.executable, "-c", "import rdev; print(rdev.__file__)"],
        cwd=code,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == str(code / "rdev" / "__init__.py")


async def test_both_serve_side_by_side_and_each_shows_what_the_other_did(
    pair: tuple[Server, Server],
) -> None:
    for here, there in (pair, pair[::-1]):
        async with open_api(here) as api, open_api(there) as other:
            project = await api.project(f"of-{here.pid}")
            done = await api.run("echo out; echo err >&2; exit 3", project=project)
            assert (done["status"], done["exit_code"]) == ("failed", 3)
            name = str(done["id"])
            assert output_of(await other.events(name)) == b"out\n"
            assert await other.output(name, "stderr") == b"err\n"

            running = await api.submit("sleep 1000", project=project)
            await api.running(running)
            assert (await other.http.delete(f"/commands/{running}")).status_code in (200, 202)
            assert (await api.ended(running))["status"] == "cancelled"

            made = await api.post("/keys", {"name": "both", "scopes": ["projects:read"]})
            assert made.status_code == 201, made.text
            headers = {"Authorization": f"Bearer {made.json()['data']['key']}"}
            assert (await other.http.get("/projects", headers=headers)).status_code == 200
            hook = {"url": "http://127.0.0.1:9/", "events": ["ping"], "enabled": False}
            assert (await api.post("/webhooks", hook)).status_code == 201
            for path in (
                "/projects",
                f"/projects/{project}/commands",
                "/webhooks",
                "/audit",
                "/ready",
            ):
                assert (await other.get(path)).status_code == 200, path


@pytest.mark.parametrize("falls", ["old", "new"])
async def test_what_one_of_them_leaves_running_the_other_takes_over(
    pair: tuple[Server, Server], tmp_path: Path, falls: str
) -> None:
    """The upgrade, and the rollback."""
    old, new = pair
    leaves, stays = (old, new) if falls == "old" else (new, old)
    script = f"n=0; while [ ! -e {tmp_path}/gate ]; do n=$((n+1)); echo $n; sleep 0.02; done"
    async with open_api(stays) as api, open_api(leaves) as leaving:
        await api.project()
        while True:
            command = await leaving.submit(script)
            await api.running(command)
            if (await who_runs(command, *pair))[0] is leaves:
                break
            await api.http.delete(f"/commands/{command}")
            await api.ended(command)
        leaves.kill()
        (tmp_path / "gate").touch()
        assert (await api.ended(command))["status"] == "succeeded"
        lines = (await api.output(command)).splitlines()
        assert lines == [b"%d" % n for n in range(1, len(lines) + 1)]
    await trio.to_thread.run_sync(leaves.start)
    async with open_api(leaves) as api:
        assert (await api.run("echo back"))["status"] == "succeeded"
