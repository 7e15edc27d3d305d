"""`rdev projects`: list them, make one."""

import click
import msgspec

from rdev.cli.client import open_client, server_options
from rdev.cli.failures import run_trio


@click.group()
def projects() -> None:
    """List and make projects."""


@projects.command("list")
@server_options
@click.option("--output", type=click.Choice(["table", "json"]), default="table")
def list_projects(url: str, key: str, output: str) -> None:
    """List the projects that the key may see."""

    async def main() -> int:
        async with open_client(url, key) as client:
            found = await client.pages("/projects")
        if output == "json":
            click.echo(msgspec.json.encode(found).decode())
            return 0
        for project in found:
            commands = msgspec.convert(project["commands"], dict[str, int])
            counts = f"{commands['queued']} queued, {commands['running']} running"
            click.echo(f"{project['id']}\t{project['status']}\t{counts}")
        return 0

    run_trio(main)


@projects.command()
@server_options
@click.argument("project")
def create(url: str, key: str, project: str) -> None:
    """Make PROJECT; one that exists is left as it is."""

    async def main() -> int:
        async with open_client(url, key) as client:
            made = await client.post("/projects", {"id": project})
        click.echo(f"{made['id']}\t{made['status']}")
        return 0

    run_trio(main)
