"""An executor, local or over execs, whose processes must be gone when a test ends."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from rdev.adapters.execution.executor import ScriptExecutor
from tests.adapters.execution.observing import PROJECT, QUICK, local, processes_in, until
from tests.adapters.execution.pods import cluster


@pytest.fixture
def projects(tmp_path: Path) -> Path:
    return tmp_path / "projects"


# Over execs it is minutes long: `make test-kubernetes`. A short version is test_kubernetes.py.
@pytest.fixture(params=["local", pytest.param("kubernetes", marks=pytest.mark.full)])
async def executor(request: pytest.FixtureRequest, projects: Path) -> AsyncIterator[ScriptExecutor]:
    async with AsyncExitStack() as stack:
        if request.param == "local":
            executor: ScriptExecutor = local(projects, patience=QUICK)
        else:
            made = await stack.enter_async_context(cluster(projects, patience=QUICK))
            executor = made.executor
        await executor.prepare(PROJECT)
        yield executor
        await until(lambda: not processes_in(projects), "all processes are gone")
