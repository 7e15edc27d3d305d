"""`rdev doctor` beside a real server, and where there is none."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from rdev.config import Settings
from rdev.domain.findings import Level
from rdev.host_checks import HostChecks, utc_now
from tests.app.server import DEADLINE_S, POLL_S, ROOT, Api, Server, bare_environment, open_server

CHECKS_MIN = 12


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """A ready server that tries loopback's endpoints again and again."""
    settings = {
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_WEBHOOK_SCHEDULE": ",".join(["0.2"] * 16),
    }
    with open_server(quick_place, **settings) as server:
        yield server


def _doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _rdev("doctor", *arguments, **environment)


def _rdev(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rdev", *arguments],
        cwd=ROOT,
        env=bare_environment() | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_beside_a_server_that_is_well_nothing_fails(server: Server):
    told = _doctor("--json", **server.environment)
    found = {line["check"]: line for line in map(json.loads, told.stdout.splitlines())}
    assert told.returncode == 0, told.stdout + told.stderr
    assert len(found) >= CHECKS_MIN
    assert {name for name, line in found.items() if line["level"] == "fail"} == set()
    asked = (
        "database",
        "migrations",
        "clock",
        "audit",
        "queue",
        "supervisor",
        "server",
        "breakers",
    )
    assert {found[name]["level"] for name in (*asked, "breakers")} == {"ok"}
    assert server.key not in told.stdout + told.stderr


async def test_an_endpoint_that_is_left_alone_is_told(server: Server, api: Api):
    made = await api.post(
        "/webhooks", {"url": "http://127.0.0.1:1/gone", "events": ["command.queued"]}
    )
    assert made.status_code == 201, made.text
    await api.submit("true")
    about = HostChecks(Settings(state_dir=server.state_dir), {}, now=utc_now)
    with trio.fail_after(DEADLINE_S):
        while (finding := await about.breakers()).level is not Level.WARN:
            await trio.sleep(POLL_S)
    assert "webhook open: 1" in finding.seen
    assert "rdev webhooks deliveries" in finding.advice
    gone = await api.http.delete(f"/webhooks/{made.json()['data']['id']}")
    assert gone.status_code in (200, 204), gone.text


def test_a_database_that_is_gone_fails_and_hides_its_password(tmp_path: Path):
    told = _doctor(
        RDEV_STATE_DIR=str(tmp_path),
        RDEV_DATABASE_DSN=f"postgresql://me:hidden-secret@/rdev?host={tmp_path}",
    )
    assert told.returncode == 1
    assert "fail     database" in told.stdout
    assert "→ see RDEV_DATABASE_DSN" in told.stdout
    assert "hidden-secret" not in told.stdout + told.stderr


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://me:%ZZhidden-secret@/rdev", "hidden-secret", "host=x nonsense=hidden-secret"],
)
@pytest.mark.parametrize("command", [("doctor",), ("migrate", "status"), ("audit", "verify")])
def test_a_dsn_that_is_none_is_told_and_not_repeated(
    tmp_path: Path, dsn: str, command: tuple[str, ...]
):
    told = _rdev(*command, RDEV_STATE_DIR=str(tmp_path), RDEV_DATABASE_DSN=dsn)
    assert told.returncode == 1, told.stderr
    assert "RDEV_DATABASE_DSN: is no PostgreSQL URL" in told.stdout + told.stderr
    assert "hidden-secret" not in told.stdout + told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize("text", ["hello", "users: [", "- a\n- b", "clusters: 5"])
def test_a_kubeconfig_that_is_none_is_told_and_not_repeated(tmp_path: Path, text: str):
    (tmp_path / "config").write_text(f"{text} # hidden-secret")
    told = _doctor(
        RDEV_STATE_DIR=str(tmp_path),
        RDEV_EXECUTOR="kubernetes",
        RDEV_KUBECONFIG=str(tmp_path / "config"),
    )
    assert told.returncode == 1
    assert "fail     kubernetes" in told.stdout
    assert "the check itself" not in told.stdout
    assert "hidden-secret" not in told.stdout + told.stderr


def test_settings_that_cannot_be_read_end_it_with_status_2(tmp_path: Path):
    told = _doctor(RDEV_STATE_DIR=str(tmp_path), RDEV_BIND="nonsense")
    assert told.returncode == 2
    assert "HOST:PORT" in told.stderr


def test_a_cluster_that_is_nowhere_described_fails(tmp_path: Path):
    told = _doctor(
        RDEV_STATE_DIR=str(tmp_path),
        RDEV_EXECUTOR="kubernetes",
        RDEV_KUBECONFIG=str(tmp_path / "absent"),
    )
    assert told.returncode == 1
    assert "fail     kubernetes" in told.stdout


@pytest.mark.parametrize("field", ["proxy-url", "tls-server-name"])
def test_a_kubeconfig_whose_way_is_not_known_is_told(tmp_path: Path, field: str):
    (tmp_path / "config").write_text(f"""
clusters: [{{name: c, cluster: {{server: "https://127.0.0.1:1", {field}: there}}}}]
users: [{{name: u, user: {{token: hidden-secret}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
""")
    told = _doctor(
        RDEV_STATE_DIR=str(tmp_path),
        RDEV_EXECUTOR="kubernetes",
        RDEV_KUBECONFIG=str(tmp_path / "config"),
    )
    assert told.returncode == 1
    assert f"{field} is not supported" in told.stdout
    assert "hidden-secret" not in told.stdout + told.stderr
