"""Projects as pods with volumes: making and ending them, and what was seen of them.

Whatever is made carries its project's `uid`; what carries another, or none, is somebody else's and
is never touched, except for pods by which a project was found. Deletes name the object's own uid,
so that a late one cannot hit its successor. Bounds: each call tries for `TRIES_S`, with pauses, as
long as the API server is away, overloaded or not ready for it (a namespace that was just made
refuses pods with 403 until it has its service account).
"""

import random
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Final

import httpx2
import msgspec
import trio

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import refusal_of, translated
from rdev.adapters.kubernetes.objects import Metadata, Named, PodList, read_pod
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.adapters.kubernetes.template import (
    ProjectTemplate,
    Tree,
    object_name,
    pod_of,
    volume_of,
)
from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.pods import LABEL_PREFIX, Pod, annotations_shown, health_of, project_of
from rdev.domain.projects import PlaceSeen, Project

TRIES_S: Final = 8.0
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
        tries_s: float = TRIES_S,
    ) -> None:
        """Opens nothing."""
        self._api = api
        self._watch = watch
        self._template = template
        self._now = now
        self._tries_s = tries_s
        self._root = f"/api/v1/namespaces/{api.namespace}"

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

    async def find(self, project: ProjectId) -> str | None:
        """See `ProjectPlaces.find`."""
        for pod in await self._pods(project):
            if not pod.is_deleting:
                return pod.image
        return None

    async def start(self, project: Project) -> None:
        """See `ProjectPlaces.start`. The volume first: a pod without it would only wait. A pod that
        is over (evicted, its node shut down) never runs again: another one takes its place."""
        for other in await self._pods(project.id):
            if other.name == object_name(project):
                if other.phase in _OVER:
                    await self._end("pods", other.name, project, uid=other.uid)
            elif not other.is_deleting:
                raise _conflict(f"pod {other.name} says that it is project {project.id}")
        volume = volume_of(self._template, project, self._api.namespace)
        if volume is not None:
            await self._make("persistentvolumeclaims", volume, project)
        await self._make("pods", pod_of(self._template, project, self._api.namespace), project)
        with trio.move_on_after(_HEARD_S):
            while self._watch.pod_of(project.id) is None:  # noqa: ASYNC110  # it wakes nobody
                await trio.sleep(_HEARD_S / 40)

    async def stop(self, project: Project) -> bool:
        """See `ProjectPlaces.stop`."""
        return await self._end("pods", object_name(project), project)

    async def delete(self, project: Project) -> bool:
        """See `ProjectPlaces.delete`. The pod first: a volume waits for whoever mounts it."""
        if project.is_adopted:
            names = [pod.name for pod in await self._pods(project.id)]
            gone = [await self._end("pods", name, project) for name in names]
            return all(gone)
        is_gone = await self._end("pods", object_name(project), project)
        claims = "persistentvolumeclaims"
        return await self._end(claims, object_name(project), project) and is_gone

    async def _pods(self, project: ProjectId) -> list[Pod]:
        """The project's pods as the API server has them now. Those that carry no id are known to
        the watch alone; whether they are still there is asked."""
        selector = f"{LABEL_PREFIX}/project=true,{LABEL_PREFIX}/project-id={project}"
        got = await self._ask("GET", "pods", params={"labelSelector": selector})
        with translated():
            items = msgspec.json.decode(got.content, type=PodList).items or []
        read = (read_pod(item, LABEL_PREFIX) for item in items)
        pods = {pod.name: pod for pod in read if pod is not None}
        for pod in self._watch.pods_of(project):
            if pod.name not in pods:
                found = await self._get("pods", pod.name)
                if found is not None and _says_it_is(found, project):
                    pods[pod.name] = pod
        return list(pods.values())

    async def _make(self, kind: str, body: Tree, project: Project) -> None:
        """Make an object, unless it is there already."""
        try:
            await self._ask("POST", kind, body=body)
        except RdevError as error:
            if error.code is not ErrorCode.CONFLICT:
                raise
        else:
            return
        name = object_name(project)
        found = await self._get(kind, name)
        if found is None or found.deletion_timestamp is not None:
            message = f"{name} of before is still on its way out"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message, retry_after_s=_AGAIN_S)
        if not _is_of(found, project):
            raise _conflict(f"{kind} {name} is there, and is not this project's")

    async def _end(self, kind: str, name: str, project: Project, *, uid: str | None = None) -> bool:
        """Delete an object, if it is this project's (and the one with this uid); whether it is
        gone."""
        found = await self._get(kind, name)
        if found is None or not _is_to_end(found, project) or uid not in (None, found.uid):
            return True
        if found.deletion_timestamp is None:
            only = {"preconditions": {"uid": found.uid}}
            try:
                await self._ask("DELETE", f"{kind}/{name}", body=dict(only))
            except RdevError as error:
                # Another one has its name by now, or none: look again.
                if error.code not in (ErrorCode.NOT_FOUND, ErrorCode.CONFLICT):
                    raise
        left = await self._get(kind, name)
        return left is None or left.uid != found.uid

    async def _get(self, kind: str, name: str) -> Metadata | None:
        """What an object is, None where there is none."""
        try:
            got = await self._ask("GET", f"{kind}/{name}")
        except RdevError as error:
            if error.code is ErrorCode.NOT_FOUND:
                return None
            raise
        with translated():
            return msgspec.json.decode(got.content, type=Named).metadata

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        body: Tree | None = None,
        params: dict[str, str] | None = None,
    ) -> httpx2.Response:
        """One request, again while the server cannot serve it. Errors: RdevError, the last one."""
        deadline = trio.current_time() + self._tries_s
        pauses = Backoff(random=random.random, first_s=0.2, most_s=2.0)
        while True:
            try:
                return await self._once(method, path, body=body, params=params)
            except RdevError as error:
                wait_s = max(pauses.next_s(), error.retry_after_s or 0.0)
                is_late = trio.current_time() + wait_s >= deadline
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE or is_late:
                    raise
            await trio.sleep(wait_s)

    async def _once(
        self, method: str, path: str, *, body: Tree | None, params: dict[str, str] | None
    ) -> httpx2.Response:
        with translated():
            got = await self._api.http.request(
                method, f"{self._root}/{path}", json=body, params=params
            )
            if not got.is_success:
                raise refusal_of(got)
            return got


def _is_of(found: Metadata, project: Project) -> bool:
    return (found.annotations or {}).get(_UID) == project.uid


def _says_it_is(found: Metadata, project: ProjectId) -> bool:
    """Whether its labels say so now; the watch may know its name from another pod."""
    return project_of(found.name, found.labels or {}, LABEL_PREFIX) == project


def _is_to_end(found: Metadata, project: Project) -> bool:
    if project.is_adopted:
        return _says_it_is(found, project.id)
    return _is_of(found, project)


def _conflict(message: str) -> RdevError:
    return RdevError(ErrorCode.CONFLICT, message)
