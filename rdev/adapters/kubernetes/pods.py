"""The projects of a namespace, as its pods are now: one list, then a watch.

Holds one `Pod` for each pod with the project label. What bounds it: a watch lives `WATCH_S`, and
one whose server says nothing beyond that is taken for dropped; then, at 410, and where it ended at
once, all is listed again. A change is at most `_LINE_BYTES`.
Survives whatever the API server does, pausing up to 10 s with jitter (longer where it is told to);
while it does not hear, the pods of before are still there and `is_current` is false. Costs one
request each `WATCH_S` when nothing happens.
"""

import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import httpx2
import msgspec
import trio

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import refusal, refusal_of, translated
from rdev.adapters.kubernetes.exec import PodTarget
from rdev.adapters.kubernetes.objects import PodEvent, PodList, PodObject, read_pod
from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId
from rdev.domain.pods import LABEL_PREFIX, Pod, choose, lost_reason

WATCH_S: Final = 240.0
_MARGIN_S: Final = 15.0
_PAGE: Final = 500  # pods of one answer
_BRIEF_S: Final = 1.0  # a watch that ends sooner was refused in its way, whatever it said
_REST_S: Final = 0.5  # for the end of a watch that is over
_EXPIRED: Final = 410
_LINE_BYTES: Final = 4 * 2**20  # etcd holds objects of 1.5 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class PodWatchStatistics:
    """Whether it hears now; pods known now; since the start: lists, changes seen, failures."""

    current: bool
    pods: int
    lists: int
    changes: int
    failures: int


class PodWatch:
    """Subsystem: keeps `pods` as the cluster has them, and calls `changed` for each project whose
    pod may have changed. The callback is synchronous and quick."""

    def __init__(
        self,
        api: ApiServer,
        *,
        changed: Callable[[ProjectId], None] | None = None,
        prefix: str = LABEL_PREFIX,
        watch_s: float = WATCH_S,
        margin_s: float = _MARGIN_S,
    ) -> None:
        """Opens nothing."""
        self._api = api
        self._changed = [] if changed is None else [changed]
        self._path = f"/api/v1/namespaces/{api.namespace}/pods"
        self._prefix = prefix
        self._selector = f"{prefix}/project=true"
        self._watch_s = watch_s
        self._margin_s = margin_s
        self._pods: dict[str, Pod] = {}  # by name
        self._chosen: Mapping[ProjectId, Pod] = {}
        self._stopping = trio.CancelScope()
        self._backoff = Backoff(random=random.random, first_s=0.1, most_s=10.0)
        self._is_current = False
        self._heard_at_s = float("-inf")
        self._began_s = float("inf")  # the watch that is open now
        self._lists = self._changes = self._failures = 0

    @property
    def name(self) -> str:
        """See `Subsystem.name`."""
        return "pods"

    def tell(self, changed: Callable[[ProjectId], None]) -> None:
        """Call this one too. Before `run`."""
        self._changed.append(changed)

    @property
    def is_current(self) -> bool:
        """Whether a watch is open now: what is known is at most a moment old."""
        return self._is_current

    @property
    def silent_s(self) -> float:
        """For how long nothing was heard: 0 while it is current."""
        return 0.0 if self._is_current else trio.current_time() - self._heard_at_s

    def pod_of(self, project: ProjectId) -> Pod | None:
        """The project's pod, as it was last heard of."""
        return self._chosen.get(project)

    def projects(self) -> Mapping[ProjectId, Pod]:
        """All projects with their pods."""
        return self._chosen

    def pods_of(self, project: ProjectId) -> list[Pod]:
        """All pods that say they are this project's."""
        return [pod for pod in self._pods.values() if pod.project == project]

    def starting(self) -> list[ProjectId]:
        """Projects whose pods run nothing yet: it is too early to reach them."""
        return [project for project, pod in self._chosen.items() if pod.phase == "Pending"]

    def target_of(self, project: ProjectId) -> PodTarget | None:
        """Where the project's commands run."""
        pod = self._chosen.get(project)
        return None if pod is None else PodTarget(pod=pod.name, container=pod.container)

    def lost_reason(self, project: ProjectId, are_gone: bool) -> LostReason | None:
        """See `domain.pods.lost_reason`; None also while nothing current is known."""
        if not self._is_current:
            return None
        return lost_reason(self._chosen.get(project), are_gone=are_gone)

    def statistics(self) -> PodWatchStatistics:
        """What is now, and what was since the start."""
        return PodWatchStatistics(
            current=self._is_current,
            pods=len(self._pods),
            lists=self._lists,
            changes=self._changes,
            failures=self._failures,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until `stop`. Started at once: a server that begins while the API server is away
        serves all that needs no pod."""
        task_status.started()
        with self._stopping:
            while True:
                try:
                    await self.run_once()
                except RdevError as error:
                    self._failures += 1
                    wait_s = self._backoff.next_s()
                    await trio.sleep(max(wait_s, min(error.retry_after_s or 0, 60)))

    def stop(self) -> None:
        """End `run`."""
        self._stopping.cancel()

    async def run_once(self) -> None:
        """List, then watch as long as the watch goes on. Returns when all has to be listed again.

        Errors: RdevError, for whatever the API server says or does not say.
        """
        version: str | None = await self._list()
        self._is_current = True
        is_brief = False
        try:
            while version is not None and not is_brief:
                self._began_s = trio.current_time()
                version = await self._watch(version)
                is_brief = not self._has_lasted()
        finally:
            self._is_current = False
            self._heard_at_s = trio.current_time()
            if self._has_lasted():
                self._backoff.failures = 0
        if is_brief:
            # Who hangs up at once is not pressed, and not believed that nothing has changed.
            await trio.sleep(self._backoff.next_s())

    def _has_lasted(self) -> bool:
        return trio.current_time() - self._began_s >= _BRIEF_S

    async def _list(self) -> str:
        """Take all pods anew; the version they are of."""
        found: list[PodObject] = []
        params = {"labelSelector": self._selector, "limit": str(_PAGE)}
        while True:
            with translated():
                got = await self._api.signs.get(self._path, params=params)
                if got.status_code != 200:
                    raise refusal_of(got)
                page = msgspec.json.decode(got.content, type=PodList)
            found += page.items or ()
            if not page.metadata.continue_:
                break
            params["continue"] = page.metadata.continue_
        self._lists += 1
        read = (read_pod(item, self._prefix) for item in found)
        before, self._pods = self._pods, {pod.name: pod for pod in read if pod is not None}
        names = before.keys() | self._pods.keys()
        pairs = [(before.get(name), self._pods.get(name)) for name in sorted(names)]
        self._tell([pod for old, new in pairs if old != new for pod in (old, new)])
        return page.metadata.resource_version

    async def _watch(self, version: str) -> str | None:
        """Follow the changes after a version until the server has enough; the version to go on
        from, or None where all has to be listed again."""
        params = {
            "watch": "true",
            "resourceVersion": version,
            "labelSelector": self._selector,
            "timeoutSeconds": str(max(1, round(self._watch_s))),
            "allowWatchBookmarks": "true",
        }
        patience = httpx2.Timeout(15.0, read=self._watch_s + self._margin_s)
        with translated():
            async with self._api.signs.stream(
                "GET", self._path, params=params, timeout=patience
            ) as got:
                if got.status_code == _EXPIRED:
                    return None
                if got.status_code != 200:
                    await got.aread()
                    raise refusal_of(got)
                async with _lines_of(got) as lines:
                    async for line in lines:
                        event = _read_event(line)
                        if event.type == "ERROR":
                            _check_expired(event)
                            return None
                        version = self._heed(event)
        return version

    def _heed(self, event: PodEvent) -> str:
        """Take one change in; the version it leads to."""
        metadata = event.object.metadata
        if event.type != "BOOKMARK":
            self._changes += 1
            before = self._pods.pop(metadata.name, None)
            pod = None if event.type == "DELETED" else read_pod(event.object, self._prefix)
            if pod is not None:
                self._pods[pod.name] = pod
            self._tell([before, pod])
        return metadata.resource_version

    def _tell(self, pods: Sequence[Pod | None]) -> None:
        self._chosen = choose(self._pods.values())
        for project in dict.fromkeys(pod.project for pod in pods if pod is not None):
            for changed in self._changed:
                changed(project)


@asynccontextmanager
async def _lines_of(response: httpx2.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The lines of a watch. httpx2 leaves its generators open where one stops in the middle: what
    is left is read, which is nothing after an error, or cancelled, which closes them."""
    async with aclosing(_lines(response)) as lines:
        try:
            yield lines
        finally:
            with trio.move_on_after(_REST_S):
                async for _ in lines:  # noqa: ASYNC102  # a generator that was cancelled is at its end
                    pass
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102  # as above


async def _lines(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The lines of a watch as they come; of one that is too long, its beginning."""
    begun: list[bytes] = []  # of a line whose end has not come
    size = 0
    async with aclosing(response.aiter_bytes()) as pieces:
        async for piece in pieces:
            *ends, rest = piece.split(b"\n")
            for end in ends:
                line = b"".join((*begun, end))
                begun, size = [], 0
                if line:
                    yield line
            begun.append(rest)
            size += len(rest)
            if size > _LINE_BYTES:
                yield b"".join(begun)
                begun, size = [], 0


def _read_event(line: bytes) -> PodEvent:
    """Errors: RdevError for more than any object is; one of `UNREADABLE` for what is none."""
    if len(line) > _LINE_BYTES:
        message = f"a line of the watch of pods is longer than {_LINE_BYTES} bytes"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
    return msgspec.json.decode(line, type=PodEvent)


def _check_expired(event: PodEvent) -> None:
    """Errors: RdevError for what is not just a version that is too old."""
    if event.object.code != _EXPIRED:
        body = msgspec.json.encode({"message": event.object.message})
        raise refusal(event.object.code or 500, body)
