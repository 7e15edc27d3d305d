"""How much is queued and running: counted now and then, and held against limits."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from rdev.domain.commands import Priority
from rdev.domain.ids import ProjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """So many commands wait, the oldest for so long; 0 s where none waits."""

    queued: int = 0
    oldest_wait_s: float = 0.0

    def __add__(self, other: "Depth") -> "Depth":
        """Both together."""
        return Depth(
            queued=self.queued + other.queued,
            oldest_wait_s=max(self.oldest_wait_s, other.oldest_wait_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectDepth:
    """What one project has queued, by priority (absent: none), and how much of it runs."""

    waiting: Mapping[Priority, Depth] = field(default_factory=dict)
    running: int = 0

    @property
    def depth(self) -> Depth:
        """All priorities together."""
        return sum(self.waiting.values(), Depth())


@dataclass(frozen=True, slots=True, kw_only=True)
class Depths:
    """The whole queue at one moment: every project that has something queued or running."""

    projects: Mapping[ProjectId, ProjectDepth]

    @property
    def depth(self) -> Depth:
        """All projects together."""
        return sum((project.depth for project in self.projects.values()), Depth())

    @property
    def running(self) -> int:
        """All that runs, on whatever server."""
        return sum(project.running for project in self.projects.values())

    def within(self, projects: Collection[ProjectId] | None) -> "Depths":
        """What these projects have of it; None stands for all."""
        if projects is None:
            return self
        seen = {id_: found for id_, found in self.projects.items() if id_ in projects}
        return Depths(projects=seen)

    def of_priority(self, priority: Priority) -> Depth:
        """What waits with this priority, over all projects."""
        found = (project.waiting.get(priority) for project in self.projects.values())
        return sum((depth for depth in found if depth is not None), Depth())


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthLimits:
    """How many commands may wait: in one project, and in all."""

    project_max: int
    server_max: int
