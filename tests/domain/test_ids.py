"""Identifiers on the wire."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.ids import (
    ATTEMPTS_MAX,
    attempt_id,
    attempt_ids,
    command_id,
    command_of,
    command_uuid,
    is_command_id,
    is_project_id,
)


@given(uuid=st.uuids())
def test_a_command_id_and_its_uuid_are_the_same_thing(uuid: UUID) -> None:
    command = command_id(uuid)
    assert is_command_id(command)
    assert command_uuid(command) == uuid


@given(first=st.uuids(), second=st.uuids())
def test_command_ids_sort_as_their_uuids(first: UUID, second: UUID) -> None:
    assert (command_id(first) < command_id(second)) == (first < second)


@given(uuid=st.uuids())
def test_each_attempt_has_a_name_of_its_own_and_tells_its_command(uuid: UUID) -> None:
    command = command_id(uuid)
    attempts = attempt_ids(command)
    assert attempts == [command, f"{command}.2", f"{command}.3"]
    assert attempts == [attempt_id(command, number + 1) for number in range(ATTEMPTS_MAX)]
    assert {command_of(attempt) for attempt in attempts} == {command}


@pytest.mark.parametrize(
    "text", ["", "cmd_", "cmd_" + "0" * 31, "cmd_" + "0" * 33, "cmd_" + "A" * 32, "0" * 32]
)
def test_what_has_another_form_is_no_command_id(text: str) -> None:
    assert not is_command_id(text)
    assert not is_command_id(f"cmd_{'0' * 32}\n")


@pytest.mark.parametrize("text", ["a", "0", "a-b", "a" * 40, "0--9"])
def test_a_dns_label_of_40_characters_is_a_project_id(text: str) -> None:
    assert is_project_id(text)


@pytest.mark.parametrize("text", ["", "-", "a-", "-a", "A", "a_b", "a.b", "ä", "a" * 41, "a\n"])
def test_anything_else_is_no_project_id(text: str) -> None:
    assert not is_project_id(text)
