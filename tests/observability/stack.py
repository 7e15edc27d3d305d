"""Prometheus and an Alertmanager beside one server, from the files of deploy/prometheus.

The files are used as they are but for time: what waits for minutes would make the suite last for
hours. `hurried` says what is replaced. Owns both processes and their folder.
"""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import httpx2
import yaml

FILES = Path(__file__).parents[2] / "deploy" / "prometheus"
PROGRAMS = ("prometheus", "prometheus-alertmanager")
START_S = 60.0

# The intervals of scrapes and rules, the windows of rates, and how long a state must last.
SCRAPE = "1s"
WINDOW = "15s"
FOR = "2s"
# Thresholds in seconds of waiting, or in numbers that a test would take long to make.
THRESHOLDS = {
    "RdevAPIHighCommandQueue": ("> 1000", "> 5"),
    "RdevAPIQueueStuck": ("> 900", "> 6"),
    "RdevAPIWebhookBacklog": ("> 3600", "> 3"),
    "RdevAPIFeedsHeldBack": ("> 60", "> 3"),
    "RdevAPIOldTransaction": ("> 3600", "> 3"),
    "RdevAPIAuditSealLag": ("> 300", "> 3"),
    # How long ago a server started.
    "RdevAPICommandsLost": ("< 900", "< 15"),
    "RdevAPIKillUnconfirmed": ("< 900", "< 15"),
    "RdevAPIWebhooksDead": ("< 3600", "< 15"),
    # A fifth of a core, which is not this server's alone, and of a gibibyte.
    "RdevAPIHighCPU": ("> 0.9", "> 0.2"),
    "RdevAPIHighMemory": ("> 0.8 *", "> 0.2 *"),
}
_RANGE = re.compile(r"\[\d+[mh]\]")
_OFFSET = re.compile(r"offset \d+[mh]")


def hurried(rules: str) -> dict[str, Any]:
    """The rules with windows of `WINDOW`, `for: FOR` and the thresholds above."""
    found: dict[str, Any] = yaml.safe_load(rules)
    for group in found["groups"]:
        for rule in group["rules"]:
            expr = _OFFSET.sub(f"offset {WINDOW}", _RANGE.sub(f"[{WINDOW}]", rule["expr"]))
            old, new = THRESHOLDS.get(rule["alert"], ("", ""))
            assert old in expr, rule["alert"]
            rule["expr"] = expr.replace(old, new, 1) if old else expr
            if "for" in rule:
                rule["for"] = FOR
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Where both are asked."""

    prometheus: str
    alertmanager: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        answer = httpx2.get(
            self.prometheus + "/api/v1/query",
            params={"query": expression},
            timeout=30,
            trust_env=False,
        ).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def alerts(self) -> dict[str, str]:
        """What fires now, and the description of one of them."""
        answer = httpx2.get(self.prometheus + "/api/v1/alerts", timeout=30, trust_env=False)
        return {
            alert["labels"]["alertname"]: alert["annotations"]["description"]
            for alert in answer.json()["data"]["alerts"]
            if alert["state"] == "firing"
        }

    def told(self) -> Mapping[str, str]:
        """What the Alertmanager has of it: `active`, or `suppressed` by another alert."""
        answer = httpx2.get(self.alertmanager + "/api/v2/alerts", timeout=30, trust_env=False)
        return {alert["labels"]["alertname"]: alert["status"]["state"] for alert in answer.json()}


def missing() -> list[str]:
    """The packages that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def open_stack(folder: Path, target: str) -> Iterator[Stack]:
    """Both, running and reachable, watching the server at `target` (host:port)."""
    prometheus, alertmanager = _free_address(), _free_address()
    config = _configuration(target, alertmanager)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    rules = hurried((FILES / "rules.yaml").read_text())
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    stack = Stack(prometheus=f"http://{prometheus}", alertmanager=f"http://{alertmanager}")
    with (
        _running(
            folder,
            "prometheus-alertmanager",
            f"--config.file={FILES / 'alertmanager.yaml'}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address={alertmanager}",
            "--cluster.listen-address=",
        ),
        _running(
            folder,
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={prometheus}",
        ),
    ):
        for url in (stack.prometheus, stack.alertmanager):
            _await(url + "/-/ready", folder)
        yield stack


def _configuration(target: str, alertmanager: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FILES / "prometheus.yaml").read_text())
    found["global"] = {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE}
    found["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    found["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    return found


@contextmanager
def _running(folder: Path, program: str, *arguments: str) -> Iterator[None]:
    with (folder / f"{program}.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.send_signal(SIGTERM)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.send_signal(SIGKILL)
            process.wait()


def _await(url: str, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx2.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        logs = "\n".join(log.read_text()[-2_000:] for log in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
