"""Which namespace projects are in: known by its UID, asked for until it is known."""

import pytest
import trio

from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.namespace import Namespace
from rdev.domain.errors import ErrorCode, RdevError
from tests.adapters.kubernetes.conftest import TestCluster, Until, config_of
from tests.fakes.api_server import NAMESPACE, NAMESPACE_UID, FakeApiServer, Fault


async def test_a_namespace_is_known_by_its_uid(cluster: TestCluster) -> None:
    one, two = Namespace(cluster.api), Namespace(cluster.api)
    with pytest.raises(RdevError) as caught:
        one.uid()
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    await one.check()
    await two.check()
    assert one.is_known
    assert one.uid() == two.uid()


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
async def test_it_is_asked_for_until_it_is_known(
    fake: FakeApiServer, status: int, eventually: Until
) -> None:
    fake.faults.append(Fault(status, path_end=f"/{NAMESPACE}", times=3))
    async with connect(config_of(fake)) as api, trio.open_nursery() as nursery:
        namespace = Namespace(api)
        await nursery.start(namespace.run)
        await eventually(lambda: namespace.is_known, "it is known")
        assert namespace.uid() == NAMESPACE_UID
        namespace.stop()


async def test_rights_that_we_lack_are_nobodys_fault_but_ours(fake: FakeApiServer) -> None:
    """404 and 403 of the namespace are no NOT_FOUND and no FORBIDDEN of a client."""
    async with connect(config_of(fake)) as api:
        namespace = Namespace(api)
        for status in (403, 404):
            fake.faults.append(Fault(status, path_end=f"/{NAMESPACE}", message="not for you"))
            with pytest.raises(RdevError, match=f"{status}: not for you") as caught:
                await namespace.check()
            assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE


async def test_a_namespace_that_was_made_anew_is_another_place(fake: FakeApiServer) -> None:
    async with connect(config_of(fake)) as api:
        namespace = Namespace(api)
        await namespace.check()
        anew = {"metadata": {"name": NAMESPACE, "uid": "another"}}
        fake.put("namespaces", anew, namespace="")
        with pytest.raises(RdevError, match="made anew"):
            await namespace.check()
        assert not namespace.is_known
        assert namespace.uid() == NAMESPACE_UID
