"""What rdev reads of pods: the fields it asks for, and each of them may be absent.

lightkube's own models are not used for reading: a single object without a field that they take for
granted, of an older or a newer server, would end the whole list or watch.
"""

from collections.abc import Collection, Sequence

import msgspec

from rdev.domain.pods import CONTAINER_ANNOTATION, Container, ContainerState, Pod, project_of


class Metadata(msgspec.Struct, rename="camel"):
    """What an object is, whatever it is."""

    name: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _SpecContainer(msgspec.Struct, rename="camel"):
    name: str = ""
    image: str = ""
    restart_policy: str | None = None  # of an init container: `Always` makes it a side-car


class _Spec(msgspec.Struct, rename="camel"):
    containers: list[_SpecContainer] = []
    init_containers: list[_SpecContainer] | None = None


class _Phase(msgspec.Struct, rename="camel"):
    """A state that a container is in, with its reason; `exit_code` of one that is over."""

    reason: str = ""
    message: str = ""
    exit_code: int = 0


class _State(msgspec.Struct):
    waiting: _Phase | None = None
    running: _Phase | None = None
    terminated: _Phase | None = None


class _ContainerStatus(msgspec.Struct, rename="camel"):
    name: str = ""
    ready: bool = False
    state: _State | None = None
    last_state: _State | None = None


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""
    reason: str | None = None
    message: str | None = None


class _Status(msgspec.Struct, rename="camel"):
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    conditions: list[_Condition] | None = None
    container_statuses: list[_ContainerStatus] | None = None
    init_container_statuses: list[_ContainerStatus] | None = None


class PodObject(msgspec.Struct):
    """A pod, or what a watch sends in its place: of a bookmark only the version, of an error the
    `code`."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: _Spec | None = None
    status: _Status | str | None = None  # a text in the place of an error
    code: int | None = None
    message: str = ""


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class PodList(msgspec.Struct):
    """One page of a list; `metadata.continue_` is empty on the last."""

    metadata: _ListMetadata
    items: list[PodObject] | None = None


class PodEvent(msgspec.Struct):
    """One line of a watch."""

    type: str
    object: PodObject


def read_pod(item: PodObject, prefix: str) -> Pod | None:
    """The pod, or None for one that is no project's (or has nothing that could run)."""
    metadata = item.metadata
    labels, annotations = metadata.labels or {}, metadata.annotations or {}
    project = project_of(metadata.name, labels, prefix)
    if project is None or item.spec is None or not item.spec.containers:
        return None
    status = item.status if isinstance(item.status, _Status) else _Status()
    images = {container.name: container.image for container in item.spec.containers}
    wanted = annotations.get(CONTAINER_ANNOTATION, "")
    container = wanted if wanted in images else next(iter(images))
    reason, message = _reason(status)
    sidecars = {one.name for one in item.spec.init_containers or () if one.restart_policy}
    return Pod(
        name=metadata.name,
        uid=metadata.uid,
        project=project,
        container=container,
        phase=status.phase,
        is_ready=_condition(status, "Ready", "True") is not None,
        is_deleting=metadata.deletion_timestamp is not None,
        reason=reason,
        message=message,
        image=images[container],
        containers=_containers(status.container_statuses or ()),
        init_containers=_containers(status.init_container_statuses or (), sidecars),
        labels=labels,
        annotations=annotations,
    )


def _reason(status: _Status) -> tuple[str, str]:
    """The pod's own reason and message; of one that found no node, the scheduler's."""
    unscheduled = _condition(status, "PodScheduled", "False")
    if not status.reason and unscheduled is not None:
        return unscheduled.reason or "", unscheduled.message or ""
    return status.reason, status.message


def _condition(status: _Status, kind: str, value: str) -> _Condition | None:
    for condition in status.conditions or ():
        if (condition.type, condition.status) == (kind, value):
            return condition
    return None


def _containers(
    statuses: Sequence[_ContainerStatus], sidecars: Collection[str] = ()
) -> tuple[Container, ...]:
    return tuple(_container(one, is_sidecar=one.name in sidecars) for one in statuses)


def _container(status: _ContainerStatus, *, is_sidecar: bool) -> Container:
    kind, phase = ContainerState.UNKNOWN, _Phase()
    match status.state:
        case _State(running=_Phase()):
            kind = ContainerState.RUNNING
        case _State(terminated=_Phase() as ended):
            kind, phase = ContainerState.TERMINATED, ended
        case _State(waiting=_Phase() as waits):
            kind, phase = ContainerState.WAITING, waits
        case _:
            pass
    last = status.last_state.terminated if status.last_state is not None else None
    return Container(
        name=status.name,
        state=kind,
        is_ready=status.ready,
        reason=phase.reason,
        last_reason=last.reason if last is not None else "",
        message=phase.message,
        exit_code=phase.exit_code,
        is_sidecar=is_sidecar,
    )


class Named(msgspec.Struct):
    """Of any object what all have."""

    metadata: Metadata
