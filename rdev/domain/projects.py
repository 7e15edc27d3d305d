"""A project: the unit commands run in, caps apply to, and keys are limited to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from rdev.domain.fields import Fields, Json
from rdev.domain.ids import PROJECT_MAX_BYTES, PROJECT_PATTERN, ProjectId


class ProjectStatus(StrEnum):
    """Whether commands can run in it now."""

    PENDING = "pending"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectDefinition:
    """What a client asked for in `POST /projects`; two equal definitions are the same request."""

    id: ProjectId
    image: str | None = None
    git_url: str | None = None
    git_ref: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project as it is known now. `reach` names the servers that can touch it."""

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


# Fields that only make sense where a project is a pod.
_POD_FIELDS = ("image", "git_url", "git_ref", "env", "resources")


def parse_project(body: Json) -> ProjectDefinition:
    """`POST /projects` for projects that are local folders. Errors: BAD_REQUEST, all faults."""
    fields = Fields(body)
    project = fields.text("id", max_bytes=PROJECT_MAX_BYTES, required=True, pattern=PROJECT_PATTERN)
    for name in _POD_FIELDS:
        fields.nothing(name, why="is not supported by the local executor")
    fields.finish()
    assert project is not None
    return ProjectDefinition(id=ProjectId(project))
