"""`rdev version`."""

import click

import rdev


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"rdev {rdev.__version__}")
