"""The listening connection: hears, notices silence, comes back and says so."""

import pytest
import trio
import trio.testing

from rdev.adapters.postgres import listen as listen_module
from rdev.adapters.postgres.connection import ConnectionSettings, open_connection
from rdev.adapters.postgres.listen import Listener, notify


@pytest.fixture
async def sender(database_dsn):
    async with await open_connection(ConnectionSettings(dsn=database_dsn)) as connection:
        yield connection


class Ears:
    """A listener with what it heard."""

    def __init__(self, dsn: str, **intervals: float) -> None:
        self.heard: list[tuple[str, str]] = []
        self.connects = 0
        self.listener = Listener(
            ConnectionSettings(dsn=dsn, application_name="ears"),
            {
                "a": lambda payload: self.heard.append(("a", payload)),
                "b": lambda payload: self.heard.append(("b", payload)),
            },
            on_connect=self.connected,
            **intervals,
        )

    def connected(self) -> None:
        self.connects += 1

    async def until(self, condition) -> None:
        with trio.fail_after(30):
            while not condition():
                await trio.sleep(0.005)


async def test_notifications_reach_the_callback_of_their_channel_in_order(
    database_dsn, sender, nursery
):
    ears = Ears(database_dsn)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: ears.connects == 1)
    for n in range(50):
        await notify(sender, "a" if n % 2 else "b", str(n))
    await ears.until(lambda: len(ears.heard) == 50)
    assert ears.heard == [("a" if n % 2 else "b", str(n)) for n in range(50)]
    assert ears.listener.statistics().notifications == 50


async def test_notifications_sent_during_pings_are_not_lost(database_dsn, sender, nursery):
    ears = Ears(database_dsn, ping_every_s=0.0, pong_within_s=30)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: ears.connects == 1)
    for n in range(300):
        await notify(sender, "a", str(n))
    await ears.until(lambda: len(ears.heard) >= 300)
    assert [int(payload) for _, payload in ears.heard] == list(range(300))
    assert ears.listener.statistics().pongs >= 10


async def test_a_notification_of_a_transaction_comes_at_commit(database_dsn, sender, nursery):
    ears = Ears(database_dsn)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: ears.connects == 1)
    async with sender.transaction(force_rollback=True):
        await notify(sender, "a", "rolled back")
    async with sender.transaction():
        await notify(sender, "a", "committed")
    await ears.until(lambda: ears.heard)
    assert ears.heard == [("a", "committed")]


async def test_a_killed_backend_is_replaced_and_said_so(database_dsn, sender, nursery):
    ears = Ears(database_dsn)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: ears.connects == 1)
    await sender.execute(
        "select pg_terminate_backend(pid, 30000) from pg_stat_activity"
        " where application_name = 'ears/listen' and datname = current_database()"
    )
    await ears.until(lambda: ears.connects == 2)
    await notify(sender, "a", "after")
    await ears.until(lambda: ears.heard == [("a", "after")])
    statistics = ears.listener.statistics()
    assert (statistics.connected, statistics.connections, statistics.losses) == (True, 2, 1)


@pytest.mark.slow
async def test_a_half_open_connection_is_noticed_and_replaced(proxy, sender, nursery):
    ears = Ears(proxy.dsn, ping_every_s=0.05, pong_within_s=1.0)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: ears.listener.statistics().pongs >= 2)
    proxy.open_again()  # what is open now goes silent, nothing is closed
    await ears.until(lambda: ears.connects >= 2)
    await notify(sender, "a", "after")
    await ears.until(lambda: ears.heard)
    assert ears.listener.statistics().losses >= 1


async def test_a_connection_that_answers_but_does_not_hear_is_replaced(
    database_dsn, nursery, monkeypatch
):
    async def into_the_void(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    ears = Ears(database_dsn, ping_every_s=0.01, pong_within_s=0.2)
    monkeypatch.setattr(listen_module, "notify", into_the_void)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: ears.connects >= 2)


async def test_a_listener_started_without_a_database_connects_when_it_comes(proxy, sender, nursery):
    proxy.refusing = True
    ears = Ears(proxy.dsn)
    await nursery.start(ears.listener.run)
    await ears.until(lambda: proxy.accepted >= 2)
    assert ears.connects == 0
    assert not ears.listener.statistics().connected
    proxy.refusing = False
    await ears.until(lambda: ears.connects == 1)


async def test_stop_ends_the_run_and_the_connection(database_dsn, sender):
    ears = Ears(database_dsn)
    async with trio.open_nursery() as nursery:
        await nursery.start(ears.listener.run)
        await ears.until(lambda: ears.connects == 1)
        ears.listener.stop()
        ears.listener.stop()
    assert not ears.listener.statistics().connected


async def test_a_callback_that_raises_takes_the_listener_down(database_dsn, sender):
    def broken(_: str) -> None:
        raise ZeroDivisionError

    connected = trio.Event()
    listener = Listener(
        ConnectionSettings(dsn=database_dsn), {"a": broken}, on_connect=connected.set
    )
    with pytest.RaisesGroup(ZeroDivisionError):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            await connected.wait()
            await notify(sender, "a", "x")
