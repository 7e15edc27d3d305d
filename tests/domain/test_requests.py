"""What a client may ask to run: every field with its limits, all faults together."""

import pytest

from rdev.domain.commands import Priority, Retry
from rdev.domain.errors import RdevError
from rdev.domain.requests import (
    ARG_MAX_BYTES,
    ENV_MAX_BYTES,
    ENV_MAX_ITEMS,
    STDIN_MAX_BYTES,
    Common,
    parse_shell,
)


def _common(**fields: object) -> Common:
    return parse_shell({"command": "true", **fields}).common


def _faults(**fields: object) -> list[str]:
    with pytest.raises(RdevError) as caught:
        parse_shell({"command": "true", **fields})
    return [fault.pointer for fault in caught.value.faults]


def test_a_command_alone_gets_the_defaults() -> None:
    request = parse_shell({"command": "echo hi"})
    assert request.command == "echo hi"
    assert request.common == Common(
        env={},
        cwd="",
        stdin=b"",
        timeout_s=600,
        priority=Priority.NORMAL,
        expires_in_s=None,
        retry=Retry.NEVER,
    )


def test_every_field_is_read() -> None:
    common = _common(
        env={"A": "", "B_1": "x=y"},
        cwd="a/b",
        stdin="ä\0",
        timeout_s=86_400,
        priority="high",
        expires_in_s=604_800,
        retry="safe",
    )
    assert common == Common(
        env={"A": "", "B_1": "x=y"},
        cwd="a/b",
        stdin="ä\0".encode(),
        timeout_s=86_400,
        priority=Priority.HIGH,
        expires_in_s=604_800,
        retry=Retry.SAFE,
    )


def test_every_fault_of_a_body_is_told() -> None:
    faults = _faults(
        command="",
        cwd="/etc",
        timeout_s=0,
        priority="urgent",
        expires_in_s=0,
        retry="always",
        env=[],
        stdin=7,
        color="red",
    )
    assert sorted(faults) == [
        "/color",
        "/command",
        "/cwd",
        "/env",
        "/expires_in_s",
        "/priority",
        "/retry",
        "/stdin",
        "/timeout_s",
    ]


def test_a_command_is_required() -> None:
    with pytest.raises(RdevError) as caught:
        parse_shell({})
    assert [fault.pointer for fault in caught.value.faults] == ["/command"]


def test_the_largest_texts_are_taken_and_one_byte_more_is_not() -> None:
    assert len(parse_shell({"command": "x" * ARG_MAX_BYTES}).command) == ARG_MAX_BYTES
    assert _faults(command="x" * (ARG_MAX_BYTES + 1)) == ["/command"]
    assert len(_common(stdin="x" * STDIN_MAX_BYTES).stdin) == STDIN_MAX_BYTES
    assert _faults(stdin="x" * (STDIN_MAX_BYTES + 1)) == ["/stdin"]
    value = "x" * (ARG_MAX_BYTES - 2)
    assert _common(env={"A": value}).env == {"A": value}
    assert _faults(env={"A": value + "x"}) == ["/env/A"]


@pytest.mark.parametrize(
    ("cwd", "expected"),
    [(".", ""), ("./a//b/.", "a/b"), ("a/b/", "a/b"), ("..a", "..a"), (None, "")],
)
def test_a_folder_of_the_project_is_normalised(cwd: str | None, expected: str) -> None:
    assert _common(cwd=cwd).cwd == expected


@pytest.mark.parametrize("cwd", ["/", "/a", "..", "a/../b", "a/..", "a\0", "x" * 5_000, "\ud800"])
def test_a_folder_outside_of_the_project_is_refused(cwd: str) -> None:
    assert _faults(cwd=cwd) == ["/cwd"]


@pytest.mark.parametrize(
    "name", ["", "A=B", "A\0", "1A", "A-B", "ä", "x" * 257, "RDEV_X", "\ud800"]
)
def test_a_name_that_no_shell_can_export_is_refused(name: str) -> None:
    [pointer] = _faults(env={name: "x"})
    assert pointer == f"/env/{name}"


@pytest.mark.parametrize("value", [1, None, "a\0", "\ud800", ["x"]])
def test_a_value_that_no_environment_can_hold_is_refused(value: object) -> None:
    assert _faults(env={"A": value}) == ["/env/A"]


def test_an_environment_is_bounded_in_entries_and_bytes() -> None:
    assert len(_common(env={f"A{n}": "" for n in range(ENV_MAX_ITEMS)}).env) == ENV_MAX_ITEMS
    assert _faults(env={f"A{n}": "" for n in range(ENV_MAX_ITEMS + 1)}) == ["/env"]
    value = "x" * (ENV_MAX_BYTES // 5)
    assert _faults(env={f"A{n}": value for n in range(5)}) == ["/env"]
