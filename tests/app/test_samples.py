"""The clients of docs/api/samples do what the page says, where there is something to run them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.app.server import DEADLINE_S, Api, Server

SAMPLES = Path(__file__).parents[2] / "docs" / "api" / "samples"
RUNTIMES = {
    "stream.sh": ("curl", ["sh"]),
    "stream.py": (sys.executable, [sys.executable]),
    "stream.mjs": ("node", ["node"]),
    "stream.go": ("go", []),
}
COMMAND = 'echo one; echo "two ü" >&2; printf three; exit 7'


def test_every_sample_is_run() -> None:
    assert {path.name for path in SAMPLES.iterdir()} == RUNTIMES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("sample", RUNTIMES)
async def test_a_sample_runs_a_command_and_shows_its_output(
    api: Api, server: Server, sample: str, tmp_path: Path
) -> None:
    runtime, argv = RUNTIMES[sample]
    if shutil.which(runtime) is None:
        pytest.skip(f"no {runtime} here")
    program = str(SAMPLES / sample)
    with trio.fail_after(4 * DEADLINE_S):
        if runtime == "go":
            # `go run` adds a line of its own to what the program says, and has another status.
            built = str(tmp_path / "stream")
            await trio.run_process(["go", "build", "-o", built, program], stdin=subprocess.DEVNULL)
            program = built
        done = await trio.run_process(
            [*argv, program, COMMAND],
            env=os.environ | {"URL": server.url, "KEY": server.key, "PROJECT": "demo"},
            capture_stdout=True,
            capture_stderr=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    if sample == "stream.sh":
        assert b'"line":"one"' in done.stdout, done
        assert '"line":"two ü"'.encode() in done.stdout
        assert b'"exit_code":7' in done.stdout
    else:
        assert done.stdout == b"one\nthree", done
        assert done.stderr.decode() == "two ü\n"
        assert done.returncode == 7
