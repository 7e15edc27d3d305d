"""Readers that are written to together see what each of them would see alone."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rdev.services.stream import Frames, Subscription
from rdev.services.stream_group import MEMBERS_MAX
from tests.services.hub import COMMAND, Client, Hub

CLIENTS = 2 * MEMBERS_MAX + 7


@pytest.fixture
def hub() -> Hub:
    return Hub()


@contextmanager
def followed(
    hub: Hub, nursery: trio.Nursery, clients: list[Client]
) -> Iterator[tuple[list[Subscription], list[trio.CancelScope]]]:
    """All of them subscribed and following, each within a scope of its own."""
    scopes = [trio.CancelScope() for _ in clients]

    async def follow(client: Client, reader: Subscription, scope: trio.CancelScope) -> None:
        with scope:
            await client.follow(reader)

    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(hub.fanout.subscribe(COMMAND, after=0)) for _ in clients]
        for client, reader, scope in zip(clients, readers, scopes, strict=True):
            nursery.start_soon(follow, client, reader, scope)
        yield readers, scopes


def group_sizes(hub: Hub) -> list[int]:
    return [len(group.members) for group in hub.fanout._topics[COMMAND].groups]


async def test_a_group_has_so_many_members_and_no_more(hub: Hub, nursery: trio.Nursery) -> None:
    clients = [Client() for _ in range(CLIENTS)]
    await nursery.start(hub.fanout.run)
    with followed(hub, nursery, clients) as (readers, _):
        await wait_all_tasks_blocked()
        for _ in range(3):
            hub.publish(2)
            await wait_all_tasks_blocked()
        assert group_sizes(hub) == [MEMBERS_MAX, MEMBERS_MAX, 7]
        assert all(client.seen == hub.events for client in clients)
        assert {reader.position for reader in readers} == {6}


async def test_who_leaves_its_group_is_written_to_no_more(hub: Hub, nursery: trio.Nursery) -> None:
    clients = [Client() for _ in range(CLIENTS)]
    await nursery.start(hub.fanout.run)
    with followed(hub, nursery, clients) as (readers, scopes):
        await wait_all_tasks_blocked()
        hub.publish(2)
        await wait_all_tasks_blocked()
        for scope in scopes[::2]:
            scope.cancel()
        await wait_all_tasks_blocked()
        hub.publish(3)
        await wait_all_tasks_blocked()
    assert all(len(client.seen) == 2 for client in clients[::2])
    assert all(client.seen == hub.events for client in clients[1::2])
    assert {reader.position for reader in readers[::2]} == {2}
    assert {reader.position for reader in readers[1::2]} == {5}


async def test_who_leaves_between_two_groups_stands_where_its_own_was_given(
    hub: Hub, nursery: trio.Nursery
) -> None:
    """While one group is written to, a reader of the one before leaves, and one of the next."""
    clients = [Client() for _ in range(CLIENTS)]
    await nursery.start(hub.fanout.run)
    with followed(hub, nursery, clients) as (readers, _):
        await wait_all_tasks_blocked()
        hub.publish(2)
        await wait_all_tasks_blocked()
        before, middle, behind = hub.fanout._topics[COMMAND].groups
        client = clients[readers.index(next(iter(middle.members)))]
        leaving = [next(iter(group.members)) for group in (before, behind)]
        take = client.offer

        def offer(frames: Frames) -> bool:
            for reader in leaving:
                reader.wake()
            return take(frames)

        client.offer = offer  # type: ignore[method-assign]
        middle.add(next(iter(middle.members)), client)  # bound anew
        hub.publish(1)
        await wait_all_tasks_blocked()
        hub.publish(final=True)
        await wait_all_tasks_blocked()
    assert all(client.seen == hub.events for client in clients)


@pytest.mark.parametrize("final", [False, True])
async def test_a_slow_member_leaves_its_group_and_loses_nothing(
    hub: Hub, nursery: trio.Nursery, final: bool
) -> None:
    """Also where it is the end that it does not take at once."""
    clients = [Client() for _ in range(9)]
    clients[4].room, clients[4].pause_s = 1, 5.0
    await nursery.start(hub.fanout.run)
    with followed(hub, nursery, clients):
        await wait_all_tasks_blocked()
        hub.publish(1)
        await wait_all_tasks_blocked()
        hub.publish(3, final=final)
        await wait_all_tasks_blocked()
        assert group_sizes(hub) == ([] if final else [8])
        assert len(clients[4].seen) == 2
        await trio.sleep(6)
        if not final:
            hub.publish(final=True)
        await trio.sleep(6)
    assert all(client.seen == hub.events for client in clients)


async def test_groups_that_have_become_small_are_put_together(
    hub: Hub, nursery: trio.Nursery
) -> None:
    clients = [Client() for _ in range(CLIENTS)]
    await nursery.start(hub.fanout.run)
    with followed(hub, nursery, clients) as (_, scopes):
        await wait_all_tasks_blocked()
        hub.publish()
        await wait_all_tasks_blocked()
        for place, scope in enumerate(scopes):
            if place % 8:
                scope.cancel()
        await trio.sleep(1.5)
        hub.publish(2)
        await wait_all_tasks_blocked()
        assert group_sizes(hub) == [-(-CLIENTS // 8)]
    assert all(client.seen == hub.events for client in clients[::8])
