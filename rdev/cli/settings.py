"""Reading the settings on the command line: faults end the program with status 2."""

import os
from collections.abc import Callable
from pathlib import Path

import click

from rdev.config import Settings, SettingsError, load_settings, unknown_variables

config_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A TOML file with settings; the environment goes before it.",
)


def read_settings(config_file: Path | None) -> Settings:
    """The settings; every fault is printed, then exit status 2."""
    try:
        settings = load_settings(os.environ, config_file)
    except SettingsError as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None
    for name in unknown_variables(os.environ):
        click.echo(f"{name}: not a setting of this version of rdev, ignored", err=True)
    return settings
