"""The log of a server, as an operator reads it: the line of a request, and levels that change."""

import json
import subprocess
import sys
from pathlib import Path
from signal import SIGHUP

from tests.app.server import (
    ROOT,
    Server,
    bare_environment,
    open_api,
    open_server,
    open_state,
    until,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GUIDE = [
    "level", "time", "msg", "request_id", "method", "path", "status", "duration_ms", "client_ip"
]  # fmt: skip


def lines(server: Server) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def requests(server: Server) -> list[dict[str, object]]:
    return [line for line in lines(server) if line["msg"] == "request completed"]


async def test_each_request_is_one_line_with_the_fields_of_the_guide(quick_place: Path) -> None:
    with open_server(quick_place) as server:
        async with open_api(server) as api:
            await api.get("/projects?token=secret-of-nobody")
            await api.get("/nowhere", headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})
        # It is written when the request is over, which is after its answer.
        until(lambda: len(requests(server)) == 2, "both are logged", server)
        plain, traced = requests(server)
    assert list(plain) == GUIDE
    assert list(traced) == [*GUIDE[:4], "trace_id", *GUIDE[4:]]
    assert (plain["level"], plain["method"], plain["path"], plain["status"]) == (
        "info", "GET", "/projects", 200
    )  # fmt: skip
    assert (traced["path"], traced["status"], traced["trace_id"]) == ("/nowhere", 404, TRACE)
    assert isinstance(plain["duration_ms"], int)
    assert plain["client_ip"] == "127.0.0.1"


def test_sighup_has_the_levels_read_again_and_ends_nothing(quick_place: Path) -> None:
    with open_state(quick_place) as server:
        settings = server.state_dir / "settings.toml"
        settings.write_text('log_level = "warn"\n')
        server.arguments = ("--config", str(settings))
        server.start()
        assert '"level":"info"' not in server.log

        settings.write_text('log_level = "info"\nlog_levels = "rdev.http=error"\n')
        server.signal(SIGHUP)
        until(lambda: "levels of the log read again" in server.log, "it says so", server)

        settings.write_text('log_level = "loud"\n')
        server.signal(SIGHUP)
        until(lambda: "settings not read again" in server.log, "it says why", server)
        assert "RDEV_LOG_LEVEL" in server.log

        server.signal(SIGHUP)
        until(lambda: server.log.count("settings not read again") == 2, "it lives", server)


CRASHES = """
import sys
import rdev.cli.serve
from rdev.cli import main

async def crash(*_, **__):
    raise RuntimeError("a defect with password=hidden-secret")

rdev.cli.serve.run_server = crash
main(["serve"])
"""


def test_a_defect_that_ends_the_server_is_a_line_of_its_log(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CRASHES],
        cwd=ROOT,
        env=bare_environment() | {"RDEV_STATE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (line,) = map(json.loads, ended.stdout.splitlines())
    assert ended.returncode == 1
    assert (line["level"], line["msg"]) == ("error", "ended by a defect")
    assert "RuntimeError" in line["exception"]
    assert "hidden-secret" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
