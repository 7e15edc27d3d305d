"""`rdev audit`: verify the audit log, and say what verifies its checkpoints.

Without `--url` it reads the database of the settings itself and trusts no server. Exit status 1
where something is wrong, with the first seal that does not hold.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from rdev.adapters.checkpoints.lines import ForgedLine, Reader, Signer
from rdev.adapters.postgres.audit import PostgresAudit
from rdev.adapters.postgres.checks import check_dsn
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.embedded import running_embedded
from rdev.adapters.postgres.pool import open_pool
from rdev.cli.client import Json, open_client
from rdev.cli.failures import run_trio
from rdev.cli.settings import config_option, read_settings
from rdev.config import Settings
from rdev.domain.audit_chain import ChainFault, Checkpoint, FaultKind, Verdict
from rdev.domain.errors import ErrorCode, RdevError
from rdev.identity import secret_of
from rdev.services.audit_verify import AuditVerifier

# A batch of a verification is some ms; a database under load may take its time.
_STATEMENT_MS = 120_000


@click.group()
def audit() -> None:
    """Verify who did what."""


@audit.command()
@config_option
@click.option(
    "--checkpoints",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The file that RDEV_AUDIT_CHECKPOINT names, or what your URL has kept.",
)
@click.option("--public-key", help="What signed the checkpoints; default: of this secret.")
@click.option("--url", help="Ask this server instead of the database.")
@click.option("--key", envvar="RDEV_KEY", help="An API key for --url.")
def verify(
    config_file: Path | None,
    file: Path | None,
    public_key: str | None,
    url: str | None,
    key: str | None,
) -> None:
    """Compute the chain of the audit log anew.

    With --checkpoints it is also held against what was kept outside of the database: only so a tail
    that was cut off, or a chain that was computed anew, is found.
    """
    if url is not None:
        if not key or file is not None:
            raise click.UsageError("--url needs --key, and takes no --checkpoints")
        run_trio(lambda: _by_server(url, key))
        return
    settings = read_settings(config_file)
    run_trio(lambda: _by_database(settings, file, public_key))


@audit.command("key")
@config_option
def print_key(config_file: Path | None) -> None:
    """Print the public key that verifies the checkpoints; keep it where the database is not."""
    settings = read_settings(config_file)

    async def main() -> int:
        click.echo(_public_key(settings))
        return 0

    run_trio(main)


async def _by_database(settings: Settings, file: Path | None, public_key: str | None) -> int:
    kept = None
    if file is not None:
        kept = _Counted(file, Reader(public_key or _public_key(settings)))
    connection = ConnectionSettings(dsn=_dsn(settings), statement_timeout_ms=_STATEMENT_MS)
    async with open_pool(connection, max_size=2) as pool:
        verifier = AuditVerifier(chain=PostgresAudit(pool=pool))
        verdict = await verifier.verify()
        fault = verdict.fault
        if fault is None and kept is not None:
            now = datetime.now(UTC)  # noqa: TID251  (the edge of a program of its own)
            kept_since = now - timedelta(days=settings.audit_retention_days)
            fault = await _compare(verifier, kept, verdict, kept_since)
    if fault is not None:
        return _wrong({"kind": fault.kind, "seq": fault.seq, "message": fault.message})
    against = "" if kept is None else f"; {kept.count} checkpoints agree"
    click.echo(f"{verdict.checked} entries verified, up to {verdict.last.seq}{against}")
    return 0


class _Counted:
    """The checkpoints of a file, and how many there were."""

    def __init__(self, file: Path, reader: Reader) -> None:
        self._file = file
        self._reader = reader
        self.count = 0

    def __iter__(self) -> Iterator[Checkpoint]:
        with self._file.open("rb") as lines:
            for checkpoint in self._reader.checkpoints(lines):
                self.count += 1
                yield checkpoint


async def _compare(
    verifier: AuditVerifier, kept: _Counted, verdict: Verdict, kept_since: datetime
) -> ChainFault | None:
    try:
        return await verifier.compare(kept, dropped=verdict.dropped, kept_since=kept_since)
    except ForgedLine as forged:
        message = f"line {forged.number} of the checkpoints was not signed by this key"
        return ChainFault(kind=FaultKind.CHECKPOINT_FORGED, seq=forged.seq, message=message)


async def _by_server(url: str, key: str) -> int:
    checked, after, more = 0, 0, True
    async with open_client(url, key) as client:
        while more:
            verdict = await client.get(f"/audit/verify?after={after}")
            checked += int(str(verdict["checked"]))
            fault = verdict["fault"]
            if fault is not None:
                assert isinstance(fault, dict)
                return _wrong(fault)
            after, more = int(str(verdict["last_seq"])), bool(verdict["more"])
    click.echo(f"{checked} entries verified, up to {after}")
    return 0


def _wrong(fault: Json) -> int:
    click.echo(f"{fault['kind']} at {fault['seq']}: {fault['message']}", err=True)
    return 1


def _dsn(settings: Settings) -> str:
    if settings.database_dsn is not None:
        dsn = settings.database_dsn.get_secret_value()
        check_dsn(dsn)
        return dsn
    found = running_embedded(settings.state_dir)
    if found is None:
        message = f"no database is given and none runs in {settings.state_dir}: RDEV_DATABASE_DSN"
        raise RdevError(ErrorCode.BAD_REQUEST, message)
    return found


def _public_key(settings: Settings) -> str:
    return Signer(secret_of(settings), server="").public_key
