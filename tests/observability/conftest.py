"""A real Prometheus, a real Alertmanager, a real rdev. `make test-observability`; no part of `make
test`. Needed: Debian's `prometheus` and `prometheus-alertmanager`; without them it is skipped."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """It takes minutes, and programs that not everybody has."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.full)
            item.add_marker(pytest.mark.timeout(1200))
