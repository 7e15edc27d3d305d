"""`rdev projects`: list them, make, start, stop and delete one."""

import click
import msgspec

from rdev.cli.client import Json, open_client, server_options
from rdev.cli.failures import run_trio


@click.group()
def projects() -> None:
    """List, make, start, stop and delete projects."""


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
            click.echo(f"{project['id']}\t{_status(project)}\t{counts}")
        return 0

    run_trio(main)


@projects.command()
@server_options
@click.option("--image", help="What its container is made of.")
@click.option("--git-url", help="A repository that is cloned into its volume.")
@click.option("--git-ref", help="A branch, a tag or a commit of it.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Of its container; no secrets.")
@click.option("--cpu", help="A limit, as in 2 or 500m.")
@click.option("--memory", help="A limit, as in 4Gi.")
@click.option("--storage", help="The size of its volume, as in 20Gi.")
@click.argument("project")
def create(
    url: str,
    key: str,
    image: str | None,
    git_url: str | None,
    git_ref: str | None,
    env: tuple[str, ...],
    cpu: str | None,
    memory: str | None,
    storage: str | None,
    project: str,
) -> None:
    """Make PROJECT; one that exists is left as it is. Options are for projects that are pods."""
    asked = {"image": image, "git_url": git_url, "git_ref": git_ref}
    body: Json = {name: value for name, value in asked.items() if value is not None}
    if env:
        body["env"] = dict(_pair(one) for one in env)
    limits = {name: value for name, value in (("cpu", cpu), ("memory", memory)) if value}
    requests = {"storage": storage} if storage else {}
    if limits or requests:
        # A request above a limit is refused: without one of its own it is the limit.
        body["resources"] = {"requests": requests, "limits": limits}

    async def main() -> int:
        async with open_client(url, key) as client:
            made = await client.post("/projects", {"id": project, **body})
        click.echo(f"{made['id']}\t{_status(made)}")
        return 0

    run_trio(main)


@projects.command()
@server_options
@click.argument("project")
def start(url: str, key: str, project: str) -> None:
    """Start PROJECT: make its pod where it has none, and run what waits in it."""
    _ask(url, key, "POST", f"/projects/{project}/start")


@projects.command()
@server_options
@click.option("--force", is_flag=True, help="Cancel the commands that run in it first.")
@click.argument("project")
def stop(url: str, key: str, force: bool, project: str) -> None:
    """Stop PROJECT: its pod ends, its volume stays, and commands wait."""
    _ask(url, key, "POST", f"/projects/{project}/stop{_forced(force)}")


@projects.command()
@server_options
@click.option("--force", is_flag=True, help="Cancel the commands that run in it first.")
@click.argument("project")
def delete(url: str, key: str, force: bool, project: str) -> None:
    """Delete PROJECT: its pod, its volume, and what waits in it. A local folder stays."""
    _ask(url, key, "DELETE", f"/projects/{project}{_forced(force)}")


def _ask(url: str, key: str, method: str, path: str) -> None:
    async def main() -> int:
        async with open_client(url, key) as client:
            project = (
                await client.delete(path) if method == "DELETE" else await client.post(path, {})
            )
        click.echo(f"{project['id']}\t{_status(project)}")
        return 0

    run_trio(main)


def _status(project: Json) -> str:
    """The status, with the reason where there is one."""
    reason = project.get("reason")
    return f"{project['status']} ({reason})" if reason else str(project["status"])


def _forced(force: bool) -> str:
    return "?force=true" if force else ""


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--env")
    return name, value
