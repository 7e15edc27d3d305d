"""A view is shared by those whom an old one serves as well, and by nobody else."""

from dataclasses import replace

import pytest
import trio

from rdev.domain.commands import Command, Status
from rdev.domain.ids import CommandId
from rdev.services.stream_views import VIEW_S, VIEWS_MAX, Views
from tests.services.test_commands import Office


class Counted:
    """Commands that count how often they are asked."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.asked = 0

    async def get(self, command: CommandId) -> Command:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        return self.command

    async def oldest_seq(self, command: CommandId) -> int | None:
        await trio.lowlevel.checkpoint()
        return 1


@pytest.fixture
async def counted(server: object) -> Counted:
    office = Office(server)  # type: ignore[arg-type]
    accepted = await office.submit()
    return Counted(replace(accepted.command, last_seq=5, status=Status.RUNNING))


async def test_whoever_is_behind_shares_a_view_for_a_second(counted: Counted) -> None:
    views = Views(counted)
    for after in (0, 3, 4):
        await views.of(counted.command.id, after=after)
    assert counted.asked == 1
    await trio.sleep(VIEW_S)
    await views.of(counted.command.id, after=0)
    assert counted.asked == 2


@pytest.mark.parametrize("after", [5, 6, 100])
async def test_whoever_asks_for_the_end_gets_the_truth_of_now(counted: Counted, after: int) -> None:
    """An old view would send a client away, or keep one that must not come back."""
    views = Views(counted)
    await views.of(counted.command.id, after=0)
    counted.command = replace(counted.command, last_seq=7, status=Status.SUCCEEDED)
    view = await views.of(counted.command.id, after=after)
    assert (view.command.last_seq, view.command.status) == (7, Status.SUCCEEDED)


async def test_what_a_command_was_given_is_not_remembered(counted: Counted) -> None:
    """A thousand prompts of 128 KiB would be 128 MiB."""
    counted.command = replace(counted.command, argv=("claude", "x" * 131_071))
    view = await Views(counted).of(counted.command.id, after=0)
    assert view.command == replace(counted.command, argv=())


async def test_so_many_views_are_remembered_and_no_more(counted: Counted) -> None:
    views = Views(counted)
    for number in range(VIEWS_MAX + 10):
        await views.of(CommandId(f"cmd_{number}"), after=0)
    await views.of(CommandId("cmd_0"), after=0)
    assert counted.asked == VIEWS_MAX + 11
    assert len(views._remembered) == VIEWS_MAX
