"""Schemathesis against a real server on a real socket, whose executor records and runs nothing.

Bounded by the cases or the seconds asked for, whichever comes first.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.app.server import Server, open_state

CONFIG = Path(__file__).with_name("schemathesis.toml")
# An unending stream has no answer to wait for; tests/app holds them.
ENDLESS = ("/events", "/projects/{project}/events")
_CASES = re.compile(r"(\d+) generated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run came to."""

    cases: int
    is_clean: bool
    report: str


@contextmanager
def recording_server(place: Path) -> Iterator[Server]:
    """A ready server that runs nothing and limits nobody."""
    unlimited = {
        f"RDEV_RATE_LIMIT{what}": "off" for what in ("", "_STARTS", "_ADDRESS", "_FAILURES")
    }
    with open_state(place, **unlimited, RDEV_STREAMS_KEY_MAX="100000") as server:
        server.module = "tests.contract.recording_server"
        server.start()
        yield server


def contract_run(server: Server, *options: str, seed: int) -> Found:
    """One run of schemathesis; `options` bound it."""
    argv = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", f"{server.url}/openapi.json", "--no-color", "--seed", str(seed)),
        *("-H", f"X-API-Key: {server.key}"),
        *(word for path in ENDLESS for word in ("--exclude-path", path)),
        *options,
    ]
    done = subprocess.run(
        argv,
        cwd=server.state_dir,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    cases = _CASES.search(done.stdout)
    report = done.stdout + done.stderr
    return Found(cases=int(cases[1]) if cases else 0, is_clean=done.returncode == 0, report=report)
