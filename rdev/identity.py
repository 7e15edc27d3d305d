"""Who this server is, over its restarts: what its state folder keeps.

The folder's lock makes it one server at a time; its files name the holder of leases and hold the
administrator's bootstrap key and the service's secret.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uuid_utils.compat

from rdev.adapters.postgres.state import hold_state
from rdev.config import ADMIN_KEY_CHARACTERS_MIN, Settings
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.purposes import SECRET_BYTES

# A larger file was not meant: a device, a log.
_SECRET_BYTES_MAX = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Names this server has for others. `holder` survives a restart: the state folder keeps it."""

    holder: str
    machine: str
    admin_key: str
    # What sessions and stream tokens are sealed with: the same on all servers of a service.
    secret: bytes = field(repr=False)
    # The secret is the state folder's, so that no other server has it.
    is_secret_own: bool
    # Where the key was written, when this start made it.
    made_admin_key: Path | None = None

    @property
    def secrets(self) -> list[str]:
        """What no log may show."""
        return [self.admin_key, self.secret.decode("latin-1").strip()]


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
            made_admin_key=key_file if is_first else None,
            secret=_secret(settings, state_dir / "secret"),
            is_secret_own=settings.secret_file is None,
        )


def secret_of(settings: Settings) -> bytes:
    """The secret that a server of these settings has. Errors: BAD_REQUEST where there is none."""
    kept = settings.state_dir / "secret"
    if settings.secret_file is None and not _text_in(kept):
        message = f"RDEV_SECRET_FILE is not set, and no server has made {kept} yet"
        raise RdevError(ErrorCode.BAD_REQUEST, message)
    return _secret(settings, kept)


def _secret(settings: Settings, kept: Path) -> bytes:
    """The bytes of `RDEV_SECRET_FILE`, else those of the state folder's own, made at the first
    start. Errors: BAD_REQUEST for a file that cannot serve."""
    if settings.secret_file is None:
        # As text: what was torn, or emptied, is seen before it seals anything.
        return _long_enough(_kept(kept, lambda: os.urandom(32).hex()), str(kept)).encode()
    try:
        with settings.secret_file.open("rb") as file:
            secret = file.read(_SECRET_BYTES_MAX + 1)
    except OSError as error:
        message = f"RDEV_SECRET_FILE: {settings.secret_file}: {error.strerror}"
        raise RdevError(ErrorCode.BAD_REQUEST, message) from error
    if not SECRET_BYTES <= len(secret) <= _SECRET_BYTES_MAX:
        message = f"RDEV_SECRET_FILE: must hold {SECRET_BYTES} to {_SECRET_BYTES_MAX} bytes"
        raise RdevError(ErrorCode.BAD_REQUEST, message)
    return secret


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
