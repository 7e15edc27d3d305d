"""Routes of projects."""

from dataclasses import replace
from enum import StrEnum

from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.access import require_project
from rdev.adapters.http.describe import Answer, Described, Description, Parameter
from rdev.adapters.http.envelope import accepted, created, read_json, success
from rdev.adapters.http.exchange import actor, principal
from rdev.adapters.http.idempotency import idempotency_of, replay_headers
from rdev.adapters.http.query import PAGE, choice_of, cursor_of, limit_of
from rdev.domain.errors import ErrorCode
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.project_requests import parse_folder_project, parse_project
from rdev.domain.projects import PlaceSeen
from rdev.services.projects import Projects, ProjectView

_PROJECT = schemas.ref("Project")
_NOTHING_SEEN = PlaceSeen(is_current=False)


class Force(StrEnum):
    """`?force=`."""

    TRUE = "true"
    FALSE = "false"


_FORCE = Parameter(
    name="force",
    about="`true`: commands that run are cancelled first; else they are a reason to refuse",
    schema={"type": "string", "enum": [*Force]},
)
_LATER = {202: Answer(about="it is asked for, and will be so", schema=_PROJECT)}

DESCRIBED: Described = {
    ("POST", "/projects"): Description(
        summary="Make a project",
        tag="projects",
        about="The same id and body again is 200, another body 409; what was made with an "
        "Idempotency-Key is told again with 201.",
        body=parse_project,
        example={"id": "demo"},
        answers={
            200: Answer(about="it was there already", schema=_PROJECT),
            201: Answer(about="made", schema=_PROJECT, headers=("Location", "Idempotent-Replayed")),
        },
        errors=(ErrorCode.CONFLICT, ErrorCode.GONE),
        is_idempotent=True,
    ),
    ("GET", "/projects"): Description(
        summary="The projects that the key sees",
        tag="projects",
        parameters=PAGE,
        answers={200: Answer(about="a page, by id", schema=_PROJECT, is_page=True)},
    ),
    ("GET", "/projects/{project}"): Description(
        summary="One project",
        tag="projects",
        answers={200: Answer(about="the project", schema=_PROJECT)},
    ),
    ("POST", "/projects/{project}/start"): Description(
        summary="Start a project",
        tag="projects",
        about="Its pod is made where it has none, and what waits in it runs.",
        answers=_LATER,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT),
    ),
    ("POST", "/projects/{project}/stop"): Description(
        summary="Stop a project",
        tag="projects",
        about="Its pod ends, its volume stays, and commands wait until it is started.",
        parameters=(_FORCE,),
        answers=_LATER,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT),
    ),
    ("DELETE", "/projects/{project}"): Description(
        summary="Delete a project",
        tag="projects",
        about="Its pod and its volume go, what waits in it is cancelled, and then it is no more. "
        "A folder stays as it is.",
        parameters=(_FORCE,),
        answers=_LATER,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT),
    ),
}

# What a client may ask for where projects are folders.
DESCRIBED_FOLDERS: Described = {
    **DESCRIBED,
    ("POST", "/projects"): replace(DESCRIBED["POST", "/projects"], body=parse_folder_project),
}


def project_routes(projects: Projects, *, are_pods: bool) -> Blueprint:
    """`/projects`."""
    routes = Blueprint("projects", __name__)

    @routes.post("/projects")
    async def create_project() -> Response:
        body = await read_json()
        idempotency = idempotency_of(body)
        definition = (parse_project if are_pods else parse_folder_project)(body)
        require_project(principal(), definition.id)
        made = await projects.create(definition, actor(), idempotency=idempotency)
        if made.is_new or made.is_replay:
            headers = replay_headers(is_replay=made.is_replay)
            location = f"/projects/{made.project.id}"
            return created(_shown(projects.view(made.project)), location=location, headers=headers)
        return success(_shown(projects.view(made.project)))

    @routes.get("/projects")
    async def list_projects() -> Response:
        limit = limit_of()
        after = cursor_of(is_project_id)
        found = await projects.list_all(
            within=principal().project_ids,
            after=ProjectId(after) if after else None,
            limit=limit + 1,
        )
        more = found[limit - 1].id if len(found) > limit else None
        return success(
            [_shown(projects.view(project)) for project in found[:limit]], next_cursor=more
        )

    @routes.get("/projects/<project>")
    async def get_project(project: str) -> Response:
        return success(_shown(projects.view(await projects.get(project))))

    @routes.post("/projects/<project>/start")
    async def start_project(project: str) -> Response:
        return _later(projects.view(await projects.start(project, actor())))

    @routes.post("/projects/<project>/stop")
    async def stop_project(project: str) -> Response:
        force = choice_of("force", Force) is Force.TRUE
        return _later(projects.view(await projects.stop(project, actor(), force=force)))

    @routes.delete("/projects/<project>")
    async def delete_project(project: str) -> Response:
        force = choice_of("force", Force) is Force.TRUE
        return _later(projects.view(await projects.delete(project, actor(), force=force)))

    return routes


def _later(view: ProjectView) -> Response:
    return accepted(_shown(view))


def _shown(view: ProjectView) -> dict[str, object]:
    """A project as clients see it; what only pods have is null for a local folder."""
    project, standing, seen = view.project, view.standing, view.seen or _NOTHING_SEEN
    return {
        "id": project.id,
        "name": project.name,
        "status": standing.status,
        "reason": standing.reason,
        "message": standing.message,
        "executor": project.executor,
        "pod": seen.pod,
        "image": seen.image or project.image,
        "labels": seen.labels,
        "annotations": seen.annotations,
        "last_seen": seen.last_seen,
        "created_at": project.created_at,
        "commands": {"queued": project.queued, "running": project.running},
    }
