"""The route of the queue: how much waits and runs, and the limits."""

from collections.abc import Callable, Sequence

from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import Answer, Described, Description
from rdev.adapters.http.envelope import success
from rdev.adapters.http.exchange import principal
from rdev.domain.commands import Priority
from rdev.domain.depths import Depth, DepthLimits, Depths, ProjectDepth
from rdev.domain.ids import ProjectId
from rdev.services.depths import QueueGate
from rdev.services.queue import QueueStatistics

# So many projects are listed: those with most queued, then with most running.
PROJECTS_MAX = 200

DESCRIBED: Described = {
    ("GET", "/queue"): Description(
        summary="What waits and runs",
        tag="commands",
        about="Of the projects that the key sees; `server` is the one that answers.",
        answers={200: Answer(about="depths and limits", schema=schemas.ref("Queue"))},
    )
}


def queue_routes(
    gate: QueueGate, statistics: Callable[[], QueueStatistics], *, running_max: int
) -> Blueprint:
    """`GET /queue`, of the projects that the key may see. `statistics` and `running_max` are this
    server's, whatever it runs."""
    routes = Blueprint("queue", __name__)

    @routes.get("/queue")
    async def get_queue() -> Response:
        depths = (await gate.depths()).within(principal().project_ids)
        return success(
            _depths(depths)
            | {
                "limits": _limits(gate.limits),
                "server": _server(statistics(), running_max=running_max),
            }
        )

    return routes


def _depths(depths: Depths) -> dict[str, object]:
    return {
        **_depth(depths.depth),
        "running": depths.running,
        "priorities": {each: _depth(depths.of_priority(each)) for each in Priority},
        "projects": [_project(project, found) for project, found in _deepest(depths)],
        "projects_total": len(depths.projects),
    }


def _deepest(depths: Depths) -> Sequence[tuple[ProjectId, ProjectDepth]]:
    def order(item: tuple[ProjectId, ProjectDepth]) -> tuple[int, int, str]:
        project, found = item
        return -found.depth.queued, -found.running, project

    return sorted(depths.projects.items(), key=order)[:PROJECTS_MAX]


def _project(project: ProjectId, found: ProjectDepth) -> dict[str, object]:
    waiting = {each: found.waiting.get(each, Depth()).queued for each in Priority}
    return {"id": project, **_depth(found.depth), "running": found.running, "priorities": waiting}


def _depth(depth: Depth) -> dict[str, object]:
    """The wait is null where nothing waits."""
    wait_s = round(depth.oldest_wait_s, 3) if depth.queued else None
    return {"queued": depth.queued, "oldest_wait_s": wait_s}


def _limits(limits: DepthLimits) -> dict[str, int]:
    return {"project_max": limits.project_max, "server_max": limits.server_max}


def _server(found: QueueStatistics, *, running_max: int) -> dict[str, object]:
    """What the server that answers does and has done since its start."""
    return {
        "running": found.running,
        "running_max": running_max,
        "claims_per_s": round(found.claims_per_s, 2),
        "claimed": found.claimed,
        "finished": found.finished,
        "stale_writes": found.stale,
        "take_overs": found.taken_over,
    }
