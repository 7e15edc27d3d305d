"""What a client may ask of a project."""

import pytest

from rdev.domain.errors import RdevError
from rdev.domain.project_requests import parse_folder_project as parse_project
from rdev.domain.projects import ProjectDefinition


def test_an_id_is_all_that_a_local_project_needs() -> None:
    assert parse_project({"id": "demo"}) == ProjectDefinition(id="demo")  # type: ignore[arg-type]
    assert parse_project({"id": "demo", "image": None, "env": None}).id == "demo"


def test_every_fault_of_a_project_is_told() -> None:
    with pytest.raises(RdevError) as caught:
        parse_project({"id": "Not-An-Id", "image": "debian", "resources": {}, "colour": "red"})
    assert [fault.pointer for fault in caught.value.faults] == [
        "/id",
        "/image",
        "/resources",
        "/colour",
    ]


@pytest.mark.parametrize("body", [{}, {"id": ""}, {"id": 7}, {"id": "a" * 41}])
def test_a_project_needs_an_id(body: dict[str, object]) -> None:
    with pytest.raises(RdevError) as caught:
        parse_project(body)
    assert [fault.pointer for fault in caught.value.faults] == ["/id"]
