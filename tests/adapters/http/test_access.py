"""The route table: nothing undeclared is served, and what is declared is asked for."""

import pytest
from quart import Blueprint

from rdev.adapters.http.access import Access, UndeclaredRouteError, Where
from rdev.adapters.http.app import build_app
from rdev.adapters.http.envelope import success
from rdev.adapters.http.plain import Asked, PlainRoute
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, KeyId, ProjectId
from rdev.domain.keys import Grant, Principal, Scope
from tests.adapters.http.conftest import NOON, Noted, authenticate, project_of

READ = Access(scopes=(Scope.PROJECTS_READ, Scope.PROJECTS_EXECUTE), project=Where.PATH)
COMMAND = "cmd_" + "0" * 32


def routes() -> Blueprint:
    found = Blueprint("found", __name__)

    @found.get("/projects/<project>")
    async def get_project(project: str):
        return success(project)

    @found.post("/projects/<string:project>")
    async def post_project(project: str):
        return success(project)

    @found.get("/commands/<command>")
    async def get_command(command: str):
        return success(command)

    return found


ACCESS = {
    ("GET", "/projects/{project}"): READ,
    ("POST", "/projects/{project}"): Access(scopes=(Scope.PROJECTS_WRITE,), project=Where.PATH),
    ("GET", "/commands/{command}"): Access(scopes=(Scope.PROJECTS_READ,), project=Where.COMMAND),
}


@pytest.mark.parametrize("route", ACCESS)
def test_no_app_is_built_with_a_route_that_declares_nothing(route: tuple[str, str]) -> None:
    access = {other: what for other, what in ACCESS.items() if other != route}
    with pytest.raises(UndeclaredRouteError, match=" ".join(route)):
        build_app(
            routes=[routes()],
            authenticate=authenticate,
            project_of=project_of,
            telemetry=Noted(),
            now=lambda: NOON,
            new_request_id=lambda: "req-1",
            access=access,
        )


def holding(*scopes: Scope, projects: tuple[str, ...] | None = None):
    """An `authenticate` that takes everybody for the holder of these."""
    ids = None if projects is None else frozenset(ProjectId(project) for project in projects)
    grant = Grant(scopes=frozenset(scopes), project_ids=ids)

    async def authenticate(credential: str | None, client_ip: str) -> Principal:
        return Principal(key_id=KeyId("key_1"), name="k", grant=grant)

    return authenticate


async def project_a(command: CommandId) -> ProjectId | None:
    return ProjectId("a") if command == COMMAND else None


@pytest.mark.parametrize(
    ("scopes", "method", "status"),
    [
        ((), "GET", 403),
        ((Scope.PROJECTS_WRITE,), "GET", 403),
        ((Scope.PROJECTS_READ,), "GET", 200),
        ((Scope.PROJECTS_EXECUTE,), "GET", 200),
        ((Scope.PROJECTS_READ,), "POST", 403),
        ((Scope.ADMIN,), "POST", 200),
        # HEAD is GET without its body; OPTIONS tells the methods to whoever has a key.
        ((), "HEAD", 403),
        ((Scope.PROJECTS_READ,), "HEAD", 200),
        ((), "OPTIONS", 200),
    ],
)
async def test_a_route_asks_for_any_one_of_its_scopes(serve, scopes, method, status):
    site = await serve(routes(), access=ACCESS, authenticate=holding(*scopes))

    async with site.connect() as wire:
        await wire.send(f"{method} /projects/a HTTP/1.1\r\nHost: test\r\n\r\n".encode())

        assert (await wire.head()).status == status


async def test_a_refusal_names_what_would_have_been_enough(serve):
    site = await serve(routes(), access=ACCESS, authenticate=holding(Scope.AUDIT_READ))

    error = (await site.request("GET", "/projects/a")).json()["error"]

    assert error["code"] == "FORBIDDEN"
    assert error["message"] == "the key lacks the scope projects:read or projects:execute"
    assert error["info"] == {"scope": "projects:read,projects:execute"}


@pytest.mark.parametrize(
    ("path", "projects", "status"),
    [
        ("/projects/a", ("a", "b"), 200),
        ("/projects/c", ("a", "b"), 403),
        ("/projects/c", None, 200),
        (f"/commands/{COMMAND}", ("a",), 200),
        (f"/commands/{COMMAND}", ("b",), 404),
        (f"/commands/{COMMAND}", None, 200),
        ("/commands/cmd_" + "1" * 32, ("a",), 404),
        # What is no command id is answered by the route itself, as for everybody.
        ("/commands/nothing", ("a",), 200),
    ],
)
async def test_a_project_is_found_in_the_path_or_through_the_command(serve, path, projects, status):
    site = await serve(
        routes(),
        access=ACCESS,
        authenticate=holding(Scope.PROJECTS_READ, projects=projects),
        project_of=project_a,
    )

    assert (await site.request("GET", path)).status == status


async def plainly(asked: Asked) -> None:
    await asked.send({"type": "http.response.start", "status": 204, "headers": []})
    await asked.send({"type": "http.response.body", "body": b"", "more_body": False})


PLAIN = PlainRoute("/commands/{command}/plainly", plainly)
OF_COMMAND = Access(scopes=(Scope.PROJECTS_READ,), project=Where.COMMAND)


@pytest.mark.parametrize(
    ("scope", "project", "status"),
    [
        (Scope.PROJECTS_READ, "a", 204),
        (Scope.PROJECTS_READ, "b", 404),
        (Scope.AUDIT_READ, "a", 403),
    ],
)
async def test_a_plain_route_passes_the_same_table(serve, scope, project, status):
    site = await serve(
        plain=[PLAIN],
        access={("GET", PLAIN.template): OF_COMMAND},
        authenticate=holding(scope, projects=(project,)),
        project_of=project_a,
    )

    assert (await site.request("GET", f"/commands/{COMMAND}/plainly")).status == status


async def test_a_plain_route_that_declares_nothing_is_not_built_either(serve):
    with pytest.raises(UndeclaredRouteError, match="plainly"):
        await serve(plain=[PLAIN], access={})


async def test_what_cannot_be_looked_up_is_unavailable_and_never_open(serve):
    async def away(command: CommandId) -> ProjectId | None:
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database is away")

    site = await serve(
        routes(),
        access=ACCESS,
        authenticate=holding(Scope.PROJECTS_READ, projects=("a",)),
        project_of=away,
    )

    assert (await site.request("GET", f"/commands/{COMMAND}")).status == 503
