"""What projects are made of: their store, their places and the keeper; a part of `wiring.py`.

It opens and starts nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from rdev.adapters.kubernetes.places import PodPlaces
from rdev.adapters.kubernetes.template import read_template
from rdev.adapters.postgres.pool import Pool
from rdev.adapters.postgres.project_life import PostgresProjectLife
from rdev.adapters.postgres.projects import PostgresProjects
from rdev.config import Settings
from rdev.domain.ids import CommandId, ProjectId
from rdev.execution_wiring import ClusterParts, ExecutionParts
from rdev.identity import Identity
from rdev.services.project_keeper import ProjectKeeper
from rdev.services.project_steps import ProjectSteps
from rdev.services.project_teller import ProjectTeller
from rdev.services.project_watch import ProjectWatch
from rdev.services.projects import Lives, Projects
from rdev.services.standing_places import StandingPlaces
from rdev.services.subsystems import Subsystem


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectNeeds:
    """What the rest of the server lends; of the callables none waits."""

    requests: Pool
    announce: Callable[[CommandId], None]
    ask_to_end: Callable[[CommandId], None]
    tell_replicas: Callable[[ProjectId], None]
    # An event of a project was written.
    written: Callable[[], None]
    now: Callable[[], datetime]


def build_projects(
    settings: Settings, identity: Identity, execution: ExecutionParts, needs: ProjectNeeds
) -> tuple[Projects, ProjectWatch, tuple[Subsystem, ...]]:
    """The use cases, who sees when a project goes, and the subsystems that do what is asked for and
    tell what becomes of it (the watch is one).
    Errors: BAD_REQUEST for a template that no project can be made of."""
    executor, cluster = execution.executor, execution.cluster
    places = (
        StandingPlaces(executor) if cluster is None else _pods(settings, cluster, now=needs.now)
    )
    life = PostgresProjectLife(pool=needs.requests, holder=identity.holder)
    store = PostgresProjects(pool=needs.requests)
    watch = ProjectWatch(store=store)

    def ended(commands: Sequence[CommandId]) -> None:
        for command in commands:
            needs.announce(command)

    def told(project: ProjectId) -> None:
        needs.tell_replicas(project)
        needs.written()
        watch.wake()

    def changed(project: ProjectId) -> None:
        projects.heed([project])
        told(project)

    steps = ProjectSteps(
        life=life,
        places=places,
        executor=settings.executor,
        reach=lambda: executor.reach,
        ended=ended,
        ask_to_end=needs.ask_to_end,
        changed=changed,
    )
    keeper = ProjectKeeper(steps=steps, life=life, places=places, reach=lambda: executor.reach)
    subsystems: tuple[Subsystem, ...] = (keeper, watch)
    if cluster is not None:
        teller = ProjectTeller(
            store=life, places=places, reach=lambda: executor.reach, written=needs.written
        )
        cluster.pods.tell(keeper.heed)
        cluster.pods.tell(lambda _: teller.wake())
        subsystems = (keeper, watch, teller)
    projects = Projects(
        store=store,
        executor=executor,
        executor_name=settings.executor,
        lives=Lives(life=life, places=places, steps=steps, keeper=keeper),
        tell_replicas=told,
    )
    return projects, watch, subsystems


def _pods(settings: Settings, cluster: ClusterParts, *, now: Callable[[], datetime]) -> PodPlaces:
    template = read_template(settings.project_template)
    return PodPlaces(cluster.api, cluster.pods, template, now=now)
