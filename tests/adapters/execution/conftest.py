"""A local executor whose processes must be gone when a test ends."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rdev.adapters.execution.local import LocalExecutor
from tests.adapters.execution.observing import PROJECT, QUICK, local, processes_in, until


@pytest.fixture
def projects(tmp_path: Path) -> Path:
    return tmp_path / "projects"


@pytest.fixture
async def executor(projects: Path) -> AsyncIterator[LocalExecutor]:
    executor = local(projects, patience=QUICK)
    await executor.prepare(PROJECT)
    yield executor
    await until(lambda: not processes_in(projects), "all processes are gone")
