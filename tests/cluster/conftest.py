"""The real cluster, a server of it, and the ledger of what was done to both."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.app.server import Api, Server, open_api
from tests.cluster.ledger import Ledger
from tests.cluster.real import RealCluster, given, real_cluster, serving

_LEDGER = Ledger()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Minutes long, all together, and in need of a cluster: `make test-kubernetes`."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def there_is_one() -> None:
    """Not in an async fixture: a skip in one loses its reason."""
    given()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[RealCluster]:
    async with real_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def server(quick_place: Path, cluster: RealCluster) -> AsyncIterator[Server]:
    async with serving(quick_place, cluster.settings) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    async with open_api(server) as api:
        yield api


@pytest.fixture
def ledger() -> Ledger:
    """Where each fault adds its line."""
    return _LEDGER


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the ledger."""
    if _LEDGER.entries:
        terminalreporter.section("the ledger of the cluster's faults")
        for line in _LEDGER.render():
            terminalreporter.write_line(line)
