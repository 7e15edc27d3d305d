"""What a pod's status says about the project in it. Pure; nothing here knows a client library.

Source: Kubernetes API v1, PodStatus and ContainerStatus; the labels are the original rdev's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.projects import ProjectStatus

# Every pod that is a project has `<prefix>/project=true` and `<prefix>/project-id=<id>`.
LABEL_PREFIX: Final = "rdev.orchard9.ai"
# Which container commands run in; without it the first.
CONTAINER_ANNOTATION: Final = "kubectl.kubernetes.io/default-container"
# Where commands begin, and where rdev keeps their folders, in that container: absolute paths.
HOME_ANNOTATION: Final = f"{LABEL_PREFIX}/home"
COMMANDS_ANNOTATION: Final = f"{LABEL_PREFIX}/commands"
# Of a pod's annotations so many bytes are shown, names and values.
SHOWN_BYTES: Final = 4_096
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_HOME: Final = "/workspace"
_COMMANDS: Final = "/run/rdev"

_CONTROL: Final = re.compile(r"[^ -~]+")
_MESSAGE_CHARACTERS: Final = 200


class ContainerState(StrEnum):
    """The three states of a container, and what is not told."""

    WAITING = "waiting"
    RUNNING = "running"
    TERMINATED = "terminated"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """One container of a pod. `reason`, `message` and `exit_code` belong to its state;
    `last_reason` to how it ended before, where it was restarted. `is_sidecar`: it stands among the
    init containers, and runs beside the others to the end."""

    name: str
    state: ContainerState
    is_ready: bool = False
    reason: str = ""
    last_reason: str = ""
    message: str = ""
    exit_code: int = 0
    is_sidecar: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod as far as rdev asks. `reason` is the pod's own, e.g. `Evicted`; `container` is where
    commands run."""

    name: str
    uid: str
    project: ProjectId
    container: str
    phase: str
    is_ready: bool
    is_deleting: bool = False
    reason: str = ""
    message: str = ""
    image: str = ""
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


class PodTrouble(StrEnum):
    """Why a project is not ready; absent where nothing is wrong."""

    IMAGE_PULL = "image_pull"
    CRASH_LOOP = "crash_loop"
    CONFIG = "config"
    UNSCHEDULABLE = "unschedulable"
    OOM_KILLED = "oom_killed"
    EVICTED = "evicted"
    DELETING = "deleting"
    INIT_FAILED = "init_failed"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodHealth:
    """A project's status and what is behind it; `message` is fit for clients (≤ 200 characters)."""

    status: ProjectStatus
    trouble: PodTrouble | None = None
    message: str = ""


# A container that waits for one of these waits for a person.
_WAITING: Final = {
    "ErrImagePull": PodTrouble.IMAGE_PULL,
    "ImagePullBackOff": PodTrouble.IMAGE_PULL,
    "InvalidImageName": PodTrouble.IMAGE_PULL,
    "ErrImageNeverPull": PodTrouble.IMAGE_PULL,
    "RegistryUnavailable": PodTrouble.IMAGE_PULL,
    "ImageInspectError": PodTrouble.IMAGE_PULL,
    "CrashLoopBackOff": PodTrouble.CRASH_LOOP,
    "CreateContainerConfigError": PodTrouble.CONFIG,
    "CreateContainerError": PodTrouble.CONFIG,
    "RunContainerError": PodTrouble.CONFIG,
}
_OOM: Final = "OOMKilled"
_LOST: Final = {
    PodTrouble.EVICTED: LostReason.EVICTED,
    PodTrouble.OOM_KILLED: LostReason.OOM_KILLED,
}
_EVICTED: Final = frozenset({"Evicted", "Preempting", "Preempted", "NodeShutdown", "Terminated"})


def health_of(pod: Pod | None) -> PodHealth:
    """The status of a project whose pod this is; None where it has none.

    In order: gone → stopped · being deleted → stopped · evicted or failed → failed · ended →
    stopped · a container that waits for a person → failed · ready → ready · else pending; a phase
    that nobody knows, as of a node that does not answer → unknown.
    """
    if pod is None:
        return PodHealth(status=ProjectStatus.STOPPED)
    if pod.is_deleting:
        return PodHealth(status=ProjectStatus.STOPPED, trouble=PodTrouble.DELETING)
    match pod.phase:
        case "Failed":
            return _told(ProjectStatus.FAILED, _end_of(pod), pod.message or _failure_of(pod))
        case "Succeeded":
            return _told(ProjectStatus.STOPPED, PodTrouble.ENDED, pod.message)
        case "Pending" | "Running":
            return _living(pod)
        case _:
            return _told(ProjectStatus.UNKNOWN, None, pod.message)


def _living(pod: Pod) -> PodHealth:
    for container in (*pod.init_containers, *pod.containers):
        trouble = _WAITING.get(container.reason)
        if container.state is ContainerState.WAITING and trouble is not None:
            if trouble is PodTrouble.CRASH_LOOP and container.last_reason == _OOM:
                trouble = PodTrouble.OOM_KILLED
            if trouble is PodTrouble.CRASH_LOOP and container in pod.init_containers:
                trouble = PodTrouble.INIT_FAILED
            return _told(
                ProjectStatus.FAILED, trouble, f"container {container.name}: {container.reason}"
            )
    if pod.phase == "Running" and pod.is_ready:
        return PodHealth(status=ProjectStatus.READY)
    trouble = PodTrouble.UNSCHEDULABLE if pod.reason == "Unschedulable" else None
    return _told(ProjectStatus.PENDING, trouble, pod.message)


def _told(status: ProjectStatus, trouble: PodTrouble | None, message: str) -> PodHealth:
    words = _CONTROL.sub(" ", message).strip()[:_MESSAGE_CHARACTERS]
    return PodHealth(status=status, trouble=trouble, message=words)


def _end_of(pod: Pod) -> PodTrouble:
    """How a pod that is over ended."""
    if pod.reason in _EVICTED:
        return PodTrouble.EVICTED
    if any(container.reason == _OOM for container in pod.containers):
        return PodTrouble.OOM_KILLED
    # Not tried again: the pod is never restarted. What ended the whole pod, its deadline or its
    # node, ended its init containers too.
    if not pod.reason and any(_has_failed(container) for container in pod.init_containers):
        return PodTrouble.INIT_FAILED
    return PodTrouble.ENDED


def _has_failed(container: Container) -> bool:
    """A side-car that is told to end has not, whatever it makes of it."""
    is_over = container.state is ContainerState.TERMINATED and not container.is_sidecar
    return is_over and (container.exit_code != 0 or container.reason not in ("", "Completed"))


def _failure_of(pod: Pod) -> str:
    """The first container that failed, and how: its last words where it left any."""
    for one in (*pod.init_containers, *pod.containers):
        if _has_failed(one):
            how = ", ".join(filter(None, (one.reason, f"exit code {one.exit_code}")))
            return f"container {one.name}: {how}" + (f": {one.message}" if one.message else "")
    return ""


def lost_reason(pod: Pod | None, *, are_gone: bool) -> LostReason | None:
    """Why processes that were in a project's pod are gone; None where the pod tells nothing of it.

    `are_gone`: it is known that they are, since another instance answered. Else they are out of
    reach, and only a pod that is over says anything: a container that was once killed for its
    memory and restarted says so for as long as it runs.
    """
    if pod is None:
        return LostReason.POD_GONE
    if pod.phase in ("Failed", "Succeeded"):
        return _LOST.get(_end_of(pod), LostReason.POD_GONE)
    mine = [one for one in pod.containers if one.name == pod.container]
    if are_gone and any(_OOM in (one.reason, one.last_reason) for one in mine):
        return LostReason.OOM_KILLED
    return None


def choose(pods: Iterable[Pod]) -> Mapping[ProjectId, Pod]:
    """The pod of each project: one that is ready before one that is not, one that stays before one
    that goes, then by name. Two pods of one project are there while one replaces the other."""
    chosen: dict[ProjectId, Pod] = {}
    for pod in sorted(pods, key=lambda pod: (pod.is_deleting, not pod.is_ready, pod.name)):
        chosen.setdefault(pod.project, pod)
    return chosen


def folders_of(pod: Pod | None) -> tuple[str, str]:
    """Where commands of this pod begin, and where their folders are: see `folders_said`."""
    return folders_said({} if pod is None else pod.annotations)


def folders_said(annotations: Mapping[str, str]) -> tuple[str, str]:
    """What annotations say of the two, else (also where that is no absolute path) `/workspace` and
    `/run/rdev`."""
    home, commands = annotations.get(HOME_ANNOTATION, ""), annotations.get(COMMANDS_ANNOTATION, "")
    return (
        home if home.startswith("/") else _HOME,
        commands if commands.startswith("/") else _COMMANDS,
    )


def annotations_shown(annotations: Mapping[str, str]) -> dict[str, str]:
    """Those that are shown: without kubectl's copy of the whole pod (which has its environment),
    and of the others, in the order of their names, each that fits into `SHOWN_BYTES` with those
    before it: a cluster takes 256 KiB of each pod, and a page has many."""
    shown: dict[str, str] = {}
    left = SHOWN_BYTES
    for name in sorted(annotations.keys() - {_LAST_APPLIED}):
        size = len(name.encode()) + len(annotations[name].encode())
        if size <= left:
            left -= size
            shown[name] = annotations[name]
    return shown


def project_of(name: str, labels: Mapping[str, str], prefix: str) -> ProjectId | None:
    """The project that a pod says it is: its label, else its name; None where that can be no
    project's id, or it says that it is none."""
    if labels.get(f"{prefix}/project") != "true":
        return None
    said = labels.get(f"{prefix}/project-id", name)
    return ProjectId(said) if is_project_id(said) else None
