"""The published JavaScript library, installed once into pytest's cache by its own lock."""

import shutil
import subprocess
from pathlib import Path

import pytest

JUDGE = Path(__file__).parent / "judge"
INSTALL_DEADLINE_S = 100


@pytest.fixture(scope="session")
def node_folder(pytestconfig: pytest.Config) -> Path:
    """A folder whose node programs can import `standardwebhooks`; skips where it cannot be made."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("there is no node with npm")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("webhook-judge")
    for source in JUDGE.iterdir():
        shutil.copy(source, folder)
    lock = (JUDGE / "package-lock.json").read_text()
    installed = folder / "installed"
    if not installed.exists() or installed.read_text() != lock:
        argv = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            subprocess.run(
                argv, cwd=folder, check=True, capture_output=True, timeout=INSTALL_DEADLINE_S
            )
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
            pytest.skip(f"npm cannot install standardwebhooks: {said.strip()[-300:] or error}")
        installed.write_text(lock)
    return folder
