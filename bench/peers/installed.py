"""Other queues, installed for the measurement by their names and run by interpreters of their own.

They are no dependencies of rdev. What cannot be installed is left out, with the reason printed.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 90.0


class PeerError(Exception):
    """A peer could not be installed, or its script failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A queue that was installed: how its script is called."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]

    async def fill(self, dsn: str, work: Mapping[str, object]) -> None:
        """Make its schema in an empty database and queue the work."""
        await self._call("fill", dsn, work)

    async def run(self, dsn: str, work: Mapping[str, object]) -> dict[str, float]:
        """Commands per second, and `overlaps`: how often two of one project ran at once."""
        found = json.loads(await self._call("run", dsn, work))
        return {"per_s": found["per_s"], "overlaps": found["overlaps"]}

    async def _call(self, what: str, dsn: str, work: Mapping[str, object]) -> bytes:
        with trio.fail_after(RUN_TIMEOUT_S):
            done = await trio.run_process(
                [*self.argv, what, _plain(dsn), json.dumps(work)],
                env={**os.environ, **self.env},
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        if done.returncode:
            raise PeerError(f"{self.name} {what}: {done.stderr[-1_000:].decode(errors='replace')}")
        return bytes(done.stdout)


def _plain(dsn: str) -> str:
    """Without what only libpq understands."""
    return " ".join(part for part in dsn.split() if not part.startswith("connect_timeout"))


def install(folder: Path) -> list[Peer]:
    """Those that can be installed here. What is already in the folder is used again."""
    peers = []
    for make in (_procrastinate, _pgqueuer, _graphile):
        try:
            peers.append(make(folder))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or b""
            reason = said.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
            print(f"left out: {make.__name__.strip('_')}: {reason[0]}", flush=True)
    return peers


def _procrastinate(folder: Path) -> Peer:
    python = venv(folder / "procrastinate", "procrastinate", "psycopg[binary,pool]")
    script = str(HERE / "on_procrastinate.py")
    return Peer(name="procrastinate", argv=(python, script), env={})


def _pgqueuer(folder: Path) -> Peer:
    python = venv(folder / "pgqueuer", "pgqueuer", "asyncpg")
    return Peer(name="pgqueuer", argv=(python, str(HERE / "on_pgqueuer.py")), env={})


def _graphile(folder: Path) -> Peer:
    prefix, node, npm = folder / "graphile", shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise FileNotFoundError("there is no node with npm")
    _once(prefix, [npm, "install", "--no-audit", "--no-fund", "graphile-worker"])
    argv = (node, str(HERE / "on_graphile.mjs"))
    return Peer(name="graphile_worker", argv=argv, env={"NODE_PREFIX": str(prefix)})


def venv(folder: Path, *packages: str) -> str:
    """A virtual environment with the packages, made once; its interpreter.

    Errors: OSError, subprocess.SubprocessError.
    """
    python = str(folder / "bin" / "python")
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    _once(folder, [python, "-m", "pip", "install", "--quiet", *packages])
    return python


def _once(folder: Path, argv: list[str]) -> None:
    """Run an installation in the folder unless it succeeded there before."""
    if (folder / "installed").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text("{}\n")
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
    (folder / "installed").touch()
