"""`rdev doctor` beside a real server, and where there is none."""

import json
import subprocess
import sys
from pathlib import Path

from tests.app.server import ROOT, Server, bare_environment

CHECKS_MIN = 12


def _doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rdev", "doctor", *arguments],
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
    asked = ("database", "migrations", "clock", "audit", "queue", "supervisor", "server")
    assert {found[name]["level"] for name in asked} == {"ok"}
    assert server.key not in told.stdout + told.stderr


def test_a_database_that_is_gone_fails_and_hides_its_password(tmp_path: Path):
    told = _doctor(
        RDEV_STATE_DIR=str(tmp_path),
        RDEV_DATABASE_DSN=f"postgresql://me:hidden-secret@/rdev?host={tmp_path}",
    )
    assert told.returncode == 1
    assert "fail     database" in told.stdout
    assert "→ see RDEV_DATABASE_DSN" in told.stdout
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
