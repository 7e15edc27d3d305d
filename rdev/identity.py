"""Who this server is, over its restarts: what its state folder keeps.

The folder's lock makes it one server at a time; its files name the holder of leases and hold the
administrator's bootstrap key.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uuid_utils.compat

from rdev.adapters.postgres.state import hold_state
from rdev.config import ADMIN_KEY_CHARACTERS_MIN, Settings
from rdev.domain.errors import ErrorCode, RdevError


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Names this server has for others. `holder` survives a restart: the state folder keeps it."""

    holder: str
    machine: str
    admin_key: str
    # What keeps secrets at rest; the same for all servers of one database.
    secret: bytes
    # Where the key was written, when this start made it.
    made_admin_key: Path | None = None


@contextmanager
def open_identity(settings: Settings) -> Iterator[Identity]:
    """Hold the state folder, and find or make there what names this server and its admin key.

    Errors: CONFLICT when another server holds the folder.
    """
    with hold_state(settings.state_dir) as state_dir:
        key_file = state_dir / "admin-key"
        given = _given_admin_key(settings)
        is_first = given is None and not _text_in(key_file)
        yield Identity(
            holder=_kept(state_dir / "server-id", _new_name),
            machine=_machine(),
            admin_key=given or _long_enough(_kept(key_file, _new_admin_key), str(key_file)),
            secret=_secret(settings, state_dir),
            made_admin_key=key_file if is_first else None,
        )


def _given_admin_key(settings: Settings) -> str | None:
    """The bootstrap key of the settings. Errors: BAD_REQUEST for a file that cannot serve."""
    if settings.admin_key is not None:
        return settings.admin_key.get_secret_value()
    if settings.admin_key_file is None:
        return None
    try:
        key = settings.admin_key_file.read_text().strip()
    except OSError as error:
        message = f"RDEV_ADMIN_KEY_FILE: {settings.admin_key_file}: {error.strerror}"
        raise RdevError(ErrorCode.BAD_REQUEST, message) from error
    return _long_enough(key, "RDEV_ADMIN_KEY_FILE")


def _secret(settings: Settings, state_dir: Path) -> bytes:
    """What `RDEV_SECRET_FILE` holds, else what the first start made. Errors: BAD_REQUEST."""
    path = settings.secret_file
    if path is None:
        return _kept(state_dir / "secret", lambda: os.urandom(32).hex()).encode()
    try:
        return path.read_bytes().strip()
    except OSError as error:
        message = f"RDEV_SECRET_FILE: {path}: {error.strerror}"
        raise RdevError(ErrorCode.BAD_REQUEST, message) from error


def _long_enough(key: str, where: str) -> str:
    """The key itself. Errors: BAD_REQUEST: an empty key would let everybody in."""
    if len(key) < ADMIN_KEY_CHARACTERS_MIN:
        message = f"{where}: must hold at least {ADMIN_KEY_CHARACTERS_MIN} characters"
        raise RdevError(ErrorCode.BAD_REQUEST, message)
    return key


def _kept(path: Path, make: Callable[[], str]) -> str:
    """The text in a file of the state folder, made at the first start (mode 0600), by rename: a
    crash leaves no half of it."""
    if text := _text_in(path):
        return text
    text = make()
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(descriptor)
    fresh.rename(path)
    return text


def _text_in(path: Path) -> str:
    """What is in the file, "" where there is none. Errors: BAD_REQUEST for what is no text."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise RdevError(ErrorCode.BAD_REQUEST, f"{path} is no UTF-8 text") from error


def _machine() -> str:
    """What names this machine for the reach of local projects."""
    try:
        return Path("/etc/machine-id").read_text().strip() or "machine"
    except FileNotFoundError:
        return os.uname().nodename


def _new_admin_key() -> str:
    return f"rdev_admin_{os.urandom(24).hex()}"


def _new_name() -> str:
    return uuid_utils.compat.uuid7().hex
