"""Whatever PostgreSQL committed was announced: submissions and cancels, cancelled anywhere."""

import random
from collections.abc import Awaitable, Callable
from itertools import count
from uuid import UUID

import trio

from rdev.domain.commands import Kind, Priority, Retry
from rdev.domain.errors import RdevError
from rdev.domain.ids import CommandId, command_id
from rdev.domain.requests import Common
from rdev.services.commands import Commands
from rdev.services.stream import Fanout
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, Pools, World
from tests.services.scripted import gate_of

ROUNDS = 400
COMMON = Common(
    env={},
    cwd="",
    stdin=b"",
    timeout_s=60,
    priority=Priority.NORMAL,
    expires_in_s=None,
    retry=Retry.NEVER,
)


async def _cancelled_at_random(do: Callable[[], Awaitable[object]], chance: random.Random) -> None:
    """Cancelled before the first byte, anywhere between, or after the last."""
    with trio.move_on_after(chance.choice((0.0, chance.uniform(0, 0.004), 1.0))):
        try:
            await do()
        except RdevError:
            return


async def test_a_submission_is_stored_and_announced_or_neither(real: World, pools: Pools) -> None:
    await real.project()
    chance = random.Random(7)
    told: list[CommandId] = []
    drawn: list[CommandId] = []
    numbers = count(1)

    def new_uuid() -> UUID:
        uuid = UUID(int=next(numbers))
        drawn.append(command_id(uuid))
        return uuid

    commands = Commands(
        store=real.commands,
        log=real.output,
        gate=gate_of(real.depths),
        fanout=Fanout(log=real.output, tell_replicas=told.append),
        wake_workers=lambda _: told.append(drawn[-1]),
        reach_holder=lambda _: None,
        new_uuid=new_uuid,
    )

    async def submit() -> None:
        await commands.submit(ACTOR, PROJECT, Kind.SHELL, argv=("true",), common=COMMON)

    for _ in range(ROUNDS):
        await _cancelled_at_random(submit, chance)
    async with pools.requests.connection() as connection:
        rows = await (await connection.execute("select id from commands")).fetchall()
    stored = {command_id(row[0]) for row in rows}
    assert len(drawn) == ROUNDS
    assert stored - set(told) == set()
    assert set(told) - stored == set()


async def test_a_cancel_is_stored_and_announced_or_neither(real: World, pools: Pools) -> None:
    await real.project()
    chance = random.Random(8)
    told: list[CommandId] = []
    commands = Commands(
        store=real.commands,
        log=real.output,
        gate=gate_of(real.depths),
        fanout=Fanout(log=real.output, tell_replicas=told.append),
        wake_workers=lambda _: None,
        reach_holder=lambda _: None,
        new_uuid=lambda: UUID(int=0),
    )
    for _ in range(150):
        command = await real.queued()

        async def cancel(command: CommandId = command) -> None:
            await commands.cancel(ACTOR, command)

        await _cancelled_at_random(cancel, chance)
        found = await real.commands.get(command)
        assert found is not None
        assert found.status.is_terminal == (command in told)
