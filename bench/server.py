"""A real `rdev serve` in a process of its own, as an operator starts it, and what it costs.

Owns the process and, unless one is given, its state folder. Bounded by START_DEADLINE_S and
STOP_DEADLINE_S.
"""

import contextlib
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 45.0
POLL_S = 0.005
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that is ready. `start_to_ready_s` runs from the start of its process to the first
    200 of `/ready`."""

    host: str
    port: int
    key: str
    pid: int
    state_dir: Path
    start_to_ready_s: float

    def cpu_s(self) -> float:
        """CPU seconds of the server's process so far (not of the database or the commands)."""
        text = Path(f"/proc/{self.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def rss_mib(self, *, peak: bool = False) -> float:
        """Resident memory of the server's process in MiB, now or at its highest."""
        name = "VmHWM:" if peak else "VmRSS:"
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"process {self.pid} has no {name}")


@contextlib.contextmanager
def open_state_dir() -> Iterator[Path]:
    """An empty folder for the server's state, removed afterwards."""
    # A short path: the database's socket is in it, and socket paths end at 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="rdev-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def open_server(state_dir: Path, *, program: str = "rdev", **settings: str) -> Iterator[Server]:
    """A ready server while the block runs, with further settings; stopped by SIGINT, so that no
    command outlives a scenario that failed; it must end with status 0. `program`: the module.

    Errors: RuntimeError with the end of the server's log when it does not start or stop.
    """
    process, log, started = _start(program, state_dir, key := _new_key(), settings)
    try:
        yield _ready(process, state_dir, key, started)
    finally:
        _stop(process, log)


@contextlib.contextmanager
def open_mortal_server(state_dir: Path, **settings: str) -> Iterator[Server]:
    """The same, but it ends by SIGKILL, whatever it is doing. Its database lives on for the next
    one of this state folder, which must be one of `open_server`."""
    process, _, started = _start("rdev", state_dir, key := _new_key(), settings)
    try:
        yield _ready(process, state_dir, key, started)
    finally:
        process.kill()
        process.wait()


def _new_key() -> str:
    return "bench-" + secrets.token_hex(24)


def _start(
    program: str, state_dir: Path, key: str, settings: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Path, float]:
    """The process, its log, and when it was started."""
    (state_dir / "address").unlink(missing_ok=True)
    log = state_dir / "bench.log"
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", program, "serve"],
            env=_environment(state_dir, key) | settings,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    return process, log, started


def _ready(process: subprocess.Popen[bytes], state_dir: Path, key: str, started: float) -> Server:
    host, port = _wait_until_ready(process, state_dir / "address", state_dir / "bench.log")
    return Server(
        host=host,
        port=port,
        key=key,
        pid=process.pid,
        state_dir=state_dir,
        start_to_ready_s=time.monotonic() - started,
    )


def _environment(state_dir: Path, key: str) -> dict[str, str]:
    """This process's environment without any setting of rdev but ours."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RDEV_", "OTEL_"))
    }
    kept.pop("DB_HOST", None)
    return kept | {
        "RDEV_STATE_DIR": str(state_dir),
        "RDEV_BIND": "127.0.0.1:0",
        "RDEV_ADMIN_KEY": key,
        "RDEV_LOG_LEVEL": "warn",
        # The load comes from one address.
        "RDEV_RATE_LIMIT_ADDRESS": "off",
    }


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: Path, log: Path
) -> tuple[str, int]:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"rdev serve ended with {process.returncode}:\n{_tail(log)}")
        if (bound := _read_address(address)) is not None and _is_ready(*bound):
            return bound
        time.sleep(POLL_S)
    raise RuntimeError(f"rdev serve was not ready in {START_DEADLINE_S:g} s:\n{_tail(log)}")


def _read_address(address: Path) -> tuple[str, int] | None:
    """Host and port, None while the file is not there or not yet whole."""
    try:
        host, _, port = address.read_text().strip().rpartition(":")
    except FileNotFoundError:
        return None
    return (host, int(port)) if host and port.isdigit() else None


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(
            f"rdev serve did not stop in {STOP_DEADLINE_S:g} s:\n{_tail(log)}"
        ) from None
    if process.returncode != 0:
        raise RuntimeError(f"rdev serve ended with {process.returncode}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2_000:]
