"""Routes of projects."""

from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.access import require_project
from rdev.adapters.http.describe import Answer, Described, Description
from rdev.adapters.http.envelope import created, read_json, success
from rdev.adapters.http.exchange import actor, principal
from rdev.adapters.http.idempotency import idempotency_of, replay_headers
from rdev.adapters.http.query import PAGE, cursor_of, limit_of
from rdev.domain.errors import ErrorCode
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.projects import Project, parse_project
from rdev.services.projects import Projects

_PROJECT = schemas.ref("Project")

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
}


def project_routes(projects: Projects) -> Blueprint:
    """`/projects`."""
    routes = Blueprint("projects", __name__)

    @routes.post("/projects")
    async def create_project() -> Response:
        body = await read_json()
        idempotency = idempotency_of(body)
        definition = parse_project(body)
        require_project(principal(), definition.id)
        made = await projects.create(definition, actor(), idempotency=idempotency)
        if made.is_new or made.is_replay:
            headers = replay_headers(is_replay=made.is_replay)
            location = f"/projects/{made.project.id}"
            return created(_shown(made.project), location=location, headers=headers)
        return success(_shown(made.project))

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
        return success([_shown(project) for project in found[:limit]], next_cursor=more)

    @routes.get("/projects/<project>")
    async def get_project(project: str) -> Response:
        return success(_shown(await projects.get(project)))

    return routes


def _shown(project: Project) -> dict[str, object]:
    """A project as clients see it; what only pods have is null for a local folder."""
    return {
        "id": project.id,
        "name": project.name,
        "status": project.status,
        "executor": project.executor,
        "pod": None,
        "image": project.image,
        "labels": {},
        "annotations": {},
        "last_seen": None,
        "created_at": project.created_at,
        "commands": {"queued": project.queued, "running": project.running},
    }
