"""The route table: what a key must hold for each route, and where the route's project is found.

The shell holds every request against it before the route runs, and refuses to be built with a route
that is neither declared here nor public: what nobody thought of is closed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, ProjectId, is_command_id
from rdev.domain.keys import Principal, Scope, forbidden
from rdev.ports.authentication import ProjectOf

# Method and template of a route, as in ("GET", "/projects/{project}").
Route = tuple[str, str]


class Where(Enum):
    """How a route's project is found."""

    # It is about no project.
    NOWHERE = auto()
    # `{project}` in its path: another project is FORBIDDEN.
    PATH = auto()
    # That of `{command}` in its path: another project's command is NOT_FOUND.
    COMMAND = auto()
    # In its body, which the route reads: the route asks `require_project`.
    BODY = auto()
    # That of the command in its body: the route asks `require_command`.
    COMMAND_IN_BODY = auto()
    # It shows what the key may see: the route leaves out all else.
    SEEN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a route asks for: any one of the scopes, for the project."""

    scopes: tuple[Scope, ...]
    project: Where = Where.NOWHERE


_READ = (Scope.PROJECTS_READ, Scope.PROJECTS_EXECUTE)
_EXECUTE = (Scope.PROJECTS_EXECUTE,)
_WRITE = Access(scopes=(Scope.PROJECTS_WRITE,), project=Where.PATH)
# Of webhooks a key sees those whose projects it sees all.
_HOOKS_READ = Access(scopes=(Scope.WEBHOOKS_READ,), project=Where.SEEN)
_HOOKS_WRITE = Access(scopes=(Scope.WEBHOOKS_WRITE,), project=Where.SEEN)
# Every key holds at least one.
_ANY = tuple(Scope)

ACCESS: Mapping[Route, Access] = MappingProxyType(
    {
        ("GET", "/projects"): Access(scopes=(Scope.PROJECTS_READ,), project=Where.SEEN),
        ("POST", "/projects"): Access(scopes=(Scope.PROJECTS_WRITE,), project=Where.BODY),
        ("GET", "/projects/{project}"): Access(scopes=(Scope.PROJECTS_READ,), project=Where.PATH),
        ("POST", "/projects/{project}/start"): _WRITE,
        ("POST", "/projects/{project}/stop"): _WRITE,
        ("DELETE", "/projects/{project}"): _WRITE,
        ("POST", "/projects/{project}/shell"): Access(scopes=_EXECUTE, project=Where.PATH),
        ("POST", "/projects/{project}/git"): Access(scopes=_EXECUTE, project=Where.PATH),
        ("POST", "/projects/{project}/claude"): Access(scopes=_EXECUTE, project=Where.PATH),
        ("GET", "/projects/{project}/commands"): Access(scopes=_READ, project=Where.PATH),
        ("GET", "/projects/{project}/events"): Access(scopes=_READ, project=Where.PATH),
        ("GET", "/commands/{command}"): Access(scopes=_READ, project=Where.COMMAND),
        ("DELETE", "/commands/{command}"): Access(scopes=_EXECUTE, project=Where.COMMAND),
        ("GET", "/commands/{command}/output"): Access(scopes=_READ, project=Where.COMMAND),
        ("GET", "/commands/{command}/events"): Access(scopes=_READ, project=Where.COMMAND),
        ("GET", "/events"): Access(scopes=_READ, project=Where.SEEN),
        ("GET", "/queue"): Access(scopes=_READ, project=Where.SEEN),
        ("POST", "/session"): Access(scopes=_ANY),
        ("DELETE", "/session"): Access(scopes=_ANY),
        ("POST", "/stream-tokens"): Access(scopes=_READ, project=Where.COMMAND_IN_BODY),
        ("GET", "/keys"): Access(scopes=(Scope.KEYS_READ,), project=Where.SEEN),
        ("POST", "/keys"): Access(scopes=(Scope.KEYS_WRITE,)),
        ("GET", "/keys/{key}"): Access(scopes=(Scope.KEYS_READ,), project=Where.SEEN),
        ("DELETE", "/keys/{key}"): Access(scopes=(Scope.KEYS_WRITE,), project=Where.SEEN),
        ("GET", "/audit"): Access(scopes=(Scope.AUDIT_READ,), project=Where.SEEN),
        ("GET", "/audit/export"): Access(scopes=(Scope.AUDIT_READ,), project=Where.SEEN),
        ("GET", "/audit/verify"): Access(scopes=(Scope.AUDIT_READ,)),
        ("POST", "/keys/{key}/rotate"): Access(scopes=(Scope.KEYS_WRITE,), project=Where.SEEN),
        ("GET", "/webhooks"): _HOOKS_READ,
        ("POST", "/webhooks"): _HOOKS_WRITE,
        ("GET", "/webhooks/{webhook}"): _HOOKS_READ,
        ("PATCH", "/webhooks/{webhook}"): _HOOKS_WRITE,
        ("DELETE", "/webhooks/{webhook}"): _HOOKS_WRITE,
        ("POST", "/webhooks/{webhook}/rotate-secret"): _HOOKS_WRITE,
        ("POST", "/webhooks/{webhook}/test"): _HOOKS_WRITE,
        ("GET", "/webhooks/{webhook}/deliveries"): _HOOKS_READ,
        ("POST", "/webhooks/{webhook}/redeliver"): _HOOKS_WRITE,
        ("GET", "/deliveries/{delivery}"): _HOOKS_READ,
        ("POST", "/deliveries/{delivery}/redeliver"): _HOOKS_WRITE,
    }
)


class UndeclaredRouteError(Exception):
    """A route that says nothing about who may use it; the server is not built."""


def check_declared(
    routes: Iterable[Route], access: Mapping[Route, Access], public_paths: frozenset[str]
) -> None:
    """Errors: UndeclaredRouteError, naming every route that is neither declared nor public."""
    missing = [
        f"{method} {path}"
        for method, path in sorted(routes)
        if path not in public_paths and (method, path) not in access
    ]
    if missing:
        told = ", ".join(missing)
        raise UndeclaredRouteError(f"{told}: declares no scope in adapters/http/access.py")


async def admit(
    principal: Principal, access: Access, path: Mapping[str, str], project_of: ProjectOf
) -> None:
    """Let the request in, or not. `path` holds the parts of the path by name.

    Errors: FORBIDDEN, naming the scope or the project; NOT_FOUND for a command of another project.
    """
    if not any(principal.may(scope) for scope in access.scopes):
        names = " or ".join(access.scopes)
        raise forbidden(f"the key lacks the scope {names}", access.scopes)
    match access.project:
        case Where.PATH:
            require_project(principal, path["project"])
        case Where.COMMAND:
            await _check_command(principal, path["command"], project_of)
        case Where.NOWHERE | Where.BODY | Where.COMMAND_IN_BODY | Where.SEEN:
            pass


def require_project(principal: Principal, project: str) -> None:
    """Errors: FORBIDDEN, whether or not there is such a project."""
    if not principal.grant.sees(ProjectId(project)):
        raise RdevError(ErrorCode.FORBIDDEN, f"the key has no right to project {project!r}")


async def require_command(principal: Principal, command: CommandId, project_of: ProjectOf) -> None:
    """Errors: NOT_FOUND where there is no such command, or not for this principal."""
    project = await project_of(command)
    if project is None or not principal.grant.sees(project):
        raise RdevError(ErrorCode.NOT_FOUND, f"there is no command {command!r}")


async def _check_command(principal: Principal, command: str, project_of: ProjectOf) -> None:
    """A key of all projects costs no look-up; the route itself answers for what there is not."""
    if principal.project_ids is None or not is_command_id(command):
        return
    await require_command(principal, CommandId(command), project_of)
