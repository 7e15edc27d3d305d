"""The watch over a namespace's pods, and what an API server may do to it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId
from rdev.domain.pods import PodTrouble, health_of
from rdev.domain.projects import ProjectStatus
from tests.adapters.execution.observing import until
from tests.adapters.execution.pods import POD, pod
from tests.adapters.kubernetes.conftest import config_of
from tests.fakes.api_server import FakeApiServer, Fault, running
from tests.fakes.cuts import CuttingProxy

DEMO = ProjectId("demo")


@dataclass
class Watched:
    watch: PodWatch
    proxy: CuttingProxy
    changes: list[ProjectId] = field(default_factory=list)

    def names(self) -> dict[str, str]:
        return {project: pod.name for project, pod in self.watch.projects().items()}


@asynccontextmanager
async def watching(
    fake: FakeApiServer, *, is_current: bool = True, **rest: Any
) -> AsyncIterator[Watched]:
    async with trio.open_nursery() as nursery:
        proxy = CuttingProxy(fake.port)
        await nursery.start(proxy.run)
        async with connect(config_of(fake, proxy.port)) as api:
            changes: list[ProjectId] = []
            watch = PodWatch(api, changed=changes.append, **rest)
            await nursery.start(watch.run)
            if is_current:
                await until(lambda: watch.is_current, "the watch hears")
            yield Watched(watch=watch, proxy=proxy, changes=changes)
            watch.stop()
        nursery.cancel_scope.cancel()


async def test_pods_come_change_and_go(fake: FakeApiServer) -> None:
    fake.put("pods", pod())
    async with watching(fake) as seen:
        assert seen.names() == {"demo": POD}
        fake.put("pods", pod("other-0", "other"))
        await until(lambda: "other" in seen.names(), "the new one is seen")
        waits = {"waiting": {"reason": "ImagePullBackOff"}}
        fake.patch_status(POD, containerStatuses=[running("project", ready=False, state=waits)])
        await until(
            lambda: health_of(seen.watch.pod_of(DEMO)).trouble is PodTrouble.IMAGE_PULL,
            "the change is seen",
        )
        fake.drop("pods", POD)
        await until(lambda: seen.names() == {"other": "other-0"}, "it is gone")
        assert seen.changes == ["demo", "other", "demo", "demo"]
        assert seen.watch.statistics().lists == 1


async def test_other_pods_of_the_namespace_are_not_seen(fake: FakeApiServer) -> None:
    stranger = pod("stranger")
    stranger["metadata"] = {"name": "stranger", "labels": {"app": "rdev-api"}}
    fake.put("pods", stranger)
    async with watching(fake) as seen:
        assert seen.names() == {}


async def test_a_pod_that_loses_its_label_is_gone(fake: FakeApiServer) -> None:
    """A real server tells it as DELETED to who watches by label; else it is heeded too."""
    fake.put("pods", pod())
    async with watching(fake) as seen:
        fake.put("pods", pod(POD, "Not An Id"))
        await until(lambda: seen.names() == {}, "it is no project any more")


@pytest.mark.parametrize("in_band", [True, False])
@pytest.mark.slow
async def test_a_version_that_is_too_old_means_list_again(
    fake: FakeApiServer, in_band: bool
) -> None:
    fake.expired_in_band = in_band
    fake.put("pods", pod())
    async with watching(fake, watch_s=1) as seen:
        fake.is_frozen = True  # so the version that is known stays behind
        fake.drop("pods", POD)
        fake.put("pods", pod("next-0", "next"))
        fake.compact()
        await until(lambda: seen.names() == {"next": "next-0"}, "all was listed again")
        fake.is_frozen = False
        assert (seen.watch.statistics().lists, seen.watch.statistics().failures) == (2, 0)
        fake.put("pods", pod("third-0", "third"))
        await until(lambda: "third" in seen.names(), "it goes on")


async def test_what_changed_while_the_server_was_away_is_found(fake: FakeApiServer) -> None:
    fake.put("pods", pod())
    async with watching(fake) as seen:
        seen.proxy.is_refusing = True
        seen.proxy.cut_all()
        await until(lambda: not seen.watch.is_current, "the watch is lost")
        fake.drop("pods", POD)
        fake.put("pods", pod("next-0", "next"))
        seen.proxy.is_refusing = False
        await until(lambda: seen.names() == {"next": "next-0"}, "all was listed again")


@pytest.mark.slow
async def test_a_watch_that_says_nothing_any_more_is_given_up(fake: FakeApiServer) -> None:
    fake.put("pods", pod())
    async with watching(fake, watch_s=1, margin_s=0.2) as seen:
        seen.proxy.is_silent = True
        fake.drop("pods", POD)
        await until(lambda: seen.watch.statistics().failures > 0, "the silence is noticed")
        assert not seen.watch.is_current
        seen.proxy.is_silent = False
        seen.proxy.cut_all()
        await until(lambda: seen.names() == {}, "it hears again")


@pytest.mark.slow
async def test_a_watch_that_ends_in_order_goes_on_without_a_list(fake: FakeApiServer) -> None:
    async with watching(fake, watch_s=1) as seen:
        asked = len(fake.requests)
        await until(lambda: len(fake.requests) >= asked + 2, "it watched again, twice")
        fake.put("pods", pod())
        await until(lambda: "demo" in seen.names(), "nothing was missed")
        assert seen.watch.statistics().lists == 1


async def test_watches_that_end_at_once_are_not_taken_for_hearing(fake: FakeApiServer) -> None:
    """Who answers so is no API server: nothing was heard of any change, and all was current."""
    fake.put("pods", pod())
    async with watching(fake) as seen:
        fake.watch_events = 0
        seen.proxy.cut_all()
        fake.drop("pods", POD)
        await until(lambda: seen.names() == {}, "it is listed")
        fake.put("pods", pod())
        await until(lambda: "demo" in seen.names(), "and again")
        await until(lambda: not seen.watch.is_current, "it says that it does not hear")


@pytest.mark.slow
async def test_watches_that_end_with_each_event_are_asked_for_ever_less_often(
    fake: FakeApiServer,
) -> None:
    """An event was taken for a watch that is well: some 17 requests a second, of each server."""
    fake.put("pods", pod())
    async with watching(fake) as seen:
        fake.watch_events = 1
        seen.proxy.cut_all()
        asked = len(fake.requests)
        for number in range(150):
            fake.patch_status(POD, message=f"{number}")
            await trio.sleep(0.02)
        assert len(fake.requests) - asked <= 30
        fake.watch_events = None
        fake.drop("pods", POD)
        await until(lambda: seen.names() == {}, "it hears again")


@pytest.mark.slow
async def test_watches_that_last_are_asked_for_again_at_once_however_often_they_are_cut(
    fake: FakeApiServer,
) -> None:
    """A proxy that ends what is idle: each cut is a failure, but none of a server that is away."""
    async with watching(fake) as seen:
        for cut in range(4):
            await trio.sleep(1.1)
            seen.proxy.cut_all()
            fake.put("pods", pod(f"pod-{cut}", f"p-{cut}"))
            with trio.fail_after(20):
                began_s = trio.current_time()
                await until(lambda name=f"p-{cut}": name in seen.names(), "it hears again")
            assert trio.current_time() - began_s < 5  # (pauses would have grown to seconds)
        assert seen.watch.statistics().failures >= 4


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
@pytest.mark.slow
async def test_whatever_the_server_refuses_it_is_asked_again(
    fake: FakeApiServer, status: int
) -> None:
    fake.faults = [
        Fault(status, times=2),
        Fault(status, times=2, only_watches=True),
        Fault(502, body="<html>Bad Gateway</html>"),
        Fault(502, body='{"message": "nicht verfügbar"}'.encode("latin-1")),
        Fault(200, body=b'{"metadata": {"resourceVersion": "\xff"}}'),
    ]
    fake.put("pods", pod())
    async with watching(fake, is_current=False) as seen:
        await until(lambda: not any(fault.times for fault in fake.faults), "all were met")
        await until(lambda: seen.watch.is_current and "demo" in seen.names(), "it hears")
        assert seen.watch.statistics().failures >= 6


@pytest.mark.slow
async def test_a_server_that_says_when_is_not_asked_before(fake: FakeApiServer) -> None:
    fake.faults = [Fault(429, retry_after_s=1)]
    began = trio.current_time()
    async with watching(fake):  # which waits until it hears
        assert trio.current_time() - began >= 1  # its own first pause is 0.1 s at most


async def test_while_nothing_is_heard_no_reason_is_given(fake: FakeApiServer) -> None:
    fake.put("pods", pod())
    async with watching(fake) as seen:
        fake.patch_status(POD, phase="Failed", reason="Evicted")
        await until(
            lambda: health_of(seen.watch.pod_of(DEMO)).status is ProjectStatus.FAILED, "it is seen"
        )
        assert seen.watch.lost_reason(DEMO, are_gone=False) is LostReason.EVICTED
        seen.proxy.is_refusing = True
        seen.proxy.cut_all()
        await until(lambda: not seen.watch.is_current, "the watch is lost")
        assert seen.watch.lost_reason(DEMO, are_gone=False) is None
        assert seen.names() == {"demo": POD}


async def test_an_object_with_next_to_nothing_in_it_is_read(fake: FakeApiServer) -> None:
    """Of another version, or half-filled by somebody's controller."""
    bare = pod()
    bare["status"] = {"containerStatuses": [{"name": "project"}], "conditions": None}
    fake.put("pods", bare)
    async with watching(fake) as seen:
        assert health_of(seen.watch.pod_of(DEMO)).status is ProjectStatus.PENDING


def ended(name: str, exit_code: int, **rest: Any) -> Any:
    """The status of a container that is over."""
    over = {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed", **rest}
    return running(name, ready=False, state={"terminated": over})


async def test_an_init_container_that_fails_is_named_with_its_last_words(
    fake: FakeApiServer,
) -> None:
    """In a pod that is never restarted it was told as one that has ended."""
    failed = pod()
    failed["spec"] |= {"restartPolicy": "Never", "initContainers": [{"name": "one"}]}
    waits = running("project", ready=False, state={"waiting": {"reason": "PodInitializing"}})
    failed["status"] = {
        "phase": "Failed",
        "initContainerStatuses": [ended("one", 0), ended("two", 3, message="no\nspace\n")],
        "containerStatuses": [waits],
    }
    fake.put("pods", failed)
    async with watching(fake) as seen:
        health = health_of(seen.watch.pod_of(DEMO))
        assert (health.status, health.trouble) == (ProjectStatus.FAILED, PodTrouble.INIT_FAILED)
        assert health.message == "container two: Error, exit code 3: no space"


async def test_a_sidecar_that_is_told_to_end_is_no_init_container_that_failed(
    fake: FakeApiServer,
) -> None:
    over = pod()
    over["spec"] |= {"initContainers": [{"name": "proxy", "restartPolicy": "Always"}]}
    over["status"] = {
        "phase": "Failed",
        "initContainerStatuses": [ended("proxy", 137)],
        "containerStatuses": [ended("project", 1)],
    }
    fake.put("pods", over)
    async with watching(fake) as seen:
        health = health_of(seen.watch.pod_of(DEMO))
        assert (health.status, health.trouble) == (ProjectStatus.FAILED, PodTrouble.ENDED)
        assert health.message == "container project: Error, exit code 1"


async def test_a_list_of_pages_is_read_whole(fake: FakeApiServer) -> None:
    fake.page_size = 3
    for number in range(8):
        fake.put("pods", pod(f"p{number}-0", f"p{number}"))
    async with watching(fake) as seen:
        assert len(seen.names()) == 8


async def test_a_change_of_any_size_that_an_object_can_have_is_heard(fake: FakeApiServer) -> None:
    async with watching(fake) as seen:
        large = pod()
        large["metadata"] = {**large["metadata"], "annotations": {"note": "x" * 1_400_000}}
        fake.put("pods", large)
        fake.put("pods", pod("next-0", "next"))
        await until(lambda: "next" in seen.names(), "what comes behind is heard too")
        assert (seen.watch.statistics().lists, seen.watch.statistics().failures) == (1, 0)


async def test_a_line_without_an_end_is_no_change(fake: FakeApiServer) -> None:
    """Whatever sends it: it was kept in memory to its end."""
    async with watching(fake) as seen:
        large = pod()
        large["metadata"] = {**large["metadata"], "annotations": {"note": "x" * 5_000_000}}
        fake.put("pods", large)
        await until(lambda: seen.watch.statistics().failures > 0, "it is given up")
        fake.drop("pods", POD)
        fake.put("pods", pod("next-0", "next"))
        await until(lambda: seen.names() == {"next": "next-0"}, "and all is listed")
