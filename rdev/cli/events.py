"""`rdev events`: follow a command, or the life of all commands."""

from collections.abc import Callable

import click
import msgspec

from rdev.cli.client import Event, Json, open_client, server_options
from rdev.cli.failures import run_trio

# What is of the connection, not of what is followed.
_OF_THE_STREAM = frozenset({"connected", "heartbeat", "disconnecting", "error"})


@click.command()
@server_options
@click.option("--project", help="Follow the commands of this project alone.")
@click.option("--after", help="Begin after this id; 0: at the oldest event stored.")
@click.option("--output", type=click.Choice(["table", "ndjson"]), default="table")
@click.argument("command", required=False)
def events(
    url: str,
    key: str,
    project: str | None,
    after: str | None,
    output: str,
    command: str | None,
) -> None:
    """Follow the events of COMMAND to its end; without it the life of all commands, from now on.

    One line for each event. A server that restarts in between is waited for.
    """
    path = f"/commands/{command}/events" if command else "/events"
    if project and not command:
        path = f"/projects/{project}/events"
    show = _show_json if output == "ndjson" else _show

    async def main() -> int:
        async with open_client(url, key) as client:
            await client.follow(path, _without_the_streams_own(show), lost=_say, after=after or "")
        return 0

    run_trio(main)


def _without_the_streams_own(show: Callable[[Event], None]) -> Callable[[Event], None]:
    def heed(event: Event) -> None:
        if event.name not in _OF_THE_STREAM:
            show(event)

    return heed


def _show_json(event: Event) -> None:
    shown: Json = {"event": event.name, "id": event.id, **event.data}
    click.echo(msgspec.json.encode(shown).decode())


def _show(event: Event) -> None:
    """The id of the command and its project where it is a feed's, then what happened."""
    data = dict(event.data)
    whose = [str(data.pop(name)) for name in ("command_id", "project", "kind") if name in data]
    said = [str(data.pop("status"))] if "status" in data else []
    said += [f"{name}={value}" for name, value in data.items() if value not in (None, False)]
    click.echo("  ".join([*whose, event.name, *said]))


def _say(reason: str) -> None:
    click.echo(f"rdev: {reason}; reconnecting", err=True)
