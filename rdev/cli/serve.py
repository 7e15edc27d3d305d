"""`rdev serve`: run the server until it is told to stop."""

import logging
import os
import sys
from pathlib import Path

import click

from rdev.adapters.telemetry.logs import Levels, bridge_python, configure_logs
from rdev.app import serve as run_server
from rdev.cli.failures import run_trio
from rdev.cli.settings import config_option, read_settings
from rdev.config import SettingsError, load_settings
from rdev.identity import open_identity

_log = logging.getLogger("rdev")


@click.command()
@config_option
def serve(config_file: Path | None) -> None:
    """Run the server. SIGTERM leaves the commands running, Ctrl-C ends them, SIGHUP has the levels
    of the log read again."""
    settings = read_settings(config_file)

    async def main() -> int:
        with open_identity(settings) as identity:
            levels = configure_logs(
                level=settings.log_level,
                levels=settings.logger_levels,
                secrets=identity.secrets,
            )
            bridge_python()
            if identity.made_admin_key is not None:
                tell_admin_key(identity.admin_key, identity.made_admin_key)
            await run_server(settings, identity, reload=lambda: _reload(levels, config_file))
        return 0

    run_trio(main)


def _reload(levels: Levels, config_file: Path | None) -> None:
    """Read the levels again; all other settings are for a restart. What cannot be read changes
    nothing."""
    try:
        settings = load_settings(os.environ, config_file)
    except SettingsError as error:
        _log.warning("settings not read again", extra={"error": str(error)})
        return
    levels.set(settings.log_level, settings.logger_levels)
    _log.info("levels of the log read again", extra={"log_level": settings.log_level})


def tell_admin_key(key: str, path: Path) -> None:
    """The first start makes the key: shown on a terminal, elsewhere only where it was written."""
    if sys.stderr.isatty():
        click.echo(f"rdev: the admin key is {key} (kept in {path})", err=True)
    else:
        click.echo(f"rdev: the admin key was written to {path}", err=True)
