"""A project: the unit commands run in, caps apply to, and keys are limited to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from rdev.domain.ids import ProjectId

# So long after it was asked for, a pod that nobody has heard of is still expected.
EXPECTED_S: Final = 15.0


class ProjectStatus(StrEnum):
    """Whether commands can run in it now."""

    PENDING = "pending"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Wanted(StrEnum):
    """What was last asked of a project."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectDefinition:
    """What a client asked for in `POST /projects`; two equal definitions are the same request.

    `resources` as Kubernetes writes them: `requests` and `limits` of the container, and `storage`
    among the requests for the volume.
    """

    id: ProjectId
    image: str | None = None
    git_url: str | None = None
    git_ref: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project as the store knows it now. `reach` names the servers that can touch it.

    `status` is `failed` while a kill has left processes in it, else `ready`; `uid` is that of this
    project, whatever had its id before. What is `wanted`, for `wanted_s` seconds now, was brought
    about where it `is_settled`; else `trouble` may say why not yet. `is_adopted`: its pod was found
    by its labels.
    """

    id: ProjectId
    name: str
    status: ProjectStatus
    executor: str
    reach: str
    image: str | None
    created_at: datetime
    definition: ProjectDefinition
    queued: int = 0
    running: int = 0
    uid: str = ""
    wanted: Wanted = Wanted.RUNNING
    wanted_at: datetime | None = None
    wanted_s: float = field(default=0.0, compare=False)
    is_forced: bool = False
    is_settled: bool = True
    is_adopted: bool = False
    trouble: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What was last told of a project that is to run, since that was asked for; None: nothing yet,
    which is `pending`."""

    project: Project
    status: ProjectStatus | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceSeen:
    """What was last heard of a project's pod: `status` None where it has none. `is_current`: that
    was a moment ago."""

    is_current: bool
    status: ProjectStatus | None = None
    reason: str | None = None
    message: str | None = None
    pod: str | None = None
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    last_seen: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whether commands can run in a project; `reason` is one word, where they cannot."""

    status: ProjectStatus
    reason: str | None = None
    message: str | None = None


def standing(project: Project, seen: PlaceSeen | None) -> Standing:
    """A project's status, by what is asked of it and what was seen of its pod (None for a folder,
    of which there is nothing to see).

    In order: 1. to be deleted → stopped · 2. to be stopped → stopped · 3. a kill left processes →
    failed · 4. a folder → ready · 5. nobody hears of the pods → unknown · 6. its pod, where it has
    one, says it · 7. asked for and not made yet, or a moment ago → pending · 8. else it lost its
    pod → stopped.
    """
    stopped, pending = ProjectStatus.STOPPED, ProjectStatus.PENDING
    if project.wanted is Wanted.DELETED:
        return Standing(status=stopped, reason="deleting", message=project.trouble)
    if project.wanted is Wanted.STOPPED:
        reason = None if project.is_settled else "stopping"
        return Standing(status=stopped, reason=reason, message=project.trouble)
    if project.status is ProjectStatus.FAILED:
        message = "processes are left that a kill did not end"
        return Standing(status=ProjectStatus.FAILED, reason="survivors", message=message)
    if seen is None:
        return Standing(status=project.status)
    if not seen.is_current:
        message = "the cluster cannot be reached"
        return Standing(status=ProjectStatus.UNKNOWN, reason="unreachable", message=message)
    if seen.status is not None:
        return Standing(status=seen.status, reason=seen.reason, message=seen.message)
    if not project.is_settled or (not project.is_adopted and project.wanted_s < EXPECTED_S):
        return Standing(status=pending, reason="starting", message=project.trouble)
    return Standing(status=stopped, reason="pod_gone", message="its pod is gone")
