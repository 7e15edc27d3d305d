"""A server on the fakes. All tests here run under a clock that jumps to the next deadline."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.fakes.store import StoreState
from tests.services.scripted import PROGRAMS, Place, Server, make_project


def run_jumping(
    main: Callable[[], Awaitable[None]],
    *,
    clock: trio.abc.Clock | None,
    instruments: Sequence[trio.abc.Instrument],
) -> None:
    """`trio.run` with the jumping clock where the test asks for no other."""
    trio.run(main, clock=clock or MockClock(autojump_threshold=0), instruments=instruments)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-trio gives a clock only to a test that names it."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("trio"):
            item.add_marker(pytest.mark.trio(run=run_jumping), append=False)


@pytest.fixture
async def server(nursery: trio.Nursery) -> Server:
    """One server with one project; nothing of it runs yet."""
    server = Server(state=StoreState(), place=Place(nursery, dict(PROGRAMS)))
    await make_project(server)
    return server
