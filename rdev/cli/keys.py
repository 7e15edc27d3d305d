"""`rdev keys`: list, create, revoke and rotate API keys.

The text of a key is printed alone on stdout, once; everything else about it goes to stderr.
"""

import click
import msgspec

from rdev.cli.client import Json, open_client, server_options
from rdev.cli.failures import run_trio


@click.group()
def keys() -> None:
    """List, create, revoke and rotate API keys."""


@keys.command("list")
@server_options
@click.option("--output", type=click.Choice(["table", "json", "ndjson"]), default="table")
def list_keys(url: str, key: str, output: str) -> None:
    """List the keys that the key may see, newest first."""

    async def main() -> int:
        async with open_client(url, key) as client:
            found = await client.pages("/keys")
        if output == "json":
            click.echo(msgspec.json.encode(found).decode())
        elif output == "ndjson":
            for each in found:
                click.echo(msgspec.json.encode(each).decode())
        else:
            for each in found:
                click.echo(_row(each))
        return 0

    run_trio(main)


@keys.command()
@server_options
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, help="A scope; may be repeated.")
@click.option("--project", "projects", multiple=True, help="Only this project; may be repeated.")
@click.option("--ip", "addresses", multiple=True, help="Only from this CIDR; may be repeated.")
@click.option("--expires-in", help="30d, 60d, 90d (default), 1y, never, or seconds.")
def create(
    url: str,
    key: str,
    name: str,
    scopes: tuple[str, ...],
    projects: tuple[str, ...],
    addresses: tuple[str, ...],
    expires_in: str | None,
) -> None:
    """Make a key called NAME and print its text, which nobody can show again."""
    body: Json = {"name": name, "scopes": list(scopes)}
    if projects:
        body["project_ids"] = list(projects)
    if addresses:
        body["allowed_ips"] = list(addresses)
    if expires_in is not None:
        body["expires_in"] = int(expires_in) if expires_in.isdecimal() else expires_in
    _print_once(url, key, "/keys", body)


@keys.command()
@server_options
@click.argument("key_id")
@click.option("--grace-s", type=int, help="Seconds that the old secret stays good; default a day.")
def rotate(url: str, key: str, key_id: str, grace_s: int | None) -> None:
    """Give a key another secret and print its text."""
    _print_once(url, key, f"/keys/{key_id}/rotate", {"grace_s": grace_s})


@keys.command()
@server_options
@click.argument("key_id")
def revoke(url: str, key: str, key_id: str) -> None:
    """End a key now and for ever."""

    async def main() -> int:
        async with open_client(url, key) as client:
            click.echo(_row(await client.delete(f"/keys/{key_id}")))
        return 0

    run_trio(main)


def _print_once(url: str, key: str, path: str, body: Json) -> None:
    async def main() -> int:
        async with open_client(url, key) as client:
            made = await client.post(path, body)
        click.echo(_row(made), err=True)
        click.echo(made["key"])
        return 0

    run_trio(main)


def _row(key: Json) -> str:
    """One line: id, name, status, scopes, projects, end."""
    projects = key["project_ids"]
    cells = [
        key["id"],
        key["name"],
        key["status"],
        ",".join(msgspec.convert(key["scopes"], list[str])),
        "all projects" if projects is None else ",".join(msgspec.convert(projects, list[str])),
        f"until {key['expires_at']}" if key["expires_at"] else "for ever",
    ]
    return "\t".join(str(cell) for cell in cells)
