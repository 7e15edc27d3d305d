"""`rdev migrate up|down|status|verify`."""

from collections.abc import Callable
from pathlib import Path

import click

from rdev.adapters.postgres import migrate as migrations
from rdev.adapters.postgres.checks import check_dsn
from rdev.adapters.postgres.embedded import running_embedded
from rdev.cli.settings import config_option, read_settings
from rdev.domain.errors import RdevError


@click.group()
def migrate() -> None:
    """Change the database's schema. `rdev serve` does it by itself only when embedded."""


@migrate.command()
@config_option
@click.option("--to", help="The last version to apply.")
def up(config_file: Path | None, to: str | None) -> None:
    """Apply what is pending."""
    _each(config_file, lambda dsn: [f"applied {name}" for name in migrations.up(dsn, to)])


@migrate.command()
@config_option
@click.option("--steps", default=1, show_default=True)
def down(config_file: Path | None, steps: int) -> None:
    """Take back the last migrations. What they made, data included, is gone."""
    _each(config_file, lambda dsn: [f"took back {name}" for name in migrations.down(dsn, steps)])


@migrate.command()
@config_option
def status(config_file: Path | None) -> None:
    """List every migration and its state."""
    _each(
        config_file,
        lambda dsn: [
            f"{line.version}\t{line.state}\t{line.name}" for line in migrations.status(dsn)
        ],
    )


@migrate.command()
@config_option
def verify(config_file: Path | None) -> None:
    """Exit 0 only if the database is exactly what this version needs."""

    def check(dsn: str) -> list[str]:
        migrations.verify(dsn)
        return ["the schema is what this version needs"]

    _each(config_file, check)


def _each(config_file: Path | None, work: Callable[[str], list[str]]) -> None:
    """Run on the database of the settings and print the lines."""
    settings = read_settings(config_file)
    if settings.database_dsn is not None:
        dsn: str | None = settings.database_dsn.get_secret_value()
    else:
        dsn = running_embedded(settings.state_dir)
    if dsn is None:
        message = f"no database is given and none runs in {settings.state_dir}: RDEV_DATABASE_DSN"
        click.echo(f"rdev: {message}", err=True)
        raise SystemExit(2)
    try:
        check_dsn(dsn)
        lines = work(dsn)
    except RdevError as error:
        click.echo(f"rdev: {error}", err=True)
        raise SystemExit(1) from None
    for line in lines or ["nothing to do"]:
        click.echo(line)
