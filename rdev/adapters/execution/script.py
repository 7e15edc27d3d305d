"""The text that runs in a project, and how a command's spec becomes part of it.

Owns the quoting. The text (start.sh, supervisor.sh, attach.sh: 15 KB) travels over the exec's stdin
with its length in front, so nothing has to be installed in a project and no secret is ever an
argument of a process. Only names of folders and numbers are.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Final

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Spec, is_env_name

# Linux: MAX_ARG_STRLEN (32 pages) less the NUL, for an argument as for a `NAME=value`.
MAX_STRING_BYTES: Final = 131_071

# Reads exactly the announced bytes (dd, since busybox's head takes more than it gives) and refuses
# what is short: a stream that was cut is not a script.
_BOOTSTRAP: Final = (
    '[ -z "$1" ] || { PATH=$1; export PATH; }; shift; LC_ALL=C; IFS= read -r N'
    ' && TEXT=$(dd bs="$N" count=1 iflag=fullblock 2>/dev/null)'
    ' && [ "${#TEXT}" = "$N" ] && eval "$TEXT"'
)


def _without_comments(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def _read_text() -> bytes:
    folder = files("rdev.adapters.execution")
    names = ("start.sh", "supervisor.sh", "attach.sh")
    parts = (folder.joinpath(name).read_text("utf-8") for name in names)
    return "\n".join(_without_comments(part) for part in parts).encode("ascii")


_TEXT: Final = _read_text()


def argv(shell: str, path: str | None, verb: str, *arguments: str | int) -> tuple[str, ...]:
    """The exec that runs a verb: the bootstrap, names of folders, numbers; no secrets. `path` is
    the PATH, None for the one that is there."""
    words = (verb, *(str(argument) for argument in arguments))
    return (shell, "-c", _BOOTSTRAP, shell, path or "", *words)


def payload(become: bytes = b"", stdin: bytes = b"") -> bytes:
    """What is sent first over the exec's stdin: length, text, the command's stdin."""
    text = b"\n".join((become, _TEXT, b'"$@"'))
    return b"%d\n%s%s" % (len(text), text, stdin)


def become(spec: Spec, base_env: Mapping[str, str], marker: str) -> bytes:
    """The shell function that turns its process into the command.

    Order matters: `cd` before a CDPATH is set; the locale last, since it changes how a shell reads
    what follows; nothing of our own is used after the first `export`.
    Errors: BAD_REQUEST for what no process can be given (NUL, an argument over
    `MAX_STRING_BYTES`) and for names that a POSIX shell cannot export.
    """
    env = {**base_env, **spec.env, "RDEV_COMMAND_ID": marker}
    names = sorted(env, key=lambda name: (name.startswith(("LC_", "LANG")), name))
    words = b" ".join(_quote("argument", word) for word in spec.argv)
    lines = [
        b"become() {",
        b"cd " + _quote("cwd", f"./{spec.cwd}") + b" || exit 126",
        b"set -- " + words,
        b"unset OLDPWD SHLVL",
        *(_export(name, env[name]) for name in names),
        b'exec "$@"',
        b"}",
    ]
    return b"\n".join(lines)


def _export(name: str, value: str) -> bytes:
    if not is_env_name(name):
        raise RdevError(ErrorCode.BAD_REQUEST, f"environment name {name!r} cannot be set")
    _quote(name, f"{name}={value}")
    return b"export " + name.encode() + b"=" + _quote(name, value)


def _quote(what: str, text: str) -> bytes:
    """In single quotes every byte but the quote stands for itself."""
    raw = text.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise RdevError(ErrorCode.BAD_REQUEST, f"{what} contains a NUL byte")
    if len(raw) > MAX_STRING_BYTES:
        raise RdevError(ErrorCode.BAD_REQUEST, f"{what} is longer than {MAX_STRING_BYTES} bytes")
    return b"'" + raw.replace(b"'", b"'\\''") + b"'"


def folder(commands_dir: str, attempt: str) -> str:
    """An attempt's folder."""
    return f"{commands_dir.rstrip('/')}/{attempt}"
