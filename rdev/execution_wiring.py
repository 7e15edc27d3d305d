"""Where commands run: the executor that the settings name, and what it stands on; a part of
`wiring.py`.
"""

import os
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.execution.executor import Place
from rdev.adapters.execution.kubernetes import KubernetesExecutor, KubernetesTransport
from rdev.adapters.execution.local import LocalExecutor
from rdev.adapters.kubernetes.connection import ApiServer, connect, read_config
from rdev.adapters.kubernetes.exec import PodExecs
from rdev.adapters.kubernetes.namespace import Namespace
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.domain.breaker import BreakerSettings
from rdev.domain.execution import LostReason
from rdev.domain.ids import ProjectId
from rdev.domain.pods import folders_of
from rdev.identity import Identity
from rdev.services.breaker import CircuitBreaker
from rdev.services.guarded_executor import GuardedExecutor
from rdev.services.subsystems import Subsystem

# Around the API server. Slow is no fault of its: an exec waits for its node.
_API_BREAKER = BreakerSettings(slow_s=60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterParts:
    """The cluster that projects are in."""

    api: ApiServer
    pods: PodWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionParts:
    """What runs commands. `checks` are for `/ready`; `statistics` by the part's name in metrics;
    `is_reachable` says whether any project can be reached now: else nothing is claimed."""

    executor: GuardedExecutor
    is_reachable: Callable[[], bool] = lambda: True
    # Projects that are not to be touched yet: nothing runs in them.
    starting: Callable[[], list[ProjectId]] = list
    subsystems: tuple[Subsystem, ...] = ()
    checks: Mapping[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    statistics: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    cluster: ClusterParts | None = None


@asynccontextmanager
async def open_execution(
    settings: Settings, identity: Identity, telemetry: PrometheusTelemetry
) -> AsyncIterator[ExecutionParts]:
    """The executor, with a breaker for each project. Nothing is asked of anybody yet; leaving
    closes its connections. Errors: SERVICE_UNAVAILABLE for a cluster that is nowhere described."""
    match settings.executor:
        case "local":
            executor = LocalExecutor(
                projects_dir=settings.projects_folder,
                machine_id=identity.machine,
                base_env=base_env(),
            )
            yield ExecutionParts(executor=GuardedExecutor(executor, telemetry=telemetry))
        case "kubernetes":
            breaker = CircuitBreaker(name="kubernetes", telemetry=telemetry, settings=_API_BREAKER)
            telemetry.watch_breakers("kubernetes", breaker.tally)
            config = read_config(settings.kubeconfig)
            async with connect(config, settings.namespace, breaker) as api:
                yield _in_cluster(api, breaker, telemetry)


def _in_cluster(
    api: ApiServer, breaker: CircuitBreaker, telemetry: PrometheusTelemetry
) -> ExecutionParts:
    """Projects are the pods of a namespace."""
    namespace = Namespace(api)
    pods = PodWatch(api)

    def place(project: ProjectId) -> Place:
        home, commands = folders_of(pods.pod_of(project))
        return Place(home=home, commands=commands)

    def reason_of(project: ProjectId, are_gone: bool) -> LostReason | None:
        return pods.lost_reason(project, are_gone=are_gone)

    def is_reachable() -> bool:
        return namespace.is_known and pods.is_current and not breaker.refuses

    execs = PodExecs(api, pods.target_of, subprotocols=SUBPROTOCOLS)
    executor = KubernetesExecutor(
        cluster=namespace.uid,
        namespace=api.namespace,
        transport=KubernetesTransport(execs.open),
        reason_of=reason_of,
        base_env={"LANG": "C.UTF-8"},
        place=place,
        is_away=lambda: not is_reachable(),
    )
    pods.tell(executor.forget)
    return ExecutionParts(
        executor=GuardedExecutor(executor, telemetry=telemetry),
        is_reachable=is_reachable,
        starting=pods.starting,
        subsystems=(namespace, pods),
        checks={"kubernetes": namespace.check_lately},
        statistics={
            "pods": pods.statistics,
            "execs": executor.statistics,
            "kubernetes_breaker": breaker.statistics,
        },
        cluster=ClusterParts(api=api, pods=pods),
    )


def base_env() -> dict[str, str]:
    """What every local command gets: nothing of the server's environment."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": _home(),
        "LANG": "C.UTF-8",
    }


def _home() -> str:
    """Where this user's files are; "/" for one that the system does not know (a container's)."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"
