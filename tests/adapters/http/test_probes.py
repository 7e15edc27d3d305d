"""The three probes: the guide's bodies, and what bounds them."""

import pytest
import trio

from rdev.adapters.http import probes
from rdev.adapters.http.probes import Readiness, Status, probe_routes
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.domain.errors import ErrorCode, RdevError

DEADLINE_S = 30


async def works() -> None:
    """A check that finds nothing wrong."""


async def refused() -> None:
    raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "connection refused")


async def hangs() -> None:
    await trio.sleep_forever()


async def test_the_probes_have_the_bodies_of_the_guide(serve):
    telemetry = PrometheusTelemetry()
    readiness = Readiness(checks={"database": works, "kubernetes": works})
    site = await serve(probe_routes(readiness=readiness, render_metrics=telemetry.render))

    health = await site.request("GET", "/health", key=None)
    ready = await site.request("GET", "/ready", key=None)
    metrics = await site.request("GET", "/metrics", key=None)
    open_metrics = await site.request(
        "GET", "/metrics", key=None, accept="application/openmetrics-text; version=1.0.0"
    )

    assert (health.status, health.json()) == (200, {"status": "healthy"})
    assert (ready.status, ready.json()["status"]) == (200, "healthy")
    assert list(ready.json()["checks"]) == ["database", "kubernetes"]
    for check in ready.json()["checks"].values():
        assert check.keys() == {"status", "latency_ms"}
        assert check["status"] == "healthy"
        assert isinstance(check["latency_ms"], int)
    assert b"# TYPE http_requests_total counter" in metrics.body
    assert metrics.header("content-type").startswith("text/plain")
    assert open_metrics.body.endswith(b"# EOF\n")
    assert open_metrics.header("content-type").startswith("application/openmetrics-text")


async def test_not_ready_is_503_and_says_why(serve):
    readiness = Readiness(checks={"database": refused, "migrations": works})
    site = await serve(
        probe_routes(readiness=readiness, render_metrics=PrometheusTelemetry().render)
    )

    ready = await site.request("GET", "/ready", key=None)
    health = await site.request("GET", "/health", key=None)

    assert (ready.status, ready.json()["status"]) == (503, "unhealthy")
    assert ready.json()["checks"]["database"]["message"] == "connection refused"
    assert ready.json()["checks"]["migrations"]["status"] == "healthy"
    assert health.status == 200


async def test_draining_is_said_although_all_is_well(serve):
    readiness = Readiness(checks={"database": works})
    site = await serve(
        probe_routes(readiness=readiness, render_metrics=PrometheusTelemetry().render)
    )
    readiness.drain()

    ready = await site.request("GET", "/ready", key=None)

    assert (ready.status, ready.json()["status"]) == (503, "draining")
    assert ready.json()["checks"]["database"]["status"] == "healthy"


async def test_checks_run_together_and_one_that_hangs_is_given_up(autojump_clock):
    readiness = Readiness(checks={"a": hangs, "b": hangs, "c": works})

    report = await readiness.report()

    assert trio.current_time() == pytest.approx(1.0)
    assert report.status is Status.UNHEALTHY
    assert report.checks["a"].message == "no answer within 1 s"
    assert report.checks["a"].latency_ms == 1000
    assert report.checks["c"].status is Status.HEALTHY


async def test_many_probes_cost_one_check_a_second(autojump_clock):
    ran = []

    async def counted() -> None:
        ran.append(trio.current_time())
        await trio.sleep(0.5)

    readiness = Readiness(checks={"a": counted})
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(readiness.report)
    assert ran == [0]

    await trio.sleep(1)
    await readiness.report()
    assert len(ran) == 2


async def test_a_probe_that_leaves_does_not_spoil_the_next(autojump_clock):
    release = trio.Event()
    readiness = Readiness(checks={"a": release.wait})
    with trio.move_on_after(0.1):
        await readiness.report()
    release.set()

    assert (await readiness.report()).status is Status.HEALTHY


async def test_health_is_answered_while_every_check_hangs(serve, monkeypatch):
    """By construction: checks go on only when health was answered, so it waits for none."""
    monkeypatch.setattr(probes, "_CHECK_TIMEOUT_S", 3_600)
    asked, release = trio.Event(), trio.Event()

    async def held() -> None:
        asked.set()
        await release.wait()

    readiness = Readiness(checks={"database": held})
    routes = probe_routes(readiness=readiness, render_metrics=PrometheusTelemetry().render)
    site = await serve(routes)
    answered = []

    async def ask_readiness() -> None:
        answered.append(await site.request("GET", "/ready", key=None))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as asking:
            for _ in range(10):
                asking.start_soon(ask_readiness)
            await asked.wait()
            health = await site.request("GET", "/health", key=None)
            assert (health.status, health.json()) == (200, {"status": "healthy"})
            assert answered == []
            release.set()
    assert [ready.status for ready in answered] == [200] * 10
