"""The promises of the queue under faults, seeds that replay, and bugs that must be found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.chance import FaultKind
from tests.simulation.planted import PLANTED, found_at
from tests.simulation.world import simulate

# `make test-simulation` runs thousands.
SEEDS = 150
# `make test-simulation` looks for all of them.
ALWAYS = (
    "fence off",
    "guard off",
    "heartbeat without compare",
    "replay before subscribe",
    "take-over at once",
    "no repair of lanes",
)
DIGESTS = """
from tests.simulation.world import simulate
print([simulate(seed).history.digest() for seed in range(12)])
"""


@pytest.mark.slow
def test_no_seed_breaks_a_promise() -> None:
    broken = {}
    kinds = set()
    for seed in range(SEEDS):
        result = simulate(seed)
        kinds |= set(result.faults)
        if result.violations:
            broken[seed] = result.violations[0]
    assert broken == {}, "again: make test-simulation SEED=n"
    assert kinds == set(FaultKind)


def test_the_same_seed_is_the_same_run() -> None:
    for seed in range(10):
        assert simulate(seed).history.digest() == simulate(seed).history.digest()


def test_another_seed_is_another_run() -> None:
    assert len({simulate(seed).history.digest() for seed in range(20)}) == 20


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_order_of_hashes() -> None:
    """Sets of strings come in another order in every process, unless told."""
    assert _digests(hash_seed="1") == _digests(hash_seed="2")


def _digests(*, hash_seed: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", DIGESTS],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ALWAYS)
def test_a_planted_bug_is_found(name: str) -> None:
    assert found_at(name) is not None


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PLANTED if name not in ALWAYS])
def test_every_planted_bug_is_found(name: str) -> None:
    assert found_at(name) is not None
