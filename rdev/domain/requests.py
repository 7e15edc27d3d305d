"""What a client may ask to run: `POST …/shell`, `…/git` and `…/claude`, parsed with all faults.

One place per field; the limits are those of the project's kernel or of the HTTP contract.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rdev.domain.claude import ClaudeRequest, read_claude
from rdev.domain.commands import Kind, Priority, Retry
from rdev.domain.execution import ENV_NAME, is_env_name
from rdev.domain.fields import Characters, Fields, Json, size_fault, text_fault
from rdev.domain.git import check_args

# MAX_ARG_STRLEN of Linux is 131,072 with its NUL: one argv element or one NAME=value.
ARG_MAX_BYTES = 131_071
ARGS_MAX_ITEMS = 1_000
ENV_MAX_ITEMS = 200
ENV_NAME_MAX_BYTES = 256
# The kernel's limit for argv and environment together is at least 2 MiB; half of it is ours.
ENV_MAX_BYTES = 524_288
STDIN_MAX_BYTES = 524_288
CWD_MAX_BYTES = 4_096
TIMEOUT_MAX_S = 86_400
EXPIRES_MAX_S = 604_800
ENV_RULE = (
    f"at most {ENV_MAX_ITEMS} entries, {ENV_MAX_BYTES} bytes in all; names: letters, digits and _,"
    f" no digit first, at most {ENV_NAME_MAX_BYTES} bytes, not RDEV_…; values: strings without NUL,"
    f" name, = and value at most {ARG_MAX_BYTES} bytes"
)
_CWD_RULE = (
    "relative to the project's folder, without `..`; its text is judged, symbolic links inside the"
    " project are followed"
)
DEFAULT_TIMEOUT_S: Mapping[Kind, int] = {Kind.SHELL: 600, Kind.GIT: 600, Kind.CLAUDE: 1_800}


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The fields that every kind of command takes."""

    env: Mapping[str, str]
    cwd: str
    stdin: bytes
    timeout_s: int
    priority: Priority
    expires_in_s: int | None
    retry: Retry


def read_common(fields: Fields, kind: Kind, *, stdin: bool = True) -> Common:
    """Read the common fields; faults stay in `fields`. Claude takes no stdin."""
    text = (
        fields.text("stdin", max_bytes=STDIN_MAX_BYTES, characters=Characters.ANY)
        if stdin
        else None
    )
    about = f"default {DEFAULT_TIMEOUT_S[kind]}; kept in the project, also when no rdev runs"
    timeout_s = fields.integer("timeout_s", least=1, most=TIMEOUT_MAX_S, about=about)
    return Common(
        env=read_env(fields),
        cwd=_cwd(fields),
        stdin=(text or "").encode(),
        timeout_s=timeout_s or DEFAULT_TIMEOUT_S[kind],
        priority=Priority(
            fields.choice("priority", [*Priority], about="default normal") or Priority.NORMAL
        ),
        expires_in_s=fields.integer(
            "expires_in_s", least=1, most=EXPIRES_MAX_S, about="give up if not started by then"
        ),
        retry=Retry(
            fields.choice(
                "retry",
                [*Retry],
                about="default never; safe: run it again when it provably did not finish",
            )
            or Retry.NEVER
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShellRequest:
    """`sh -c command` in the project."""

    command: str
    common: Common


def parse_shell(body: Json) -> ShellRequest:
    """Errors: BAD_REQUEST with every fault of the body."""
    fields = Fields(body)
    command = fields.text(
        "command", max_bytes=ARG_MAX_BYTES, required=True, characters=Characters.NO_NUL
    )
    common = read_common(fields, Kind.SHELL)
    fields.finish()
    assert command is not None
    return ShellRequest(command=command, common=common)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaudeSubmission:
    """The coding agent in the project."""

    request: ClaudeRequest
    common: Common


def parse_claude(body: Json) -> ClaudeSubmission:
    """Errors: BAD_REQUEST with every fault of the body."""
    fields = Fields(body)
    request = read_claude(fields)
    common = read_common(fields, Kind.CLAUDE, stdin=False)
    fields.finish()
    return ClaudeSubmission(request=request, common=common)


@dataclass(frozen=True, slots=True, kw_only=True)
class GitRequest:
    """git with an argv, no shell."""

    args: tuple[str, ...]
    common: Common


def parse_git(body: Json) -> GitRequest:
    """Errors: BAD_REQUEST with every fault of the body."""
    fields = Fields(body)
    args = fields.texts(
        "args",
        min_items=1,
        max_items=ARGS_MAX_ITEMS,
        max_bytes=ARG_MAX_BYTES,
        required=True,
        characters=Characters.NO_NUL,
        about="what stands behind `git`; sub-command and options from an allow-list",
    )
    common = read_common(fields, Kind.GIT)
    fields.faults += check_args(args, common.env) if args is not None else []
    fields.finish()
    assert args is not None
    return GitRequest(args=args, common=common)


def read_env(fields: Fields, *, about: str = ENV_RULE) -> Mapping[str, str]:
    """The field `env`; faults stay in `fields`."""
    given = fields.entries(
        "env",
        max_items=ENV_MAX_ITEMS,
        max_bytes=ARG_MAX_BYTES,
        pattern=ENV_NAME,
        about=about,
    )
    if given is None:
        return {}
    env: dict[str, str] = {}
    for name, value in given.items():
        if (message := _name_fault(name)) is not None:
            fields.fault("env", message, within=name)
        elif not isinstance(value, str):
            fields.fault("env", "must be a string", within=name)
        elif (message := size_fault(f"{name}={value}", max_bytes=ARG_MAX_BYTES)) is not None:
            fields.fault("env", f"{message}, its name and = included", within=name, limit=True)
        elif (message := text_fault(value, Characters.NO_NUL)) is not None:
            fields.fault("env", message, within=name)
        else:
            env[name] = value
    size_bytes = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
    if size_bytes > ENV_MAX_BYTES:
        message = f"must be at most {ENV_MAX_BYTES} bytes in all (it has {size_bytes})"
        fields.fault("env", message, limit=True)
    return env


def _name_fault(name: str) -> str | None:
    if not is_env_name(name):
        return "must have a name that a POSIX shell can export: letters, digits and _"
    if size_fault(name, max_bytes=ENV_NAME_MAX_BYTES) is not None:
        return f"must have a name of at most {ENV_NAME_MAX_BYTES} bytes"
    if name.startswith("RDEV_"):
        return "names that begin with RDEV_ belong to rdev"
    return None


def _cwd(fields: Fields) -> str:
    cwd = (
        fields.text("cwd", max_bytes=CWD_MAX_BYTES, characters=Characters.NO_NUL, about=_CWD_RULE)
        or ""
    )
    parts = cwd.split("/")
    if cwd.startswith("/") or ".." in parts:
        fields.fault("cwd", "must be a path inside the project's folder, without ..")
        return ""
    return "/".join(part for part in parts if part not in ("", "."))
