"""Projects as pods with volumes: making and ending them, and what was seen of them.

Whatever is made carries its project's `uid`; what carries another, or none, is somebody else's and
is never touched, except for pods by which a project was found. Deletes name the object's own uid,
so that a late one cannot hit its successor. Bounds: eight requests a call, and four for each pod by
which a project was found; each as `requests.py` says.
"""

from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Final

import msgspec
import trio

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import translated
from rdev.adapters.kubernetes.objects import Metadata, PodList, read_pod
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.adapters.kubernetes.requests import Requests
from rdev.adapters.kubernetes.template import (
    ProjectTemplate,
    Tree,
    object_name,
    pod_of,
    volume_of,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.pods import LABEL_PREFIX, Pod, annotations_shown, health_of, project_of
from rdev.domain.projects import PlaceSeen, Project

# A watch that has not been heard for so long says nothing of now.
SILENCE_S: Final = 30.0
# How long after the API server the watch is at most, when all is well: who claims asks the watch.
_HEARD_S: Final = 2.0
_AGAIN_S: Final = 2.0  # for what is on its way out
_OVER: Final = frozenset({"Failed", "Succeeded"})
_UID: Final = f"{LABEL_PREFIX}/project-uid"


class PodPlaces:
    """The `ProjectPlaces` port. `template` was judged."""

    are_made = True

    def __init__(
        self,
        api: ApiServer,
        watch: PodWatch,
        template: ProjectTemplate,
        *,
        now: Callable[[], datetime],
    ) -> None:
        """Opens nothing."""
        self._api = api
        self._watch = watch
        self._template = template
        self._now = now

    def seen(self, project: ProjectId) -> PlaceSeen | None:
        """See `ProjectPlaces.seen`."""
        silent_s = self._watch.silent_s
        pod = self._watch.pod_of(project)
        if pod is None:
            return PlaceSeen(is_current=silent_s < SILENCE_S)
        health = health_of(pod)
        # Since before the first list nothing was heard, there is no pod then either.
        return PlaceSeen(
            is_current=silent_s < SILENCE_S,
            status=health.status,
            reason=health.trouble,
            message=health.message or None,
            pod=pod.name,
            image=pod.image or None,
            labels=pod.labels,
            annotations=annotations_shown(pod.annotations),
            last_seen=self._now() - timedelta(seconds=silent_s),
        )

    def found(self) -> Collection[ProjectId]:
        """See `ProjectPlaces.found`."""
        return [name for name, pod in self._watch.projects().items() if not pod.is_deleting]

    async def find(self, project: ProjectId, *, patience_s: float) -> str | None:
        """See `ProjectPlaces.find`."""
        for pod in await self._pods(self._requests(patience_s), project):
            if not pod.is_deleting:
                return pod.image
        return None

    async def start(self, project: Project, *, patience_s: float) -> None:
        """See `ProjectPlaces.start`. The volume first: a pod without it would only wait. A pod that
        is over (evicted, its node shut down) never runs again: another one takes its place."""
        requests = self._requests(patience_s)
        for other in await self._pods(requests, project.id):
            if other.name == object_name(project):
                if other.phase in _OVER:
                    await _end(requests, "pods", other.name, project, uid=other.uid)
            elif not other.is_deleting:
                raise _conflict(f"pod {other.name} says that it is project {project.id}")
        volume = volume_of(self._template, project, self._api.namespace)
        if volume is not None:
            await _make(requests, "persistentvolumeclaims", volume, project)
        pod = pod_of(self._template, project, self._api.namespace)
        await _make(requests, "pods", pod, project)
        with trio.move_on_after(_HEARD_S):
            while self._watch.pod_of(project.id) is None:  # noqa: ASYNC110  # it wakes nobody
                await trio.sleep(_HEARD_S / 40)

    async def stop(self, project: Project, *, patience_s: float) -> bool:
        """See `ProjectPlaces.stop`."""
        return await _end(self._requests(patience_s), "pods", object_name(project), project)

    async def delete(self, project: Project, *, patience_s: float) -> bool:
        """See `ProjectPlaces.delete`. The pod first: a volume waits for whoever mounts it."""
        requests = self._requests(patience_s)
        if project.is_adopted:
            names = [pod.name for pod in await self._pods(requests, project.id)]
            gone = [await _end(requests, "pods", name, project) for name in names]
            return all(gone)
        is_gone = await _end(requests, "pods", object_name(project), project)
        claims = "persistentvolumeclaims"
        return await _end(requests, claims, object_name(project), project) and is_gone

    def _requests(self, patience_s: float) -> Requests:
        return Requests(self._api, patience_s=patience_s)

    async def _pods(self, requests: Requests, project: ProjectId) -> list[Pod]:
        """The project's pods as the API server has them now. Those that carry no id are known to
        the watch alone; whether they are still there is asked."""
        selector = f"{LABEL_PREFIX}/project=true,{LABEL_PREFIX}/project-id={project}"
        got = await requests.ask("GET", "pods", params={"labelSelector": selector})
        with translated():
            items = msgspec.json.decode(got.content, type=PodList).items or []
        read = (read_pod(item, LABEL_PREFIX) for item in items)
        pods = {pod.name: pod for pod in read if pod is not None}
        for pod in self._watch.pods_of(project):
            if pod.name not in pods:
                found = await requests.get("pods", pod.name)
                if found is not None and _says_it_is(found, project):
                    pods[pod.name] = pod
        return list(pods.values())


async def _make(requests: Requests, kind: str, body: Tree, project: Project) -> None:
    """Make an object, unless it is there already."""
    try:
        await requests.ask("POST", kind, body=body)
        return
    except RdevError as error:
        if error.code is not ErrorCode.CONFLICT:
            raise
        refusal = error
    name = object_name(project)
    found = await requests.get(kind, name)
    if found is None:  # it went meanwhile, or others were counted at the same time (a quota)
        raise _for_now(refusal.message) from refusal
    if found.deletion_timestamp is not None:
        raise _for_now(f"{name} of before is still on its way out")
    if not _is_of(found, project):
        raise _conflict(f"{kind} {name} is there, and is not this project's")


async def _end(
    requests: Requests, kind: str, name: str, project: Project, *, uid: str | None = None
) -> bool:
    """Delete an object, if it is this project's (and the one with this uid); whether it is gone."""
    found = await requests.get(kind, name)
    if found is None or not _is_to_end(found, project) or uid not in (None, found.uid):
        return True
    if found.deletion_timestamp is None:
        only = {"preconditions": {"uid": found.uid}}
        try:
            await requests.ask("DELETE", f"{kind}/{name}", body=dict(only))
        except RdevError as error:
            # Another one has its name by now, or none: look again.
            if error.code not in (ErrorCode.NOT_FOUND, ErrorCode.CONFLICT):
                raise
    left = await requests.get(kind, name)
    return left is None or left.uid != found.uid


def _is_of(found: Metadata, project: Project) -> bool:
    return (found.annotations or {}).get(_UID) == project.uid


def _says_it_is(found: Metadata, project: ProjectId) -> bool:
    """Whether its labels say so now; the watch may know its name from another pod."""
    return project_of(found.name, found.labels or {}, LABEL_PREFIX) == project


def _is_to_end(found: Metadata, project: Project) -> bool:
    if project.is_adopted:
        return _says_it_is(found, project.id)
    return _is_of(found, project)


def _for_now(message: str) -> RdevError:
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=_AGAIN_S)


def _conflict(message: str) -> RdevError:
    return RdevError(ErrorCode.CONFLICT, message)
