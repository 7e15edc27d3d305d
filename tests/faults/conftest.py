"""The session's ledger: what all runs of this folder came to, printed at the end."""

import pytest

from tests.faults.arena import LEASE_S
from tests.faults.cut_reader import CutTally
from tests.faults.ledger import Tally

_SESSION = Tally()
_CUTS = CutTally()


@pytest.fixture
def session_tally() -> Tally:
    """Where a run adds its own tally."""
    return _SESSION


@pytest.fixture
def session_cuts() -> CutTally:
    """The same for runs that cut clients."""
    return _CUTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the ledgers."""
    if _SESSION.injections:
        terminalreporter.section("the ledger of faults")
        for line in _SESSION.render(lease_s=LEASE_S):
            terminalreporter.write_line(line)
    if _CUTS.cuts:
        terminalreporter.section("the ledger of cuts")
        for line in _CUTS.render():
            terminalreporter.write_line(line)
