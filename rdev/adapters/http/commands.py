"""Routes of commands: submit, read, cancel."""

from collections.abc import Callable, Sequence

from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import (
    Answer,
    Described,
    Description,
    Parameter,
    Schema,
    number,
    whole,
)
from rdev.adapters.http.envelope import accepted, created, read_json, stream, success
from rdev.adapters.http.exchange import actor, hold
from rdev.adapters.http.idempotency import idempotency_of, replay_headers
from rdev.adapters.http.output import output_bytes, output_lines, tail_text
from rdev.adapters.http.query import (
    PAGE,
    choice_of,
    cursor_of,
    limit_of,
    number_of,
    text_of,
    whole_of,
)
from rdev.domain.claude import claude_argv
from rdev.domain.commands import Command, Kind, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.git import GIT_ENVIRONMENT, git_argv
from rdev.domain.ids import CommandId, ProjectId, is_command_id, is_project_id
from rdev.domain.requests import parse_claude, parse_git, parse_shell
from rdev.domain.rules import Json
from rdev.domain.stream import Source
from rdev.ports.commands import Accepted
from rdev.services.commands import Commands
from rdev.services.projects import Projects

WAIT_MAX_S = 60.0
OUTPUT_MAX_BYTES = 1 << 30
_SOURCES = {"stdout": Source.STDOUT, "stderr": Source.STDERR}
_ALL = "all"

_COMMAND = schemas.ref("Command")
_WAIT = number(
    "wait",
    "hold the answer until the command ends or so many seconds pass",
    least=0,
    most=WAIT_MAX_S,
)


def _submission(
    summary: str, about: str, body: Callable[[Json], object], example: Schema
) -> Description:
    return Description(
        summary=summary,
        tag="commands",
        about=about,
        body=body,
        example=example,
        parameters=(_WAIT,),
        answers={
            201: Answer(
                about="accepted; `id` is the id of its stream",
                schema=schemas.ref("Submitted"),
                headers=("Location", "Idempotent-Replayed"),
            )
        },
        errors=(ErrorCode.CONFLICT,),
        is_idempotent=True,
    )


DESCRIBED: Described = {
    ("POST", "/projects/{project}/shell"): _submission(
        "Run a shell command",
        "`sh -c command` in the project's folder.",
        parse_shell,
        {"command": "make -s test", "env": {"CI": "1"}, "timeout_s": 300},
    ),
    ("POST", "/projects/{project}/git"): _submission(
        "Run git",
        "An argv list without a shell; sub-commands and options from an allow-list.",
        parse_git,
        {"args": ["log", "--oneline", "-5"]},
    ),
    ("POST", "/projects/{project}/claude"): _submission(
        "Run the coding agent",
        "Claude Code in print mode; each item of its own stream is an `agent` event.",
        parse_claude,
        {"prompt": "say hello", "max_turns": 3},
    ),
    ("GET", "/projects/{project}/commands"): Description(
        summary="The commands of a project",
        tag="commands",
        parameters=(
            *PAGE,
            Parameter(name="status", about="only these", schema=schemas.one_of(Status)),
            Parameter(name="kind", about="only these", schema=schemas.one_of(Kind)),
        ),
        answers={200: Answer(about="a page, newest first", schema=_COMMAND, is_page=True)},
    ),
    ("GET", "/commands/{command}"): Description(
        summary="One command",
        tag="commands",
        answers={200: Answer(about="the command", schema=_COMMAND)},
    ),
    ("DELETE", "/commands/{command}"): Description(
        summary="Cancel a command",
        tag="commands",
        about="Queued or running; an ended one stays as it is.",
        answers={202: Answer(about="the command", schema=_COMMAND)},
    ),
    ("GET", "/commands/{command}/output"): Description(
        summary="The stored output of a command",
        tag="commands",
        about="The exact bytes of one stream; `all` is the output events of both, one a line.",
        parameters=(
            Parameter(
                name="stream",
                about="stdout by default",
                schema=schemas.one_of([*_SOURCES, _ALL]),
            ),
            whole("tail_bytes", "only the last bytes", least=1, most=OUTPUT_MAX_BYTES),
        ),
        answers={
            200: Answer(
                about="the output",
                schema=schemas.TEXT,
                is_enveloped=False,
                content_type="text/plain",
                also=("application/x-ndjson",),
            )
        },
        errors=(ErrorCode.GONE,),
    ),
}


def submission_routes(commands: Commands, *, claude_command: Sequence[str]) -> Blueprint:
    """`POST /projects/{id}/shell|git|claude`."""
    routes = Blueprint("submissions", __name__)

    @routes.post("/projects/<project>/shell")
    async def submit_shell(project: str) -> Response:
        body = await read_json()
        request = parse_shell(body)
        wait_s = _wait()
        argv = ("sh", "-c", request.command)
        made = await commands.submit(
            actor(),
            _project(project),
            Kind.SHELL,
            argv=argv,
            common=request.common,
            idempotency=idempotency_of(body),
        )
        return await _submitted(commands, made, wait_s)

    @routes.post("/projects/<project>/git")
    async def submit_git(project: str) -> Response:
        body = await read_json()
        request = parse_git(body)
        wait_s = _wait()
        made = await commands.submit(
            actor(),
            _project(project),
            Kind.GIT,
            argv=git_argv(request.args),
            common=request.common,
            env=dict(GIT_ENVIRONMENT),
            idempotency=idempotency_of(body),
        )
        return await _submitted(commands, made, wait_s)

    @routes.post("/projects/<project>/claude")
    async def submit_claude(project: str) -> Response:
        body = await read_json()
        submission = parse_claude(body)
        wait_s = _wait()
        made = await commands.submit(
            actor(),
            _project(project),
            Kind.CLAUDE,
            argv=claude_argv(claude_command, submission.request),
            common=submission.common,
            idempotency=idempotency_of(body),
        )
        return await _submitted(commands, made, wait_s)

    return routes


def command_routes(commands: Commands, projects: Projects) -> Blueprint:
    """`/projects/{id}/commands`, `/commands/{id}` and its output."""
    routes = Blueprint("commands", __name__)

    @routes.get("/projects/<project>/commands")
    async def list_commands(project: str) -> Response:
        cursor = cursor_of(is_command_id)
        found = await commands.list_for_project(
            _project(project),
            status=choice_of("status", Status),
            kind=choice_of("kind", Kind),
            before=CommandId(cursor) if cursor else None,
            limit=limit_of(),
        )
        if not found.items:
            # An empty page of a project that is not there is no page but a 404.
            await projects.check_known(project)
        more = found.items[-1].id if found.has_more else None
        return success([_shown(command) for command in found.items], next_cursor=more)

    @routes.get("/commands/<command>")
    async def get_command(command: str) -> Response:
        found = await commands.get(_command(command))
        position = await commands.queue_position(found)
        return success(_shown(found) | ({"queue_position": position} if position else {}))

    @routes.delete("/commands/<command>")
    async def cancel_command(command: str) -> Response:
        return accepted(_shown(await commands.cancel(actor(), _command(command))))

    @routes.get("/commands/<command>/output")
    async def get_output(command: str) -> Response:
        found = await commands.get(_command(command))
        which = text_of("stream") or "stdout"
        tail_bytes = whole_of("tail_bytes", least=1, most=OUTPUT_MAX_BYTES)
        await commands.check_stored(found)
        if which == _ALL:
            body = output_lines(commands, found)
            return stream(body, content_type="application/x-ndjson")
        if which not in _SOURCES:
            message = "the parameter stream must be one of stdout, stderr, all"
            raise RdevError(ErrorCode.BAD_REQUEST, message)
        body = output_bytes(commands, found, _SOURCES[which], tail_bytes=tail_bytes)
        return stream(body, content_type="text/plain; charset=utf-8")

    return routes


def _wait() -> float | None:
    """`?wait=`, with a place for the request to wait in. Asked before anything is stored: a request
    that is refused must leave nothing behind.

    Errors: BAD_REQUEST; SERVICE_UNAVAILABLE when too many requests are held.
    """
    wait_s = number_of("wait", least=0, most=WAIT_MAX_S)
    if wait_s is not None:
        hold()
    return wait_s


async def _submitted(commands: Commands, made: Accepted, wait_s: float | None) -> Response:
    """201; with `?wait=` it is held until the command ends, and says how."""
    command = made.command
    shown: dict[str, object] = {
        "id": command.id,
        "project": command.project,
        "kind": command.kind,
        "status": command.status,
        "priority": command.priority,
        "queue_position": made.queue_position,
        "stream_url": f"/commands/{command.id}/events",
        "created_at": command.created_at,
    }
    if wait_s is not None:
        ended = await commands.ended(command.id, within_s=wait_s)
        shown |= {
            "status": ended.status,
            "exit_code": ended.exit_code,
            "duration_ms": ended.duration_ms,
            "stdout_tail": await tail_text(commands, ended, Source.STDOUT),
            "stderr_tail": await tail_text(commands, ended, Source.STDERR),
        }
    headers = replay_headers(is_replay=made.is_replay)
    return created(shown, location=f"/commands/{command.id}", headers=headers)


def _shown(command: Command) -> dict[str, object]:
    """A command as clients see it."""
    return {
        "id": command.id,
        "project": command.project,
        "kind": command.kind,
        "status": command.status,
        "priority": command.priority,
        "attempt": command.attempt,
        "exit_code": command.exit_code,
        "signal": command.signal,
        "reason": command.reason,
        "may_still_run": command.may_still_run,
        "created_at": command.created_at,
        "started_at": command.started_at,
        "finished_at": command.finished_at,
        "duration_ms": command.duration_ms,
        "queue_wait_ms": command.queue_wait_ms,
        "stdout_bytes": command.stdout_bytes,
        "stderr_bytes": command.stderr_bytes,
        "dropped_bytes": command.dropped_bytes,
        "truncated": command.truncated,
        "argv": command.argv,
        "key_id": command.key_id,
        "session_id": command.session_id,
        "usage": command.usage,
        "kill": command.kill,
        "stream_url": f"/commands/{command.id}/events",
    }


def _project(text: str) -> ProjectId:
    """A well-formed project id. Errors: NOT_FOUND, as for one that does not exist."""
    if not is_project_id(text):
        raise RdevError(ErrorCode.NOT_FOUND, f"there is no project {text!r}")
    return ProjectId(text)


def _command(text: str) -> CommandId:
    """A well-formed command id. Errors: NOT_FOUND, as for one that does not exist."""
    if not is_command_id(text):
        raise RdevError(ErrorCode.NOT_FOUND, f"there is no command {text!r}")
    return CommandId(text)
