"""The projects of a namespace, as its pods are now: one list, then a watch.

Holds one `Pod` for each pod with the project label. What bounds it: a watch lives `WATCH_S`, and
one whose server says nothing beyond that is taken for dropped; then, at 410, and where it ended at
once, all is listed again.
Survives whatever the API server does, pausing up to 10 s with jitter (longer where it is told to);
while it does not hear, the pods of before are still there and `is_current` is false. Costs one
request each `WATCH_S` when nothing happens; whatever happens, 20 lists and watches at once and then
30 a minute.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import httpx2
import msgspec
import trio

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import refusal_of, translated, unreachable
from rdev.adapters.kubernetes.events import EXPIRED, check_expired, lines_of, read_event
from rdev.adapters.kubernetes.exec import PodTarget
from rdev.adapters.kubernetes.objects import PodEvent, PodList, PodObject, read_pod
from rdev.domain.backoff import Backoff
from rdev.domain.errors import RdevError
from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId
from rdev.domain.pods import LABEL_PREFIX, Pod, choose, lost_reason

WATCH_S: Final = 240.0
_MARGIN_S: Final = 15.0
_PAGE: Final = 500  # pods of one answer
_BRIEF_S: Final = 1.0  # a watch that ends sooner was refused in its way, whatever it said
_OPEN_S: Final = 15.0  # for its first bytes, which come at once: after them there may be nothing
_TURN_S: Final = 2.0  # for each list and each watch, of which `_TURNS` may come at once
_TURNS: Final = 20


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
        open_s: float = _OPEN_S,
    ) -> None:
        """Opens nothing."""
        self._api = api
        self._changed = [] if changed is None else [changed]
        self._path = f"/api/v1/namespaces/{api.namespace}/pods"
        self._prefix = prefix
        self._selector = f"{prefix}/project=true"
        self._watch_s = watch_s
        self._margin_s = margin_s
        self._open_s = open_s
        self._pods: dict[str, Pod] = {}  # by name
        self._chosen: Mapping[ProjectId, Pod] = {}
        self._stopping = trio.CancelScope()
        self._backoff = Backoff(random=random.random, first_s=0.1, most_s=10.0)
        self._is_current = False
        self._heard_at_s = float("-inf")
        self._began_s = float("inf")  # the watch that is open now, from its first bytes on
        self._turns_used_until_s = float("-inf")
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
        """Whether a watch is open now, or about to be followed by the next: what is known is at
        most a moment old."""
        return self._is_current

    @property
    def silent_s(self) -> float:
        """For how long nothing was heard: 0 while it is current. Of a watch that was given up for
        its silence all of that counts."""
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
        is_brief = False
        try:
            while version is not None and not is_brief:
                version = await self._watch(version)
                is_brief = not self._has_lasted()
        finally:
            self._hear_no_more()
        if is_brief:
            # Who hangs up at once is not pressed, and not believed that nothing has changed.
            await trio.sleep(self._backoff.next_s())

    def _hear(self) -> None:
        self._is_current = True
        self._heard_at_s = trio.current_time()

    def _hear_no_more(self) -> None:
        if self._is_current:
            self._heard_at_s = trio.current_time()
        self._is_current = False

    def _has_lasted(self) -> bool:
        return trio.current_time() - self._began_s >= _BRIEF_S

    async def _take_turn(self) -> None:
        """Wait until another request presses nobody, however the ones before ended."""
        now_s = trio.current_time()
        self._turns_used_until_s = max(self._turns_used_until_s, now_s) + _TURN_S
        wait_s = self._turns_used_until_s - now_s - _TURNS * _TURN_S
        if wait_s > 0:
            self._hear_no_more()
        await trio.sleep(max(0.0, wait_s))

    async def _list(self) -> str:
        """Take all pods anew; the version they are of."""
        await self._take_turn()
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
        self._heard_at_s = trio.current_time()
        read = (read_pod(item, self._prefix) for item in found)
        before, self._pods = self._pods, {pod.name: pod for pod in read if pod is not None}
        names = before.keys() | self._pods.keys()
        pairs = [(before.get(name), self._pods.get(name)) for name in sorted(names)]
        self._tell([pod for old, new in pairs if old != new for pod in (old, new)])
        return page.metadata.resource_version

    async def _watch(self, version: str) -> str | None:
        """Follow the changes after a version until the server has enough; the version to go on
        from, or None where all has to be listed again."""
        await self._take_turn()
        self._began_s = float("inf")
        try:
            with trio.fail_after(self._open_s) as patience, translated():
                return await self._follow(version, patience)
        except trio.TooSlowError as error:
            self._is_current = False  # since it was heard last
            raise unreachable("the watch of pods says nothing") from error
        finally:
            if self._has_lasted():
                self._backoff.failures = 0

    async def _follow(self, version: str, patience: trio.CancelScope) -> str | None:
        """As `_watch`. `patience` is put off by whatever comes."""
        params = {
            "watch": "true",
            "resourceVersion": version,
            "labelSelector": self._selector,
            "timeoutSeconds": str(max(1, round(self._watch_s))),
            "allowWatchBookmarks": "true",
        }
        unhurried = httpx2.Timeout(15.0, read=None)
        async with self._api.signs.stream(
            "GET", self._path, params=params, timeout=unhurried
        ) as got:
            if got.status_code == EXPIRED:
                return None
            if got.status_code != 200:
                await got.aread()
                raise refusal_of(got)
            self._began_s = trio.current_time()
            self._be_patient(patience)
            async with lines_of(got) as lines:
                async for line in lines:
                    event = read_event(line)
                    if event.type == "ERROR":
                        check_expired(event)
                        return None
                    version = self._heed(event)
                    self._be_patient(patience)
        return version

    def _be_patient(self, patience: trio.CancelScope) -> None:
        self._hear()
        patience.deadline = trio.current_time() + self._watch_s + self._margin_s

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
