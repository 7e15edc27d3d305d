"""Schemathesis against a real server on a real socket, whose executor records and runs nothing.

Bounded by the cases or the seconds asked for, whichever comes first.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.app.server import ROOT, Server, open_state
from tests.contract.tally import Tally

# Where schemathesis is to leave its tally (tests/contract/hooks.py).
TALLY_FILE = "RDEV_CONTRACT_TALLY"
CONFIG = Path(__file__).with_name("schemathesis.toml")
# An unending stream has no answer to wait for; tests/app holds them.
ENDLESS = ("/events", "/projects/{project}/events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run came to."""

    tally: Tally
    is_clean: bool
    report: str

    @classmethod
    def nothing(cls) -> "Found":
        return cls(tally=Tally(), is_clean=True, report="")

    @property
    def cases(self) -> int:
        return self.tally.cases


@contextmanager
def recording_server(place: Path) -> Iterator[Server]:
    """A ready server that runs nothing, sends nothing and limits nobody."""
    unlimited = {
        f"RDEV_RATE_LIMIT{what}": "off" for what in ("", "_STARTS", "_ADDRESS", "_FAILURES")
    }
    with open_state(place, **unlimited, RDEV_STREAMS_KEY_MAX="100000") as server:
        server.module = "tests.contract.recording_server"
        server.start()
        yield server


def contract_run(server: Server, *options: str, seed: int) -> Found:
    """One run of schemathesis; `options` bound it."""
    place = server.state_dir / f"tally-{seed}"
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
        env=os.environ
        | {
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.contract.hooks",
            TALLY_FILE: str(place),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return Found(
        tally=Tally.read(place),
        is_clean=done.returncode == 0,
        report=done.stdout + done.stderr,
    )
