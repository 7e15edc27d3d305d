"""Servers for the tests of the whole road: one for each module, or one of a test's own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.app.server import Api, Server, open_api, open_server


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """A ready server on embedded PostgreSQL, shared by the tests of a module."""
    with open_server(quick_place) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    """A client of the module's server; the project `demo` exists."""
    async with open_api(server) as api:
        await api.project()
        yield api
