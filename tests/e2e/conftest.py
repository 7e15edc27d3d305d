"""One stack for the session, taken down with its data at the end."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.app.server import Api, open_api
from tests.e2e.stack import Stack, given


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In need of an engine, and of a minute: `make test-compose`."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.full)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    given()
    stack = Stack()
    stack.down("--volumes")  # of a run that was broken off
    try:
        stack.up()
        yield stack
    finally:
        print(stack.compose("logs", "--tail=50", check=False).stdout)
        stack.down("--volumes")


@pytest.fixture
async def api(stack: Stack) -> AsyncIterator[Api]:
    """A client with the bootstrap key; the project `demo` exists."""
    async with open_api(stack.server) as api:
        await api.project()
        yield api
