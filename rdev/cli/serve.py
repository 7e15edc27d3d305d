"""`rdev serve`: run the server until it is told to stop."""

import sys
from pathlib import Path

import click

from rdev.adapters.telemetry.logs import configure_logs
from rdev.app import serve as run_server
from rdev.cli.failures import run_trio
from rdev.cli.settings import config_option, read_settings
from rdev.identity import open_identity


@click.command()
@config_option
def serve(config_file: Path | None) -> None:
    """Run the server. SIGTERM leaves the commands running, Ctrl-C ends them."""
    settings = read_settings(config_file)

    async def main() -> int:
        with open_identity(settings) as identity:
            configure_logs(level=settings.log_level, secrets=identity.secrets)
            if identity.made_admin_key is not None:
                tell_admin_key(identity.admin_key, identity.made_admin_key)
            await run_server(settings, identity)
        return 0

    run_trio(main)


def tell_admin_key(key: str, path: Path) -> None:
    """The first start makes the key: shown on a terminal, elsewhere only where it was written."""
    if sys.stderr.isatty():
        click.echo(f"rdev: the admin key is {key} (kept in {path})", err=True)
    else:
        click.echo(f"rdev: the admin key was written to {path}", err=True)
