"""A PostgreSQL cluster in a state folder: which files, which settings, which command lines.

Owns `<state_dir>/postgres` (data), `run` (the unix socket) and `postgres.log`. Starts nothing: the
embedded server and the tests run these command lines, each in its own way. Everything here blocks
on the file system only.
"""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from psycopg.conninfo import make_conninfo

from rdev.adapters.postgres.binaries import Binaries, Identity
from rdev.domain.errors import ErrorCode, RdevError

DATABASE: Final = "rdev"
SUPERUSER: Final = "postgres"
PORT: Final = "5432"  # only a part of the socket's name
SOCKET_NAMES: Final = (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock")
CONNECT_TIMEOUT_S: Final = 10

# sun_path of sockaddr_un: 108 bytes with the final NUL (Linux, unix(7)).
SOCKET_PATH_MAX_BYTES: Final = 107
TEMPORARY_PREFIX: Final = "rdev-"

# C locale: the same order on every machine, and no index breaks with a new libc. initdb syncs what
# it wrote: 0.2 s of 0.6 s, once, for a cluster that survives a power cut.
INITDB_OPTIONS: Final = (
    "--encoding=UTF8",
    "--locale=C",
    "--data-checksums",
    "--auth-local=trust",  # the socket's folder is private (0700): who reaches it is trusted
    "--auth-host=reject",
    f"--username={SUPERUSER}",
    "--no-instructions",
)

SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "port": PORT,
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "huge_pages": "off",
    "jit": "off",  # all queries are short
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    # An error goes to the client; its statement may be large and is not for a file.
    "log_min_error_statement": "panic",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What lies where in a state folder (an absolute path)."""

    state_dir: Path

    @property
    def data(self) -> Path:
        """The data folder: a complete cluster from the moment it holds `PG_VERSION`."""
        return self.state_dir / "postgres"

    @property
    def unfinished(self) -> Path:
        """Where initdb works; what a killed one left here is thrown away."""
        return self.state_dir / "postgres.unfinished"

    @property
    def log(self) -> Path:
        """The server's stderr."""
        return self.state_dir / "postgres.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class PidFile:
    """`postmaster.pid`. Source: PostgreSQL, src/include/utils/pidfile.h."""

    pid: int
    socket_dir: Path | None  # None in the first moments of a start
    shm_id: int | None
    stopping: bool


def read_pid_file(data: Path) -> PidFile | None:
    """What the last server of this data folder left there; None when it stopped in good order."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        shm = lines[6].split() if len(lines) > 6 else []
        return PidFile(
            pid=int(lines[0]),
            socket_dir=Path(lines[4]) if lines[4] else None,
            shm_id=int(shm[1]) if len(shm) > 1 else None,
            stopping=len(lines) > 7 and lines[7].strip() == "stopping",
        )
    except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
        # Cut short: its writer died before it opened the socket.
        return None


def is_postmaster(found: PidFile, data: Path) -> bool:
    """Whether that process lives and is a server on this data folder: its working directory."""
    proc = Path(f"/proc/{found.pid}")
    try:
        if (proc / "comm").read_text().strip() != "postgres":
            return False
        return (proc / "cwd").samefile(data)
    except PermissionError:
        # Root without CAP_SYS_PTRACE (a container) may not look at another user's process.
        return attached(found) > 0
    except OSError:
        return False


def attached(found: PidFile) -> int:
    """How many processes, the server or its orphans, use the server's shared memory."""
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1]) == found.shm_id:
            return int(fields[6])
    return 0


def data_major(data: Path) -> int | None:
    """The major version that made the data folder; None when there is no cluster yet."""
    try:
        text = (data / "PG_VERSION").read_text()
    except FileNotFoundError:
        return None
    match = re.match(r"\d+", text)
    if match is None:
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, f"{data}/PG_VERSION is damaged")
    return int(match[0])


def prepare_initdb(files: Files, identity: Identity) -> None:
    """An empty folder for initdb, owned by the one who runs it."""
    shutil.rmtree(files.unfinished, ignore_errors=True)
    files.unfinished.mkdir(mode=0o700)
    identity.own(files.unfinished)


def initdb_argv(files: Files, binaries: Binaries, identity: Identity) -> list[str]:
    """The command that makes a cluster in `files.unfinished`."""
    initdb = str(binaries.folder / "initdb")
    return [*identity.wrapper, initdb, "-D", str(files.unfinished), *INITDB_OPTIONS]


def finish_initdb(files: Files) -> None:
    """Give the complete cluster its name, durably: a killed initdb never looks like a cluster."""
    try:
        files.unfinished.rename(files.data)
    except OSError as error:
        message = f"cannot make the database in {files.data}: {error.strerror}"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message) from error
    folder = os.open(files.state_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def server_argv(
    files: Files,
    binaries: Binaries,
    identity: Identity,
    socket_dir: Path,
    settings: Mapping[str, str],
) -> list[str]:
    """The command that serves `files.data` on a socket in that folder. Settings stand here and not
    in the data folder, so that a new rdev brings its own."""
    # In this list setting a comma separates and double quotes quote (doubled inside).
    quoted = '"' + str(socket_dir).replace('"', '""') + '"'
    every = {**settings, "unix_socket_directories": quoted}
    options = [part for name, value in every.items() for part in ("-c", f"{name}={value}")]
    return [*identity.wrapper, str(binaries.folder / "postgres"), "-D", str(files.data), *options]


def make_socket_dir(files: Files, identity: Identity, previous: Path | None) -> Path:
    """A private folder for the socket: `<state_dir>/run`, or a temporary one when too deep.

    `previous` is the folder of the last server: reused when still private, so that crashes do not
    pile up temporary folders.
    """
    folder = files.state_dir / "run"
    # libpq takes a comma in a host as the end of its name.
    if _fits(folder) and "," not in str(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    elif previous is not None and is_temporary(previous) and _is_private(previous, identity):
        folder = previous
    else:
        # Room for the eight characters that mkdtemp appends.
        usual = Path(tempfile.gettempdir())
        parent = usual if _fits(usual / (TEMPORARY_PREFIX + "x" * 8)) else Path("/tmp")  # noqa: S108 - made private by mkdtemp
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent))
    identity.own(folder)
    return folder


def is_temporary(socket_dir: Path) -> bool:
    """Whether the folder was made by `make_socket_dir` outside the state folder."""
    return socket_dir.name.startswith(TEMPORARY_PREFIX)


def remove_temporary(socket_dir: Path) -> None:
    """Remove a temporary socket folder with what a killed server left in it."""
    if is_temporary(socket_dir):
        # What cannot be removed is an empty private folder: no reason to fail a stop.
        shutil.rmtree(socket_dir, ignore_errors=True)


def conninfo(socket_dir: Path, database: str = DATABASE) -> str:
    """How to reach a database of the cluster as its superuser."""
    return make_conninfo(
        host=str(socket_dir),
        port=PORT,
        user=SUPERUSER,
        dbname=database,
        connect_timeout=CONNECT_TIMEOUT_S,
    )


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / SOCKET_NAMES[0])) <= SOCKET_PATH_MAX_BYTES


def _is_private(folder: Path, identity: Identity) -> bool:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    owner = os.geteuid() if identity.uid is None else identity.uid
    return stat.S_ISDIR(found.st_mode) and (found.st_uid, found.st_mode & 0o777) == (owner, 0o700)
