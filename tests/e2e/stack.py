"""deploy/compose.yaml on a Docker engine: brought up, driven, looked into, taken down.

Owns the project `rdev-e2e` with its volumes and no other. Bounded by DEADLINE_S for each command
line.
"""

import json
import os
import secrets
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.app.server import Json, Server, probe

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:18080"
# Bringing up waits for PostgreSQL, the migration and readiness; a stop may take its grace (45 s).
DEADLINE_S = 110.0

# Why a machine may have no engine (run.sh). Any other reason is a failure.
REASONS = frozenset(
    {
        "not root",
        "not Debian 12",
        "not enough disk",
        "no Debian package can be fetched",
        "no namespaces can be made",
        "no control groups can be made",
        "no bridges can be made",
    }
)


def given() -> str:
    """The engine's command; skips where there can be none, and fails where there should be one."""
    reason = os.environ.get("RDEV_TEST_NO_ENGINE", "`make test-compose` runs these")
    engine = os.environ.get("RDEV_TEST_ENGINE")
    if engine is None:
        pytest.skip(reason)
    return engine


def docker(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the engine's client to its end."""
    return _run([given(), *argv], dict(os.environ), check=check)


def _run(
    argv: list[str], environment: dict[str, str], *, check: bool
) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        argv,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert not check or ended.returncode == 0, f"{argv}\n{ended.stdout}{ended.stderr}"
    return ended


@dataclass(slots=True, kw_only=True)
class Stack:
    """The compose project. Its passwords are this run's own."""

    key: str = field(default_factory=lambda: "test-" + secrets.token_hex(24))
    password: str = field(default_factory=lambda: secrets.token_hex(24))

    @property
    def server(self) -> Server:
        """What the clients of tests/app ask for: an address and a key."""
        return Server(state_dir=Path("/nonexistent"), settings={}, key=self.key, url=URL)

    def compose(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` on the shipped file with the suite's on top."""
        files = ["--file", "deploy/compose.yaml", "--file", "tests/e2e/stack.yaml"]
        environment = os.environ | {
            "RDEV_ADMIN_KEY": self.key,
            "POSTGRES_PASSWORD": self.password,
        }
        line = [given(), "compose", "--ansi=never", "--project-name=rdev-e2e", *files, *argv]
        return _run(line, environment, check=check)

    def up(self) -> None:
        """Bring up what is not, as the head of compose.yaml says, but of an image that is built
        already. It returns when the server is ready."""
        self.compose("up", "--no-build", "--wait", "--wait-timeout=100")
        assert probe(URL + "/ready") == 200

    def down(self, *argv: str) -> None:
        """Take containers and networks away; `--volumes` takes the data too."""
        self.compose("down", "--timeout=45", *argv)

    def dsn(self) -> str:
        """Where the database is, for a container on the stack's network."""
        return f"postgresql://rdev:{self.password}@database:5432/rdev"

    def received(self) -> list[Json]:
        """What the receiver of webhooks got: headers, and the body as a text."""
        return [json.loads(line) for line in self.log("receiver").splitlines()]

    def log(self, service: str) -> str:
        """What a service's container has written since it was made, to both of its streams."""
        written = docker("logs", str(self.state(service)["Id"]))
        return written.stdout + written.stderr

    def state(self, service: str) -> Json:
        """What the engine knows of a service's container, ended ones too."""
        (container,) = self.compose("ps", "--all", "--quiet", service).stdout.split()
        (found,) = json.loads(docker("inspect", container).stdout)
        state: Json = found
        return state
