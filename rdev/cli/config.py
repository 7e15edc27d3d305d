"""`rdev config show`."""

from pathlib import Path

import click
from pydantic import SecretStr

from rdev.cli.settings import config_option, read_settings


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command()
@config_option
def show(config_file: Path | None) -> None:
    """Print the effective settings, secrets redacted."""
    settings = read_settings(config_file)
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        shown = "(secret)" if isinstance(value, SecretStr) else value
        click.echo(f"{name} = {'' if shown is None else shown}")
