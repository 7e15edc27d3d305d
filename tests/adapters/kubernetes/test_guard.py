"""What opens the breaker around the API server, and what never does."""

from collections.abc import AsyncIterator

import pytest
import trio

from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.kubernetes.connection import ApiServer, connect
from rdev.adapters.kubernetes.exec import PodExecs, PodTarget
from rdev.adapters.kubernetes.namespace import Namespace
from rdev.domain.breaker import BreakerReason, BreakerSettings, BreakerState
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.services.breaker import CircuitBreaker
from tests.adapters.execution.pods import POD, pod
from tests.adapters.kubernetes.conftest import config_of
from tests.fakes.api_server import NAMESPACE, FakeApiServer, Fault
from tests.fakes.cuts import CuttingProxy

PROJECT = ProjectId("demo")


class Told:
    """What the breaker tells."""

    def __init__(self) -> None:
        self.changes: list[tuple[BreakerState, BreakerReason]] = []

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        assert breaker == "kubernetes"
        self.changes.append((state, reason))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def breaker(told: Told) -> CircuitBreaker:
    # It stays open for longer than a test: only a sign ends that.
    settings = BreakerSettings(calls_min=4, open_first_s=600, open_most_s=600, permits=1)
    return CircuitBreaker(name="kubernetes", telemetry=told, settings=settings)


@pytest.fixture
async def proxy(fake: FakeApiServer) -> AsyncIterator[CuttingProxy]:
    fake.put("pods", pod())
    async with trio.open_nursery() as nursery:
        proxy = CuttingProxy(fake.port)
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()


@pytest.fixture
async def api(
    fake: FakeApiServer, proxy: CuttingProxy, breaker: CircuitBreaker
) -> AsyncIterator[ApiServer]:
    async with connect(config_of(fake, proxy.port), breaker=breaker) as api:
        yield api


async def exec_in(api: ApiServer, *, pod_name: str = POD) -> RdevError | None:
    """One exec; the error it met."""
    execs = PodExecs(
        api,
        lambda _: PodTarget(pod=pod_name, container="project"),
        subprotocols=SUBPROTOCOLS,
    )
    try:
        async with execs.open(PROJECT, ["true"]):
            return None
    except RdevError as error:
        return error


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_an_api_server_that_is_overloaded_is_left_alone(
    fake: FakeApiServer, api: ApiServer, breaker: CircuitBreaker, told: Told, status: int
) -> None:
    fake.faults.append(Fault(status, method="EXEC", path_end="/exec", times=4))
    for _ in range(4):
        assert await exec_in(api) is not None
    asked = len(fake.execs.seen) + len(fake.requests)
    refused = await exec_in(api)
    assert refused is not None
    assert refused.code is ErrorCode.SERVICE_UNAVAILABLE
    assert refused.retry_after_s is not None
    assert len(fake.execs.seen) + len(fake.requests) == asked
    assert told.changes == [(BreakerState.OPEN, BreakerReason.FAILURES)]
    assert breaker.statistics().refused == 1


async def test_an_api_server_that_is_not_there_is_left_alone(
    proxy: CuttingProxy, api: ApiServer, breaker: CircuitBreaker
) -> None:
    proxy.is_refusing = True
    for _ in range(4):
        assert await exec_in(api) is not None
    assert breaker.refuses


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 422, 500])
async def test_no_pod_no_node_and_no_right_opens_it(
    fake: FakeApiServer, api: ApiServer, breaker: CircuitBreaker, status: int
) -> None:
    """500 is what the API server answers where a node does not: the others' execs go on."""
    fake.faults.append(Fault(status, method="EXEC", path_end="/exec", times=20))
    for _ in range(8):
        assert await exec_in(api) is not None
    assert not breaker.refuses
    assert breaker.statistics().failures == 0


async def test_a_pod_that_is_gone_opens_nothing(api: ApiServer, breaker: CircuitBreaker) -> None:
    for _ in range(8):
        error = await exec_in(api, pod_name="no-such-pod")
        assert error is not None
        assert error.code is ErrorCode.NOT_FOUND
    assert not breaker.refuses


async def test_a_failing_command_opens_nothing(api: ApiServer, breaker: CircuitBreaker) -> None:
    execs = PodExecs(
        api, lambda _: PodTarget(pod=POD, container="project"), subprotocols=SUBPROTOCOLS
    )
    for argv in (["false"], ["no-such-program"]) * 4:
        async with execs.open(PROJECT, argv) as socket:
            while await socket.receive() is not None:
                pass
    assert breaker.statistics().failures == 0


async def test_a_check_is_never_refused_and_ends_the_pause(
    fake: FakeApiServer, proxy: CuttingProxy, api: ApiServer, breaker: CircuitBreaker, told: Told
) -> None:
    proxy.is_refusing = True
    for _ in range(4):
        await exec_in(api)
    with pytest.raises(RdevError, match="cannot be reached"):
        await Namespace(api).check()
    assert breaker.refuses
    proxy.is_refusing = False
    await Namespace(api).check()
    assert not breaker.refuses
    assert await exec_in(api) is None
    assert told.changes[-1] == (BreakerState.CLOSED, BreakerReason.RECOVERED)


async def test_probes_ask_only_where_nothing_was_heard_lately(
    fake: FakeApiServer, proxy: CuttingProxy, api: ApiServer
) -> None:
    namespace, path = Namespace(api), ("GET", f"/api/v1/namespaces/{NAMESPACE}")
    for _ in range(5):
        await namespace.check_lately()
    assert fake.requests.count(path) == 1
    # An exec is a sign, and what failed since then is another.
    proxy.is_refusing = True
    proxy.cut_all()
    assert await exec_in(api) is not None
    with pytest.raises(RdevError, match="cannot be reached"):
        await namespace.check_lately()
    proxy.is_refusing = False
    await namespace.check_lately()
    assert fake.requests.count(path) == 2
    # So is an answer that is none.
    fake.faults.append(Fault(503, "POST"))
    await api.http.post(f"/api/v1/namespaces/{NAMESPACE}/pods", json={})
    await namespace.check_lately()
    assert fake.requests.count(path) == 3
