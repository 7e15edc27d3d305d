"""What a pod's status means: each row is one thing that clusters say."""

from dataclasses import replace

import pytest

from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId
from rdev.domain.pods import (
    LABEL_PREFIX,
    SHOWN_BYTES,
    Container,
    ContainerState,
    Pod,
    PodTrouble,
    annotations_shown,
    choose,
    folders_of,
    health_of,
    lost_reason,
    project_of,
)
from rdev.domain.projects import ProjectStatus


def container(
    state: ContainerState = ContainerState.RUNNING,
    reason: str = "",
    last_reason: str = "",
    name: str = "project",
) -> Container:
    return Container(name=name, state=state, reason=reason, last_reason=last_reason)


READY = Pod(
    name="claudebox-demo-0",
    uid="1",
    project=ProjectId("demo"),
    container="project",
    phase="Running",
    is_ready=True,
    containers=(container(),),
)
PENDING = replace(READY, phase="Pending", is_ready=False)
WAITING = ContainerState.WAITING
ENDED = ContainerState.TERMINATED


def waiting(reason: str, last_reason: str = "") -> Pod:
    return replace(PENDING, containers=(container(WAITING, reason, last_reason),))


@pytest.mark.parametrize(
    ("pod", "status", "trouble"),
    [
        (None, ProjectStatus.STOPPED, None),
        (READY, ProjectStatus.READY, None),
        (PENDING, ProjectStatus.PENDING, None),
        (replace(READY, is_ready=False), ProjectStatus.PENDING, None),
        (replace(READY, phase="Unknown"), ProjectStatus.UNKNOWN, None),
        (replace(READY, phase="NewerThanWe"), ProjectStatus.UNKNOWN, None),
        (replace(READY, is_deleting=True), ProjectStatus.STOPPED, PodTrouble.DELETING),
        (replace(PENDING, reason="Unschedulable"), ProjectStatus.PENDING, PodTrouble.UNSCHEDULABLE),
        (waiting("ContainerCreating"), ProjectStatus.PENDING, None),
        (waiting("PodInitializing"), ProjectStatus.PENDING, None),
        (waiting("ErrImagePull"), ProjectStatus.FAILED, PodTrouble.IMAGE_PULL),
        (waiting("ImagePullBackOff"), ProjectStatus.FAILED, PodTrouble.IMAGE_PULL),
        (waiting("InvalidImageName"), ProjectStatus.FAILED, PodTrouble.IMAGE_PULL),
        (waiting("ErrImageNeverPull"), ProjectStatus.FAILED, PodTrouble.IMAGE_PULL),
        (waiting("CreateContainerConfigError"), ProjectStatus.FAILED, PodTrouble.CONFIG),
        (waiting("CrashLoopBackOff", "Error"), ProjectStatus.FAILED, PodTrouble.CRASH_LOOP),
        (waiting("CrashLoopBackOff", "OOMKilled"), ProjectStatus.FAILED, PodTrouble.OOM_KILLED),
        (
            replace(PENDING, init_containers=(container(WAITING, "CrashLoopBackOff", "Error"),)),
            ProjectStatus.FAILED,
            PodTrouble.INIT_FAILED,
        ),
        (
            replace(
                PENDING,
                phase="Failed",
                init_containers=(
                    container(ContainerState.TERMINATED, "Completed"),
                    container(ContainerState.TERMINATED, "Error"),
                ),
            ),
            ProjectStatus.FAILED,
            PodTrouble.INIT_FAILED,
        ),
        (
            replace(
                PENDING,
                phase="Failed",
                init_containers=(replace(container(ENDED), exit_code=3),),
            ),
            ProjectStatus.FAILED,
            PodTrouble.INIT_FAILED,
        ),
        (
            # A side-car stands among the init containers, and was told to end.
            replace(
                READY,
                phase="Failed",
                init_containers=(replace(container(ENDED, "Error"), is_sidecar=True),),
                containers=(container(ENDED, "Error"),),
            ),
            ProjectStatus.FAILED,
            PodTrouble.ENDED,
        ),
        (
            replace(
                PENDING,
                phase="Failed",
                reason="DeadlineExceeded",
                init_containers=(container(ENDED, "Error"),),
            ),
            ProjectStatus.FAILED,
            PodTrouble.ENDED,
        ),
        (
            replace(READY, phase="Failed", is_ready=False, reason="Evicted"),
            ProjectStatus.FAILED,
            PodTrouble.EVICTED,
        ),
        (
            replace(READY, phase="Failed", containers=(container(ENDED, "OOMKilled"),)),
            ProjectStatus.FAILED,
            PodTrouble.OOM_KILLED,
        ),
        (
            replace(READY, phase="Failed", containers=(container(ENDED, "Error"),)),
            ProjectStatus.FAILED,
            PodTrouble.ENDED,
        ),
        (
            replace(READY, phase="Succeeded", containers=(container(ENDED, "Completed"),)),
            ProjectStatus.STOPPED,
            PodTrouble.ENDED,
        ),
    ],
)
def test_a_pods_status_is_its_projects(
    pod: Pod | None, status: ProjectStatus, trouble: PodTrouble | None
) -> None:
    health = health_of(pod)
    assert (health.status, health.trouble) == (status, trouble)


def test_a_ready_pod_with_a_container_that_waits_is_failed() -> None:
    """A side-car that cannot start: somebody has to look, whatever the condition says."""
    sidecar = container(WAITING, "ImagePullBackOff", name="proxy")
    health = health_of(replace(READY, containers=(container(), sidecar)))
    assert health.message == "container proxy: ImagePullBackOff"
    assert health.status is ProjectStatus.FAILED


@pytest.mark.parametrize(
    ("annotations", "folders"),
    [
        ({}, ("/workspace", "/run/rdev")),
        ({"rdev.orchard9.ai/home": "/src"}, ("/src", "/run/rdev")),
        ({"rdev.orchard9.ai/commands": "/data/rdev"}, ("/workspace", "/data/rdev")),
        ({"rdev.orchard9.ai/home": "src"}, ("/workspace", "/run/rdev")),
    ],
)
def test_a_pod_says_where_its_commands_are(
    annotations: dict[str, str], folders: tuple[str, str]
) -> None:
    assert folders_of(replace(READY, annotations=annotations)) == folders
    assert folders_of(None) == ("/workspace", "/run/rdev")


def test_of_many_annotations_those_are_shown_that_fit_and_never_the_copy_of_the_pod() -> None:
    copy = {"kubectl.kubernetes.io/last-applied-configuration": '{"env": "secret"}'}
    large = {"a-note": "é" * SHOWN_BYTES}
    small = {f"note-{number:04}": "x" * 100 for number in range(200)}
    shown = annotations_shown({**small, **large, **copy, "zone": "b"})
    size = sum(len(f"{name}{value}".encode()) for name, value in shown.items())
    assert SHOWN_BYTES - 109 <= size <= SHOWN_BYTES
    assert shown.keys() <= {*small, "zone"}
    assert {"note-0000", "zone"} <= shown.keys()
    assert annotations_shown({**copy, "team": "core"}) == {"team": "core"}


def test_a_message_is_one_short_line() -> None:
    message = "The node was low on resource:\n\x1b[31mmemory.\t" + "x" * 500
    health = health_of(replace(READY, phase="Failed", reason="Evicted", message=message))
    assert health.message.startswith("The node was low on resource: [31mmemory. xxx")
    assert len(health.message) == 200


RESTARTED_AFTER_OOM = replace(READY, containers=(container(last_reason="OOMKilled"),))
SIDECAR_OOM = replace(READY, containers=(container(), container(ENDED, "OOMKilled", name="proxy")))
EVICTED = replace(READY, phase="Failed", is_ready=False, reason="Evicted")


@pytest.mark.parametrize(
    ("pod", "gone", "out_of_reach"),
    [
        (None, LostReason.POD_GONE, LostReason.POD_GONE),
        (READY, None, None),
        (PENDING, None, None),
        (replace(READY, is_deleting=True), None, None),
        (replace(READY, phase="Unknown"), None, None),
        (RESTARTED_AFTER_OOM, LostReason.OOM_KILLED, None),
        (waiting("CrashLoopBackOff", "OOMKilled"), LostReason.OOM_KILLED, None),
        (SIDECAR_OOM, None, None),
        (EVICTED, LostReason.EVICTED, LostReason.EVICTED),
        (
            replace(EVICTED, reason="", containers=(container(ENDED, "OOMKilled"),)),
            LostReason.OOM_KILLED,
            LostReason.OOM_KILLED,
        ),
        (replace(EVICTED, reason="Error"), LostReason.POD_GONE, LostReason.POD_GONE),
        (replace(READY, phase="Succeeded"), LostReason.POD_GONE, LostReason.POD_GONE),
    ],
)
def test_why_processes_of_a_pod_are_gone(
    pod: Pod | None, gone: LostReason | None, out_of_reach: LostReason | None
) -> None:
    assert lost_reason(pod, are_gone=True) == gone
    assert lost_reason(pod, are_gone=False) == out_of_reach


def test_of_two_pods_of_a_project_the_one_that_can_be_used_is_chosen() -> None:
    going = replace(READY, name="a-0", is_deleting=True)
    starting = replace(PENDING, name="b-0")
    ready = replace(READY, name="c-0")
    demo = ProjectId("demo")
    assert choose([going, starting])[demo] == starting
    assert choose([starting, ready, going])[demo] == ready
    assert choose([going])[demo] == going
    assert choose([]) == {}


MARK, ID = f"{LABEL_PREFIX}/project", f"{LABEL_PREFIX}/project-id"


@pytest.mark.parametrize(
    ("name", "labels", "project"),
    [
        ("claudebox-0", {MARK: "true", ID: "pantheon"}, "pantheon"),
        ("pantheon", {MARK: "true"}, "pantheon"),
        ("pantheon", {MARK: "false", ID: "pantheon"}, None),
        ("pantheon", {ID: "pantheon"}, None),
        ("claudebox-0", {MARK: "true", ID: "Not_An_Id"}, None),
        ("claudebox-0", {MARK: "true", ID: ""}, None),
        ("a" * 60, {MARK: "true"}, None),
    ],
)
def test_a_pod_says_by_its_labels_which_project_it_is(
    name: str, labels: dict[str, str], project: str | None
) -> None:
    assert project_of(name, labels, LABEL_PREFIX) == project
