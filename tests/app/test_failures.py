"""How a program of rdev ends: its exit status, and one line for each error."""

from collections.abc import Callable

import pytest
import trio

from rdev.cli.failures import INTERRUPT_STATUS, PIPE_STATUS, run_trio
from rdev.domain.errors import ErrorCode, RdevError


def raising(error: BaseException) -> Callable[[], object]:
    """A main that ends with the error, in the group of a nursery."""

    async def main() -> int:
        async with trio.open_nursery():
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RdevError(ErrorCode.CONFLICT, "somebody else has it"), 1),
        (BrokenPipeError(), PIPE_STATUS),
        (KeyboardInterrupt(), INTERRUPT_STATUS),
    ],
)
def test_what_a_nursery_raised_ends_the_program_with_its_status_alone(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.dup2", lambda *_: None)  # pytest goes on writing
    # Not in a group: Python 3.11 before 3.11.4 makes one of what an `except*` raises.
    with pytest.raises(SystemExit) as ended:
        run_trio(raising(error))  # type: ignore[arg-type]
    assert ended.value.code == status
