"""`rdev doctor`: is this installation well, and what to do where it is not.

It opens nothing for writing but a temporary folder, and may run beside a server. Exit status: 0
where nothing failed (warnings are told), 1 where something did, 2 for settings that cannot be read.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import click
import msgspec

from rdev.adapters.kubernetes.connection import connect, read_config
from rdev.adapters.kubernetes.namespace import Namespace
from rdev.adapters.kubernetes.rights import Right, missing_rights
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.doctor import DatabaseDoctor
from rdev.cli.failures import run_trio
from rdev.cli.settings import config_option, read_settings
from rdev.config import Settings
from rdev.domain.findings import Finding, Level, fail, ok, skipped
from rdev.host_checks import HostChecks, utc_now
from rdev.services.doctor import Check, examine

# What deploy/k8s/base/access.yaml grants; a test compares.
RIGHTS = (
    Right(verb="get", resource="namespaces"),
    *(Right(verb=verb, resource="pods") for verb in ("create", "delete", "get", "list", "watch")),
    *(Right(verb=verb, resource="persistentvolumeclaims") for verb in ("create", "delete", "get")),
    Right(verb="get", resource="pods/exec"),
    Right(verb="create", resource="pods/exec"),
)
_Ask = Callable[[DatabaseDoctor], Awaitable[Finding]]
_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red", Level.SKIPPED: "cyan"}


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def doctor(config_file: Path | None, as_json: bool) -> None:
    """Check this installation and say what to do."""
    settings = read_settings(config_file)

    async def main() -> int:
        found = await examine(checks_of(settings))
        for name, finding in found.items():
            click.echo(_as_json(name, finding) if as_json else _as_text(name, finding))
        return 1 if any(finding.level is Level.FAIL for finding in found.values()) else 0

    run_trio(main)


def checks_of(settings: Settings) -> Mapping[str, Check]:
    """Every check, by its name; the order is that of the report."""
    host = HostChecks(settings, os.environ, now=utc_now)
    checks = {
        "settings": Check(look=host.settings, advice=""),
        "secret": Check(look=host.secret, advice=""),
        "state_folder": Check(look=host.state_folder, advice="see RDEV_STATE_DIR"),
        "disk": Check(look=host.disk, advice="see RDEV_STATE_DIR"),
        "open_files": Check(look=host.open_files, advice=""),
        "tls": Check(look=host.tls, advice="see RDEV_TLS_CERT_FILE"),
        "proxies": Check(look=host.proxies, advice=""),
        **_database_checks(settings, host),
    }
    if settings.executor == "kubernetes":
        checks |= _cluster_checks(settings)
    else:
        advice = "install what is missing (Debian: util-linux, coreutils)"
        checks["supervisor"] = Check(look=host.supervisor, advice=advice)
    checks["server"] = Check(look=host.server, advice="see its log")
    checks["breakers"] = Check(look=host.breakers, advice="see its log")
    return checks


def _database_checks(settings: Settings, host: HostChecks) -> dict[str, Check]:
    def of(ask: _Ask, advice: str, *needs: str) -> Check:
        async def look() -> Finding:
            dsn = host.database_dsn()  # of an embedded one known only while it runs
            if dsn is None:
                return skipped(f"embedded in {settings.state_dir}; runs with `rdev serve`")
            connection = ConnectionSettings(dsn=dsn)
            most = settings.database_pool_max
            return await ask(DatabaseDoctor(connection, pool_max=most, now=utc_now))

        return Check(look=look, advice=advice, needs=needs)

    return {
        "database": of(
            DatabaseDoctor.reachable, "see RDEV_DATABASE_DSN; is it up, and may this user connect?"
        ),
        "migrations": of(
            DatabaseDoctor.migrations,
            "run `rdev migrate up` as the owner of the schema",
            "database",
        ),
        "rights": of(DatabaseDoctor.rights, "grant rdev_app to the login", "migrations"),
        "clock": of(DatabaseDoctor.clock, "synchronise both clocks (NTP)", "database"),
        "connections": of(DatabaseDoctor.connections, "", "database"),
        "transactions": of(DatabaseDoctor.transactions, "", "database"),
        "audit": of(DatabaseDoctor.audit, "", "migrations"),
        "webhooks": of(DatabaseDoctor.webhooks, "", "migrations"),
        "queue": of(DatabaseDoctor.queue, "", "migrations"),
    }


def _cluster_checks(settings: Settings) -> dict[str, Check]:
    async def reachable() -> Finding:
        async with connect(read_config(settings.kubeconfig), settings.namespace) as api:
            await Namespace(api).check()
            return ok(f"namespace {api.namespace} at {api.http.base_url}")

    async def rights() -> Finding:
        async with connect(read_config(settings.kubeconfig), settings.namespace) as api:
            missing = await missing_rights(api, RIGHTS)
        if not missing:
            return ok("all that access.yaml grants")
        told = ", ".join(map(str, missing))
        return fail(f"may not {told}", "apply deploy/k8s/base/access.yaml in this namespace")

    advice = "see RDEV_KUBECONFIG and RDEV_NAMESPACE, and docs/operations/deployment.md"
    return {
        "kubernetes": Check(look=reachable, advice=advice),
        "kubernetes_rights": Check(look=rights, advice=advice),
    }


def _as_json(name: str, finding: Finding) -> str:
    body = {"check": name, "level": finding.level, "seen": finding.seen, "advice": finding.advice}
    return msgspec.json.encode(body).decode()


def _as_text(name: str, finding: Finding) -> str:
    level = click.style(f"{finding.level:8}", fg=_COLOURS[finding.level])
    advice = f"\n{'':27}→ {finding.advice}" if finding.advice else ""
    return f"{level} {name:17} {finding.seen}{advice}"
