"""A revocation on one server, seen on another: by its notification, and without it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGINT

import httpx2
import pytest
import trio

from rdev.services.cached import TTL_S
from tests.adapters.postgres.proxy import TcpProxy
from tests.app.server import DEADLINE_S, Api, Server, open_api, open_state

# What a loaded machine may add to the bound.
SLACK_S = 5.0


class DeafProxy(TcpProxy):
    """Passes everything but what is told of keys, once it is deaf: the listener hears its own pings
    and believes that all is well."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.is_deaf = False
        self.swallowed = 0

    async def _pump(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        heard: trio.Event,
        said: bytearray,
    ) -> None:
        try:
            async for data in source:
                if self.is_deaf and b"rdev_keys\0" in data:
                    self.swallowed += 1
                    continue
                await sink.send_all(data)
            await sink.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await source.aclose()


@asynccontextmanager
async def started(place: Path, **settings: str) -> AsyncIterator[Server]:
    """A server whose database is reached through this process: so nothing here may block."""
    with open_state(place, RDEV_DRAIN_DELAY_S="0", **settings) as server:
        await trio.to_thread.run_sync(server.start)
        try:
            yield server
        finally:
            await trio.to_thread.run_sync(server.end, SIGINT)


async def status_with(api: Api, key: str) -> httpx2.Response:
    return await api.http.get("/projects", headers={"Authorization": f"Bearer {key}"})


async def seconds_until_refused(one: Api, two: Api) -> float:
    """Revoke at one what the other has just been asked about; until it is refused there."""
    made = await one.post("/keys", {"name": "k", "scopes": ["projects:read"]})
    key = made.json()["data"]
    assert (await status_with(two, key["key"])).status_code == 200
    assert (await one.http.delete(f"/keys/{key['id']}")).status_code == 200
    began_s = trio.current_time()
    with trio.fail_after(DEADLINE_S):
        while (answer := await status_with(two, key["key"])).status_code == 200:
            await trio.sleep(0.005)
    assert answer.json()["error"]["code"] == "KEY_REVOKED"
    return trio.current_time() - began_s


@pytest.mark.slow
async def test_a_revocation_reaches_the_other_server(
    quick_place: Path, migrated_dsn: str, nursery: trio.Nursery
) -> None:
    """Heard: well before the memory would have ended. Not heard: when it ends."""
    proxy = DeafProxy(migrated_dsn)
    await nursery.start(proxy.run)
    async with (
        started(quick_place, RDEV_DATABASE_DSN=migrated_dsn) as first,
        started(quick_place, RDEV_DATABASE_DSN=proxy.dsn) as second,
        open_api(first) as one,
        open_api(second) as two,
    ):
        heard_s = [await seconds_until_refused(one, two) for _ in range(5)]
        assert min(heard_s) < 1.0
        assert max(heard_s) < TTL_S - 1.0
        proxy.is_deaf = True
        unheard_s = await seconds_until_refused(one, two)
        assert proxy.swallowed > 0
        assert 1.0 < unheard_s <= TTL_S + SLACK_S
        print(f"\nheard after {sorted(heard_s)[2] * 1000:.0f} ms, unheard after {unheard_s:.2f} s")
    nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_without_the_database_a_key_is_unknowable_and_never_wrong(
    quick_place: Path, migrated_dsn: str, nursery: trio.Nursery
) -> None:
    proxy = TcpProxy(migrated_dsn)
    await nursery.start(proxy.run)
    # Without a limit: a write that cannot be counted is refused too.
    settings = {"RDEV_DATABASE_DSN": proxy.dsn, "RDEV_RATE_LIMIT": "off"}
    async with started(quick_place, **settings) as server, open_api(server) as api:
        made = await api.post("/keys", {"name": "k", "scopes": ["keys:write"]})
        key = made.json()["data"]["key"]
        # A body that is refused before anything is asked of the database.
        headers = {"Authorization": f"Bearer {key}"}

        async def ask() -> int:
            return (await api.http.post("/keys", json={}, headers=headers)).status_code

        assert await ask() == 400
        proxy.black_hole()
        proxy.refusing = True
        assert await ask() == 400  # it is remembered
        seen = {400}
        with trio.fail_after(TTL_S + 2 * DEADLINE_S):
            while 503 not in seen:
                seen.add(await ask())
                await trio.sleep(0.1)
        assert seen == {400, 503}
        admin = await api.http.post("/keys", json={})
        assert admin.status_code == 400  # the bootstrap key needs no database
        proxy.refusing = False
        proxy.open_again()
        with trio.fail_after(2 * DEADLINE_S):
            while (status := await ask()) != 400:
                assert status == 503
                await trio.sleep(0.1)
    nursery.cancel_scope.cancel()
