"""Projects as pods with volumes, on the fake API server: made, ended, and whatever goes wrong."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pytest
import trio

from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.places import PodPlaces
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.adapters.kubernetes.template import read_template
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project, ProjectDefinition, ProjectStatus
from tests.adapters.execution.observing import until
from tests.adapters.kubernetes.conftest import config_of
from tests.fakes.api_server import FakeApiServer, Fault

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
CLAIMS = "persistentvolumeclaims"
NAME = "project-demo"


def project(uid: str = "u-1", **definition: object) -> Project:
    asked = ProjectDefinition(id=ProjectId("demo"), **definition)  # type: ignore[arg-type]
    return Project(
        id=asked.id,
        name=asked.id,
        status=ProjectStatus.READY,
        executor="kubernetes",
        reach="there",
        image=asked.image,
        created_at=WHEN,
        definition=asked,
        uid=uid,
    )


@dataclass
class Town:
    """Places on a fake, with a watch that hears."""

    places: PodPlaces
    watch: PodWatch
    fake: FakeApiServer

    async def heard(self) -> None:
        pods = len(self.fake.names("pods"))
        await until(lambda: self.watch.statistics().pods == pods, "the watch heard")


@pytest.fixture
async def town(fake: FakeApiServer) -> AsyncIterator[Town]:
    async with connect(config_of(fake)) as api, trio.open_nursery() as nursery:
        watch = PodWatch(api, changed=lambda _: None)
        await nursery.start(watch.run)
        await until(lambda: watch.is_current, "the watch hears")
        places = PodPlaces(api, watch, read_template(None), now=lambda: WHEN)
        yield Town(places, watch, fake)
        watch.stop()


async def failure(town: Town, asked: Project) -> RdevError:
    with pytest.raises(RdevError) as caught:
        await town.places.start(asked, patience_s=1.5)
    return caught.value


async def test_a_project_is_a_pod_and_a_volume_that_are_made_once(town: Town) -> None:
    await town.places.start(project(), patience_s=1.5)
    assert (town.fake.names("pods"), town.fake.names(CLAIMS)) == ([NAME], [NAME])
    pod, claim = town.fake.get("pods", NAME), town.fake.get(CLAIMS, NAME)
    await town.places.start(project(), patience_s=1.5)
    assert town.fake.get("pods", NAME) is pod
    assert town.fake.get(CLAIMS, NAME) is claim
    assert pod["metadata"]["labels"]["rdev.orchard9.ai/project-id"] == "demo"


async def test_what_was_made_is_seen(town: Town) -> None:
    seen = town.places.seen(ProjectId("demo"))
    assert seen is not None
    assert (seen.is_current, seen.status) == (True, None)
    await town.places.start(project(image="debian"), patience_s=1.5)
    await until(lambda: town.watch.starting() == [], "the watch heard that it runs")
    seen = town.places.seen(ProjectId("demo"))
    assert seen is not None
    assert (seen.status, seen.pod, seen.image) == (ProjectStatus.READY, NAME, "debian")
    assert seen.last_seen == WHEN
    assert town.places.found() == ["demo"]


@pytest.mark.parametrize("kind", [CLAIMS, "pods"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=403, message='serviceaccount "default" not found'),
        Fault(status=429, retry_after_s=1),
        Fault(status=500),
        Fault(status=503, body="<html>away</html>"),
        Fault(status=504, is_late=True),
    ],
    ids=lambda fault: f"{fault.status}",
)
async def test_what_passes_is_tried_again(town: Town, fault: Fault, kind: str) -> None:
    """Also where it was done, and only the answer was lost."""
    town.fake.faults.append(replace(fault, method="POST", path_end=f"/{kind}"))
    began_s = trio.current_time()
    await town.places.start(project(), patience_s=1.5)
    assert (town.fake.names("pods"), town.fake.names(CLAIMS)) == ([NAME], [NAME])
    if fault.retry_after_s:
        assert trio.current_time() - began_s >= fault.retry_after_s


async def test_what_does_not_pass_is_told_after_a_while(town: Town) -> None:
    town.fake.faults.append(Fault(status=503, method="POST", times=100))
    with trio.fail_after(30):
        error = await failure(town, project())
    assert error.code is ErrorCode.SERVICE_UNAVAILABLE
    assert "503" in error.message
    town.fake.faults.clear()
    await town.places.start(project(), patience_s=1.5)
    assert town.fake.names("pods") == [NAME]


async def test_a_delay_that_is_too_long_is_handed_on(town: Town) -> None:
    town.fake.faults.append(Fault(status=429, method="POST", retry_after_s=40))
    error = await failure(town, project())
    assert (error.code, error.retry_after_s) == (ErrorCode.SERVICE_UNAVAILABLE, 40)


async def test_what_the_cluster_refuses_for_good_is_not_tried_again(town: Town) -> None:
    town.fake.faults.append(Fault(status=422, method="POST", message="spec: invalid"))
    error = await failure(town, project())
    assert (error.code, "invalid" in error.message) == (ErrorCode.BAD_REQUEST, True)
    assert ("POST", "/api/v1/namespaces/rdev/pods") in town.fake.requests
    assert town.fake.names("pods") == []


@pytest.mark.parametrize("kind", [CLAIMS, "pods"])
async def test_what_is_somebody_elses_is_a_conflict_and_stays(town: Town, kind: str) -> None:
    town.fake.put(kind, {"metadata": {"name": NAME}, "spec": {"containers": [{"name": "a"}]}})
    assert (await failure(town, project())).code is ErrorCode.CONFLICT
    assert await town.places.delete(project(), patience_s=1.5)
    assert town.fake.names(kind) == [NAME]


async def test_a_pod_that_says_it_is_the_project_is_found_and_no_second_one_is_made(
    town: Town,
) -> None:
    labels = {"rdev.orchard9.ai/project": "true", "rdev.orchard9.ai/project-id": "demo"}
    spec = {"containers": [{"name": "a", "image": "busybox"}]}
    town.fake.put("pods", {"metadata": {"name": "box", "labels": labels}, "spec": spec})
    assert await town.places.find(ProjectId("demo"), patience_s=1.5) == "busybox"
    assert await town.places.find(ProjectId("other"), patience_s=1.5) is None
    assert (await failure(town, project())).code is ErrorCode.CONFLICT
    assert town.fake.names("pods") == ["box"]
    assert await town.places.delete(replace(project(), is_adopted=True), patience_s=1.5)
    assert town.fake.names("pods") == []


@pytest.mark.parametrize("says", [{}, {"rdev.orchard9.ai/project": "false"}])
async def test_a_pod_that_took_a_found_ones_name_is_somebody_elses(
    town: Town, says: dict[str, str]
) -> None:
    """The watch was silent meanwhile: what it knows is a name, and another pod has it."""
    spec = {"containers": [{"name": "a", "image": "busybox"}]}
    labels = {"rdev.orchard9.ai/project": "true"}
    town.fake.put("pods", {"metadata": {"name": "demo", "labels": labels}, "spec": spec})
    await town.heard()
    town.watch.stop()
    await until(lambda: not town.watch.is_current, "the watch is silent")
    town.fake.drop("pods", "demo")
    town.fake.put("pods", {"metadata": {"name": "demo", "labels": says}, "spec": spec})
    assert await town.places.find(ProjectId("demo"), patience_s=1.5) is None
    assert await town.places.delete(replace(project(), is_adopted=True), patience_s=1.5)
    assert town.fake.names("pods") == ["demo"]


async def test_a_stop_leaves_the_volume_and_a_start_finds_it(town: Town) -> None:
    await town.places.start(project(), patience_s=1.5)
    volume = town.fake.get(CLAIMS, NAME)
    assert await town.places.stop(project(), patience_s=1.5)
    assert (town.fake.names("pods"), town.fake.names(CLAIMS)) == ([], [NAME])
    assert await town.places.stop(project(), patience_s=1.5)
    await town.places.start(project(), patience_s=1.5)
    assert town.fake.get(CLAIMS, NAME) is volume


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
async def test_a_pod_that_is_over_is_replaced_by_a_start(town: Town, phase: str) -> None:
    """An evicted pod stays as it is for ever: every start of its project changed nothing."""
    await town.places.start(project(), patience_s=1.5)
    uid, volume = town.fake.get("pods", NAME)["metadata"]["uid"], town.fake.get(CLAIMS, NAME)
    town.fake.patch_status(NAME, phase=phase, reason="Evicted")
    await town.places.start(project(), patience_s=1.5)
    assert town.fake.get("pods", NAME)["metadata"]["uid"] != uid
    assert town.fake.get("pods", NAME)["status"]["phase"] == "Running"
    assert town.fake.get(CLAIMS, NAME) is volume


async def test_somebody_elses_pod_that_is_over_is_not_replaced(town: Town) -> None:
    await town.places.start(project("u-1"), patience_s=1.5)
    town.fake.patch_status(NAME, phase="Failed")
    assert (await failure(town, project("u-2"))).code is ErrorCode.CONFLICT
    assert town.fake.get("pods", NAME)["status"]["phase"] == "Failed"


async def test_what_is_on_its_way_out_is_waited_for(town: Town) -> None:
    await town.places.start(project(), patience_s=1.5)
    town.fake.lingers = True
    assert not await town.places.stop(project(), patience_s=1.5)
    deletes = [one for one in town.fake.requests if one[0] == "DELETE"]
    assert not await town.places.stop(project(), patience_s=1.5)
    assert [one for one in town.fake.requests if one[0] == "DELETE"] == deletes
    assert (await failure(town, project())).code is ErrorCode.SERVICE_UNAVAILABLE
    town.fake.finish()
    assert await town.places.stop(project(), patience_s=1.5)
    await town.places.start(project(), patience_s=1.5)
    assert "deletionTimestamp" not in town.fake.get("pods", NAME)["metadata"]


async def test_a_late_delete_does_not_touch_a_successor(town: Town) -> None:
    """Another project of the same name, made since."""
    await town.places.start(project("u-1"), patience_s=1.5)
    assert await town.places.delete(project("u-1"), patience_s=1.5)
    await town.places.start(project("u-2"), patience_s=1.5)
    assert await town.places.delete(project("u-1"), patience_s=1.5)
    assert await town.places.stop(project("u-1"), patience_s=1.5)
    assert (town.fake.names("pods"), town.fake.names(CLAIMS)) == ([NAME], [NAME])


async def test_a_delete_whose_answer_is_lost_is_finished_by_the_next(town: Town) -> None:
    await town.places.start(project(), patience_s=1.5)
    for kind in ("pods", CLAIMS):
        path = f"/{kind}/{NAME}"
        town.fake.faults.append(
            Fault(status=500, method="DELETE", path_end=path, is_late=True, times=1)
        )
    assert await town.places.delete(project(), patience_s=1.5)
    assert (town.fake.names("pods"), town.fake.names(CLAIMS)) == ([], [])


async def test_without_the_api_server_what_was_seen_is_told_as_old(town: Town) -> None:
    await town.places.start(project(), patience_s=1.5)
    await town.heard()
    town.fake.faults.append(Fault(status=500, times=1_000))
    town.fake.compact()
    town.watch._heard_at_s = trio.current_time() - 31
    town.watch._is_current = False
    seen = town.places.seen(ProjectId("demo"))
    assert seen is not None
    assert (seen.is_current, seen.pod) == (False, NAME)
    assert seen.last_seen is not None
    assert seen.last_seen < WHEN
