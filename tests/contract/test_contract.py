"""Every answer is one of the document's, whatever is asked: a short `make test-contract`."""

from pathlib import Path

import pytest

from tests.contract.run import contract_run, recording_server

CASES_MIN = 400


@pytest.mark.slow
def test_no_invented_request_meets_an_answer_outside_of_the_document(quick_place: Path) -> None:
    with recording_server(quick_place) as server:
        found = contract_run(server, "--phases", "coverage,stateful", "-n", "3", seed=7)
    assert found.is_clean, found.report
    assert found.cases >= CASES_MIN, found.report
