"""What the services need to bring projects to what is asked of them: the store's side of it, and
the places where projects are."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from rdev.domain.audit import Actor
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.projects import PlaceSeen, Project, ProjectStatus, Told, Wanted


class Asked(StrEnum):
    """What the store made of a wish."""

    CHANGED = "changed"
    # It is wanted already.
    UNCHANGED = "unchanged"
    UNKNOWN = "unknown"
    # It is being deleted, and that cannot be taken back.
    DELETING = "deleting"
    # Commands run in it.
    BUSY = "busy"
    # Its pod is somebody else's: it can only be deleted.
    ADOPTED = "adopted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A project that was tried, for what was wanted of it at that time, and is due in `wait_s`;
    `wanted_at` None: it is in hand, whatever is wanted."""

    project: ProjectId
    wanted_at: datetime | None
    wait_s: float


class ProjectLife(Protocol):
    """What is asked of projects, and how far it is."""

    async def want(
        self, project: ProjectId, wanted: Wanted, actor: Actor, *, force: bool, status: str
    ) -> Asked:
        """Store what is asked of a project, with its audit entry and an event of `status`, in one
        statement; the project is unsettled then. Only with `force` while commands run in it. From
        then on nothing begins to run in a project that is not to run, and of one that is to be
        deleted no command is accepted. Running may be asked for again, whatever was.
        """
        ...

    async def adopt(self, project: ProjectId, *, executor: str, reach: str, image: str) -> bool:
        """Store a project that was found by its pod; whether it is new."""
        ...

    async def missing(self, projects: Collection[ProjectId]) -> list[ProjectId]:
        """Those of them that are not stored."""
        ...

    async def unsettled(self, *, reach: str, tried: Collection[Tried], limit: int) -> list[Project]:
        """Projects that are not what is asked of them, but for those that were tried for that and
        are not due. First those that were not, in the order in which it was asked; then who has
        been due the longest."""
        ...

    async def settle(self, project: Project) -> bool:
        """What is wanted of it is so, and in one that is to run commands begin. False where
        something else is wanted meanwhile: it stays, or becomes, unsettled."""
        ...

    async def doubt(self, project: Project) -> None:
        """Somebody acted for what was wanted of it, and is not through: where something else is
        wanted, and was brought about meanwhile, it is unsettled again."""
        ...

    async def is_stored(self, project: Project) -> bool:
        """Whether it is there still, and not another one of its name."""
        ...

    async def note(self, project: Project, trouble: str) -> None:
        """Keep why it is not what is asked of it yet, at most 200 characters."""
        ...

    async def end_queued(self, project: ProjectId, *, limit: int) -> list[CommandId]:
        """End what waits in a project as `cancelled`, reason `project_deleted`; what ended now."""
        ...

    async def ask_running_to_end(self, project: ProjectId) -> list[CommandId]:
        """Ask all that runs in it to end, as a cancel does; all that runs."""
        ...

    async def remove(self, project: Project) -> bool:
        """Forget a project that is wanted deleted, with its audit entry; the commands it had stay.
        False while a command of it waits or runs; idempotent."""
        ...

    async def withdraw(self, project: Project, idempotency: Idempotency | None) -> None:
        """A request that made a project is refused after all: it is wanted deleted, and its key is
        forgotten."""
        ...


class ProjectTold(Protocol):
    """What was told of projects that nobody asked anything of. Errors of all:
    SERVICE_UNAVAILABLE."""

    async def told(self, *, reach: str) -> list[Told]:
        """All projects that are to run and whose place was made, without those in which a kill has
        left processes; their counts of commands are 0."""
        ...

    async def tell(self, told: Told, *, status: ProjectStatus, reason: str | None) -> bool:
        """Tell that a project has this status now, with its audit entry, in one statement; False
        where another status was told meanwhile, or something else is wanted."""
        ...


class ProjectPlaces(Protocol):
    """Where projects are: pods with volumes, or folders. Every call may be repeated.

    `patience_s`: for how long a call is to go on while its place cannot serve it (0: one try).
    Blocks, all: at most so long, and for the answers of a try.
    """

    @property
    def are_made(self) -> bool:
        """Whether a project's place is an object of its own, which has to be made and ended."""
        ...

    def seen(self, project: ProjectId) -> PlaceSeen | None:
        """What was last heard of its pod; None where there is nothing to hear. Never waits."""
        ...

    def found(self) -> Collection[ProjectId]:
        """Projects whose pods are there, whoever made them. Never waits."""
        ...

    async def find(self, project: ProjectId, *, patience_s: float) -> str | None:
        """Ask now for a pod that says it is this project's, one that stays: its image, or None.
        Errors: SERVICE_UNAVAILABLE."""
        ...

    async def start(self, project: Project, *, patience_s: float) -> None:
        """Make what is missing of its place.

        Errors: BAD_REQUEST for what can never be made of this definition; CONFLICT where something
        of the same name is not this project's; SERVICE_UNAVAILABLE.
        Cancellation: some of it may be there; ask again.
        """
        ...

    async def stop(self, project: Project, *, patience_s: float) -> bool:
        """End its pod and leave its volume; True when it is gone. Errors: SERVICE_UNAVAILABLE.
        Cancellation: as `start`."""
        ...

    async def delete(self, project: Project, *, patience_s: float) -> bool:
        """End its pod and its volume, or the pods by which it was found; True when they are gone.
        What is not this project's stays. Errors, Cancellation: as `stop`."""
        ...
