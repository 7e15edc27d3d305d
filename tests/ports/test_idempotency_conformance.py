"""Idempotency keys at the insert of a command, on the fake and on PostgreSQL."""

from dataclasses import replace

import pytest
import trio
from psycopg.rows import TupleRow

from rdev.adapters.postgres.connection import TrioConnection, open_connection
from rdev.domain.commands import NewCommand, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import IDEMPOTENCY_S, Idempotency
from rdev.domain.ids import CommandId, command_uuid
from rdev.ports.commands import Accepted
from tests.fakes.store import ACTOR
from tests.ports.conftest import PROJECT, Pools, World

KEY = Idempotency(key_id="key_admin", key="once", digest=b"one request")
OTHER_REQUEST = replace(KEY, digest=b"another")
OTHER_CALLER = replace(KEY, key_id="key_other")


def keyed(world: World, project: str = PROJECT, idempotency: Idempotency = KEY) -> NewCommand:
    return replace(world.new(project), idempotency=idempotency)


async def stored(world: World) -> list[CommandId]:
    found = await world.commands.list_for_project(
        PROJECT, status=None, kind=None, before=None, limit=100
    )
    return [command.id for command in found.items]


async def test_the_first_request_makes_the_command(world: World) -> None:
    await world.project()
    new = keyed(world)
    accepted = await world.commands.insert(new)
    assert (accepted.command.id, accepted.is_replay) == (new.id, False)
    assert accepted.queue_position == 1


async def test_a_repeat_makes_nothing_and_tells_what_was_made(world: World) -> None:
    await world.project()
    first = await world.commands.insert(keyed(world))
    repeat = keyed(world)
    again = await world.commands.insert(repeat)
    assert again == replace(first, is_replay=True)
    assert await world.commands.replay(KEY) == again
    assert await stored(world) == [first.command.id]
    assert await world.commands.get(repeat.id) is None


async def test_a_repeat_tells_the_present_state(world: World) -> None:
    await world.project()
    first = await world.commands.insert(keyed(world))
    await world.commands.request_cancel(first.command.id, ACTOR)
    again = await world.commands.insert(keyed(world))
    assert again.command == await world.commands.get(first.command.id)
    assert (again.command.status, again.queue_position) == (Status.CANCELLED, None)


async def test_another_request_with_the_key_is_a_mismatch(world: World) -> None:
    await world.project()
    first = await world.commands.insert(keyed(world))
    for attempt in (
        world.commands.insert(keyed(world, idempotency=OTHER_REQUEST)),
        world.commands.replay(OTHER_REQUEST),
    ):
        with pytest.raises(RdevError) as caught:
            await attempt
        assert caught.value.code is ErrorCode.IDEMPOTENCY_MISMATCH
    assert await stored(world) == [first.command.id]


async def test_the_same_key_of_another_caller_is_another_key(world: World) -> None:
    await world.project()
    await world.commands.insert(keyed(world))
    assert await world.commands.replay(OTHER_CALLER) is None
    other = await world.commands.insert(keyed(world, idempotency=OTHER_CALLER))
    assert not other.is_replay
    assert len(await stored(world)) == 2


async def test_requests_without_a_key_are_never_repeats(world: World) -> None:
    await world.project()
    for _ in range(2):
        assert not (await world.commands.insert(world.new())).is_replay
    assert len(await stored(world)) == 2


async def test_a_key_without_a_command_is_not_kept(world: World) -> None:
    """The project was not there: the request may be repeated when it is."""
    with pytest.raises(RdevError) as caught:
        await world.commands.insert(keyed(world))
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert await world.commands.replay(KEY) is None
    await world.project()
    assert not (await world.commands.insert(keyed(world))).is_replay


async def test_a_key_that_is_too_old_is_used_anew(world: World) -> None:
    await world.project()
    first = await world.commands.insert(keyed(world))
    await world.age(IDEMPOTENCY_S - 60)
    assert (await world.commands.insert(keyed(world))).command.id == first.command.id
    await world.age(61)
    assert await world.commands.replay(KEY) is None
    second = await world.commands.insert(keyed(world, idempotency=OTHER_REQUEST))
    assert not second.is_replay
    again = await world.commands.insert(keyed(world, idempotency=OTHER_REQUEST))
    assert (again.command.id, again.is_replay) == (second.command.id, True)


# Only PostgreSQL can show these.


async def test_fifty_at_once_with_one_key_make_one_command(real: World) -> None:
    await real.project()
    accepted: list[Accepted] = []

    async def submit() -> None:
        accepted.append(await real.commands.insert(keyed(real)))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(submit)
    assert len(await stored(real)) == 1
    assert len({one.command.id for one in accepted}) == 1
    assert sum(not one.is_replay for one in accepted) == 1


@pytest.mark.slow
async def test_a_request_waits_two_seconds_for_another_with_its_key(
    real: World, pools: Pools
) -> None:
    """Until that one commits, its command cannot be told; when it takes too long: come again."""
    await real.project()
    other = await real.queued()
    connection = await open_connection(pools.settings)
    try:
        async with connection.transaction(force_rollback=True):
            await _keep_by_hand(connection, other)
            with pytest.raises(RdevError) as caught:
                await real.commands.insert(keyed(real))
    finally:
        await connection.close()
    assert caught.value.code is ErrorCode.CONFLICT
    assert caught.value.retry_after_s is not None
    # It was rolled back: nothing stands in the way any more, and nobody else waits that briefly.
    assert not (await real.commands.insert(keyed(real))).is_replay
    async with pools.requests.connection() as one:
        row = await (await one.execute("show lock_timeout")).fetchone()
        assert row == ("0",)


async def test_a_request_that_waited_finds_what_the_other_made(real: World, pools: Pools) -> None:
    await real.project()
    other = await real.queued()
    connection = await open_connection(pools.settings)
    accepted: list[Accepted] = []

    async def submit() -> None:
        accepted.append(await real.commands.insert(keyed(real)))

    try:
        async with trio.open_nursery() as nursery, connection.transaction():
            await _keep_by_hand(connection, other)
            nursery.start_soon(submit)
            await _until_waiting(pools)
    finally:
        await connection.close()
    assert [(one.command.id, one.is_replay) for one in accepted] == [(other, True)]


async def test_the_key_of_a_command_that_is_gone_is_gone(real: World, pools: Pools) -> None:
    """It is not run again: the client had its answer once."""
    await real.project()
    first = await real.commands.insert(keyed(real))
    async with pools.requests.connection() as connection:
        uuid = command_uuid(first.command.id)
        await connection.execute("delete from commands where id = %s", (uuid,))
    with pytest.raises(RdevError) as caught:
        await real.commands.insert(keyed(real))
    assert caught.value.code is ErrorCode.GONE
    assert await stored(real) == []


async def _keep_by_hand(connection: TrioConnection[TupleRow], made: CommandId) -> None:
    """As another server's insert does, in a transaction that is held open."""
    await connection.execute(
        "insert into idempotency_keys (key_id, key, digest, made) values (%s, %s, %s, %s)",
        (KEY.key_id, KEY.key, KEY.digest, made),
    )


async def _until_waiting(pools: Pools) -> None:
    """Until a statement waits for another transaction's end."""
    with trio.fail_after(60):
        async with pools.appends.connection() as connection:
            while True:
                cursor = await connection.execute(
                    "select count(*) from pg_locks where locktype = 'transactionid' and not granted"
                )
                if await cursor.fetchone() != (0,):
                    return
                await trio.sleep(0.01)
