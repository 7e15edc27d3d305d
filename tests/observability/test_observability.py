"""Every query of the guide and of the pages answers, and every alert fires under its fault and ends
after it: a real Prometheus scrapes a real server under load. Prints a table of both."""

import json
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import httpx2
import pytest
import trio
import yaml

from tests.app.server import Server, open_api, open_state, probe
from tests.faults.database import open_database
from tests.observability.faults import ROUNDS, Place
from tests.observability.stack import (
    FILES,
    FOR,
    SCRAPE,
    THRESHOLDS,
    WINDOW,
    Stack,
    missing,
    open_stack,
)

ROOT = Path(__file__).parents[2]
# For what takes up to half a minute: the slowest number is looked at every 15 s.
FIRES_S = 90.0
POLL_S = 0.5

# Of the monitoring guide, letter by letter.
GUIDE = (
    'rate(http_requests_total{job="rdev-api"}[5m])',
    'histogram_quantile(0.99, rate(http_request_duration_seconds_bucket{job="rdev-api"}[5m]))',
    'rate(http_requests_total{job="rdev-api",status=~"5.."}[5m])',
    "rdev_commands_active",
    '100 * rate(http_requests_total{job="rdev-api",status=~"5.."}[5m])'
    ' / rate(http_requests_total{job="rdev-api"}[5m])',
    'rate(rdev_commands_total{job="rdev-api"}[5m])',
    "rate(rdev_command_duration_seconds_sum[5m]) / rate(rdev_command_duration_seconds_count[5m])",
    'up{job="rdev-api"}',
    "rate(rdev_ratelimit_rejected_total[5m]) / rate(rdev_ratelimit_requests_total[5m])",
)


def pages() -> Iterator[tuple[str, str]]:
    """Where it stands, and the query."""
    text = (ROOT / "docs/operations/monitoring.md").read_text()
    for query in re.findall(r"```promql\n(.*?)\n```", text, re.DOTALL):
        yield "monitoring.md", query
    for file in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}", target["expr"]


def alerts() -> set[str]:
    groups = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"]}


@contextmanager
def open_place(quick_place: Path) -> Iterator[Place]:
    """A server on a database that can be killed."""
    with open_database(quick_place) as database, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        settings = {
            "RDEV_DATABASE_DSN": database.dsn,
            "RDEV_DATABASE_POOL_MAX": "4",
            "RDEV_RUNNING_MAX": "4",
            "RDEV_LEASE_S": "3",
            "RDEV_DRAIN_DELAY_S": "0",
            "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
            "RDEV_WEBHOOK_SCHEDULE": "1",
            "RDEV_RATE_LIMIT_FAILURES": "10000/60s",
        }
        with open_state(quick_place, **settings) as server:
            server.start()
            yield Place(server=server, database=database, closed_port=closed.getsockname()[1])


@asynccontextmanager
async def load(server: Server) -> AsyncIterator[None]:
    """A client's day: commands that succeed or fail, their streams and output; and probes."""
    async with trio.open_nursery() as nursery:
        for work in (_commands, _probes):
            nursery.start_soon(work, server)
        yield
        nursery.cancel_scope.cancel()


async def _commands(server: Server) -> None:
    n = 0
    while True:
        try:
            async with open_api(server) as api:
                await api.project("base")
                while True:
                    n += 1
                    script = f"seq 20; sleep 0.2; exit {int(n % 5 == 0)}"
                    command = await api.submit(script, project="base")
                    await api.events(command)
                    await api.get(f"/commands/{command}/output")
                    await trio.sleep(0.3)
        except (AssertionError, httpx2.TransportError, OSError, trio.TooSlowError):
            # The server is away, or refuses: that is the fault's.
            await trio.sleep(1)


async def _probes(server: Server) -> None:
    while True:
        await trio.to_thread.run_sync(probe, server.url + "/ready", abandon_on_cancel=True)
        await trio.sleep(0.5)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rdev-observed-") as name:
        yield Path(name)


class Table:
    """What came of each, printed as it comes."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def row(self, what: str, result: str, *, is_good: bool = True) -> None:
        print(f"{'ok  ' if is_good else 'FAIL'} {what:<58.58} {result}", flush=True)
        if not is_good:
            self.failed.append(what)


@pytest.mark.skipif(bool(missing()), reason=f"apt-get install {' '.join(missing())}")
async def test_every_query_answers_and_every_alert_fires_and_ends(
    quick_place: Path, folder: Path
) -> None:
    """Hurried: scrapes, windows, `for` and some thresholds are shorter than in the files."""
    made = {alert for round_ in ROUNDS for fault in round_ for alert in fault.alerts}
    assert made == alerts()
    table = Table()
    print(f"\nscrapes {SCRAPE}, windows {WINDOW}, for {FOR}; thresholds {THRESHOLDS}")
    with open_place(quick_place) as place:
        target = place.server.url.removeprefix("http://")
        with open_stack(folder, target) as stack:
            async with load(place.server):
                await _settled(stack)
                for round_ in ROUNDS:
                    await _round(stack, place, [*round_], table)
                await _queries(stack, table)
    assert not table.failed, table.failed


async def _settled(stack: Stack) -> None:
    """Load flows, and nothing fires."""
    await _until(lambda: stack.query('rate(rdev_commands_total{job="rdev-api"}[15s]) > 0'))
    assert await _until(lambda: not stack.alerts()), stack.alerts()


async def _round(stack: Stack, place: Place, faults: list, table: Table) -> None:
    """Make these faults, wait for each alert, undo them, wait until none fires."""
    wanted = {alert: fault.name for fault in faults for alert in fault.alerts}
    fired: dict[str, tuple[float, str]] = {}
    told: dict[str, str] = {}
    seen_s: dict[str, float] = {}
    began_s = time.monotonic()

    def look() -> dict[str, str]:
        found = stack.alerts()
        for alert, description in found.items():
            seen_s[alert] = time.monotonic()
            fired.setdefault(alert, (seen_s[alert] - began_s, description))
        told.update(stack.told())
        return found

    async def watch() -> None:
        """From the first fault on: what is over soon fires while others are still being made."""
        while True:
            await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            await trio.sleep(POLL_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async with AsyncExitStack() as made:
            for fault in faults:
                await made.enter_async_context(fault.make(place))
            await _until(lambda: wanted.keys() <= fired.keys() & told.keys())
        nursery.cancel_scope.cancel()
    ended_s = time.monotonic()
    is_over = await _until(lambda: not wanted.keys() & look().keys())
    for alert, name in wanted.items():
        at_s, description = fired.get(alert, (0.0, "did not fire"))
        over_s = max(0.0, seen_s.get(alert, 0.0) - ended_s)
        is_good = alert in fired and alert in told and alert not in stack.alerts()
        result = f"{name}: fired after {at_s:.0f} s, over {over_s:.0f} s after; {description}"
        table.row(alert, f"{result} [{told.get(alert)}]", is_good=is_good and is_over)
    others = fired.keys() - wanted.keys()
    if others:
        print(f"     besides: {', '.join(sorted(others))}", flush=True)
    assert await _until(lambda: not stack.alerts()), stack.alerts()


async def _until(condition: Callable[[], object]) -> bool:
    """Whether it came true in time."""
    with trio.move_on_after(FIRES_S):
        while not await trio.to_thread.run_sync(condition):
            await trio.sleep(POLL_S)
        return True
    return False


async def _queries(stack: Stack, table: Table) -> None:
    await _until(lambda: all(stack.query(query) for query in GUIDE))
    for query in GUIDE:
        _tell(stack, table, "guide", query)
    empty, count = set(), 0
    for where, query in pages():
        count += 1
        if where == "monitoring.md":
            _tell(stack, table, "page", query)
        elif not stack.query(query):
            empty.add(where)
    print(f"dashboards: {count} expressions answered, nothing to show: {sorted(empty)}", flush=True)


def _tell(stack: Stack, table: Table, where: str, query: str) -> None:
    found = stack.query(query)
    table.row(f"{where}: {query}", f"{len(found)} series", is_good=bool(found))
