"""What `rdev doctor` looks at on this machine: files, limits, disk, certificates, tools, a server.

Bounds: each look is a few system calls, one command in a folder of its own, or one request.
"""

import os
import re
import resource
import shutil
import ssl
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final

import httpx2
import msgspec
from cryptography import x509

from rdev.adapters.execution.local import LocalExecutor
from rdev.adapters.postgres.checks import check_dsn
from rdev.adapters.postgres.embedded import running_embedded
from rdev.config import Settings, unknown_variables
from rdev.domain.findings import Finding, fail, ok, skipped, warn
from rdev.domain.ids import ProjectId
from rdev.execution_wiring import base_env

_DISK_WARN_BYTES: Final = 2 << 30
_DISK_FAIL_BYTES: Final = 200 << 20
_CERTIFICATE_WARN_DAYS: Final = 14
# Besides what settings bound: the database, webhooks, files of the server itself.
_DESCRIPTORS_BESIDES: Final = 300
_DESCRIPTORS_A_COMMAND: Final = 4
_ASK_S: Final = 3.0

# A line of /metrics, whose labels come in any order, and one of these.
_BREAKERS: Final = re.compile(r"^rdev_breakers\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="(\w+)"')
_BREAKER_ADVICE: Final = {
    "database": "see the check database; requests are answered 503 at once",
    "kubernetes": "see the checks kubernetes; nothing is claimed until the API server answers",
    "exec": "look at these projects' places; their commands wait in the queue",
    "webhook": "see what the endpoints answer (`rdev webhooks deliveries`); deliveries wait",
}


class HostChecks:
    """Findings about this machine, for one set of settings."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], *, now: Callable[[], datetime]
    ) -> None:
        """Opens nothing."""
        self._settings = settings
        self._environment = environment
        self._now = now

    async def settings(self) -> Finding:
        """All are known (their values were checked when they were read)."""
        unknown = unknown_variables(self._environment)
        if unknown:
            seen = f"not of this version: {', '.join(sorted(unknown))}"
            return warn(seen, "`rdev config show` lists the settings; look for a typing error")
        return ok("all known and in their ranges")

    async def secret(self) -> Finding:
        """Replicas share what seals sessions, webhook secrets and checkpoints."""
        if self._settings.secret_file is not None:
            return ok(f"RDEV_SECRET_FILE: {self._settings.secret_file}")
        if self._settings.is_embedded:
            return ok("kept in the state folder; this server has its database to itself")
        advice = "give all servers of this database the same RDEV_SECRET_FILE (32 random bytes)"
        return warn("RDEV_SECRET_FILE is not set, and the database may have other servers", advice)

    async def state_folder(self) -> Finding:
        """It and that of the projects can be written, and others of this machine cannot read the
        key in it."""
        folder = self._settings.state_dir
        for name, wanted in self._folders():
            place = _first_present(wanted)
            if not place.is_dir():
                return fail(f"{place} is no folder", f"name a folder in {name}, or move it away")
            if not os.access(place, os.W_OK | os.X_OK):
                return fail(f"{place} cannot be written", f"let rdev's user write {name}")
        key = folder / "admin-key"
        if key.exists() and key.stat().st_mode & 0o077:
            return fail(f"{key} can be read by others", f"chmod 600 {key}")
        present = _first_present(folder)
        return ok(f"{folder}" if folder.exists() else f"{folder} will be made in {present}")

    async def disk(self) -> Finding:
        """Room where the state and the projects are."""
        least, where = min(
            (shutil.disk_usage(place).free, place)
            for place in (_first_present(folder) for _, folder in self._folders())
        )
        seen = f"{least / (1 << 30):.1f} GiB free at {where}"
        advice = "make room; RDEV_LOG_MAX_BYTES and RDEV_RETENTION_DAYS bound what rdev keeps"
        if least < _DISK_FAIL_BYTES:
            return fail(seen, advice)
        return warn(seen, advice) if least < _DISK_WARN_BYTES else ok(seen)

    async def open_files(self) -> Finding:
        """Descriptors for all that the settings allow at once."""
        # The server raises its soft limit to the hard one.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = (
            self._settings.streams_max
            + self._settings.in_flight_max
            + self._settings.running_max * _DESCRIPTORS_A_COMMAND
            + _DESCRIPTORS_BESIDES
        )
        seen = f"{most} may be open; the settings allow what takes {needed}"
        if most >= needed:
            return ok(seen)
        advice = f"raise the hard limit to {needed} (LimitNOFILE), or lower RDEV_STREAMS_MAX"
        return warn(seen, advice)

    async def tls(self) -> Finding:
        """The certificate goes with its key, and is good for some time."""
        certificate, key = self._settings.tls_cert_file, self._settings.tls_key_file
        if certificate is None or key is None:
            return skipped("no certificate is set: TLS ends before rdev, or nowhere")
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            # With a passphrase, and be it a wrong one, nobody at the terminal is asked for it.
            context.load_cert_chain(certificate, key, password=lambda: "-")
            found = x509.load_pem_x509_certificate(certificate.read_bytes())
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            advice = "give a PEM chain and its own key, without a passphrase"
            return fail(f"{certificate}, {key}: {error}", advice)
        begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
        if begins > self._now():
            seen = f"{certificate} is valid only from {begins:%Y-%m-%d %H:%M} UTC on"
            return fail(seen, "no client accepts it yet; is this machine's clock right?")
        left_days = (ends - self._now()).total_seconds() / 86_400
        seen = f"{certificate} is valid until {ends:%Y-%m-%d}"
        if left_days <= 0:
            return fail(seen, "renew it: no client accepts it")
        return warn(seen, "renew it") if left_days < _CERTIFICATE_WARN_DAYS else ok(seen)

    async def proxies(self) -> Finding:
        """Whoever listens for others should know which of them are proxies."""
        host = self._settings.bind.rpartition(":")[0].strip("[]")
        if self._settings.trusted_proxies:
            nets = ", ".join(map(str, self._settings.trusted_proxies))
            return ok(f"addresses come from {nets}")
        if host in {"127.0.0.1", "::1", "localhost"} or self._settings.tls_cert_file is not None:
            return ok(f"listens on {self._settings.bind}; who connects is the client")
        advice = "name your proxy in RDEV_TRUSTED_PROXIES: else all its clients are one address"
        return warn(f"listens on {self._settings.bind} without TLS and trusts no proxy", advice)

    async def supervisor(self) -> Finding:
        """A local project has the tools that supervise commands."""
        with tempfile.TemporaryDirectory(prefix="rdev-doctor-") as folder:
            executor = LocalExecutor(
                projects_dir=Path(folder), base_env=base_env(), machine_id="doctor"
            )
            await executor.prepare(ProjectId("doctor"))
        return ok("this machine has what commands need (sh, setsid, dd, stat, mkfifo)")

    async def server(self) -> Finding:
        """A server that runs on this state folder says that it is ready."""
        answer = await self._ask_server("/ready")
        if isinstance(answer, Finding):
            return answer
        address = answer.url.netloc.decode()
        if answer.status_code == HTTPStatus.OK:
            return ok(f"ready at {address}")
        return fail(f"{address}: {_complaints(answer)}", "see the checks above, and its log")

    async def breakers(self) -> Finding:
        """None of the running server's is open."""
        answer = await self._ask_server("/metrics")
        if isinstance(answer, Finding):
            return answer
        found = [
            (dict(_LABEL.findall(labels)), float(count))
            for labels, count in _BREAKERS.findall(answer.text)
        ]
        if not found:
            return skipped(f"{answer.url.netloc.decode()} tells nothing of them")
        shut = [
            (told["breaker"], told["state"], f"{count:.0f} ({told['reason']})")
            for told, count in found
            if told["state"] != "closed" and count
        ]
        seen = ", ".join(f"{breaker} {state}: {how}" for breaker, state, how in shut)
        advice = dict.fromkeys(_advice_on(breaker) for breaker, state, _ in shut if state == "open")
        return warn(seen, "; ".join(advice)) if advice else ok(seen or "all closed")

    async def _ask_server(self, path: str) -> httpx2.Response | Finding:
        """What the server on this state folder answers; `skipped` where there is none."""
        try:
            address = (self._settings.state_dir / "address").read_text(errors="replace").strip()
        except OSError:
            return skipped(f"none has run in {self._settings.state_dir}")
        scheme = "http" if self._settings.tls_cert_file is None else "https"
        try:
            async with httpx2.AsyncClient(verify=False, trust_env=False, timeout=_ASK_S) as client:
                return await client.get(f"{scheme}://{address}{path}")
        except (httpx2.TransportError, httpx2.InvalidURL):
            return skipped(f"none answers at {address}")

    def database_dsn(self) -> str | None:
        """Where the database is; None for an embedded one that does not run. Errors: BAD_REQUEST
        for what is no DSN."""
        if self._settings.database_dsn is not None:
            dsn = self._settings.database_dsn.get_secret_value()
            check_dsn(dsn)
            return dsn
        return running_embedded(self._settings.state_dir)

    def _folders(self) -> list[tuple[str, Path]]:
        """What is written to, by the setting that names it."""
        wanted = [("RDEV_STATE_DIR", self._settings.state_dir)]
        if self._settings.executor == "local":
            wanted.append(("RDEV_PROJECTS_DIR", self._settings.projects_folder))
        return wanted


class _CheckBody(msgspec.Struct):
    status: str
    message: str = ""


class _ReadyBody(msgspec.Struct):
    status: str
    checks: dict[str, _CheckBody]


def _advice_on(breaker: str) -> str:
    return _BREAKER_ADVICE.get(breaker, f"see `rdev_breakers` of {breaker} in /metrics")


def _first_present(folder: Path) -> Path:
    """The folder, or what there is above it."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _complaints(answer: httpx2.Response) -> str:
    try:
        body = msgspec.json.decode(answer.content, type=_ReadyBody)
    except msgspec.DecodeError:
        return f"status {answer.status_code}"
    bad = [f"{name}: {check.message}" for name, check in body.checks.items() if check.message]
    return "; ".join(bad) or body.status


def utc_now() -> datetime:
    """The present moment."""
    return datetime.now(UTC)  # noqa: TID251  (this is the `now` that is injected)
