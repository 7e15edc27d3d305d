"""The session's ledger: what all runs of this folder came to, printed at the end."""

import pytest

from tests.faults.arena import LEASE_S
from tests.faults.ledger import Tally

_SESSION = Tally()


@pytest.fixture
def session_tally() -> Tally:
    """Where a run adds its own tally."""
    return _SESSION


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the ledger."""
    if _SESSION.injections:
        terminalreporter.section("the ledger of faults")
        for line in _SESSION.render(lease_s=LEASE_S):
            terminalreporter.write_line(line)
