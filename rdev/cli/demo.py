"""`rdev demo`: a server, a project, a command whose lines are seen live; then it keeps serving."""

import click
import trio

from rdev.adapters.telemetry.logs import configure_logs
from rdev.app import serve
from rdev.cli.client import Client, Event, open_client
from rdev.cli.failures import run_trio
from rdev.cli.settings import read_settings
from rdev.identity import open_identity

PROJECT = "demo"
SCRIPT = 'for n in 1 2 3 4 5; do echo "line $n, written at $(date +%T)"; sleep 0.5; done'


@click.command()
def demo() -> None:
    """Show the main road: embedded PostgreSQL, a project, a command, its live stream."""
    settings = read_settings(None)

    async def main() -> int:
        with open_identity(settings) as identity:
            configure_logs(level="warn", secrets=identity.secrets)
            click.echo("starting PostgreSQL and rdev …")

            async def show(url: str) -> None:
                async with open_client(url, identity.admin_key) as client:
                    await _show(client)
                _say_more(url, identity.admin_key)

            async with trio.open_nursery() as nursery:

                def begin(url: str) -> None:
                    nursery.start_soon(show, url)

                await serve(settings, identity, on_serving=begin)
                nursery.cancel_scope.cancel()
        return 0

    run_trio(main)


async def _show(client: Client) -> None:
    """Make the project, submit the script, print every event as it arrives."""
    await client.post("/projects", {"id": PROJECT})
    submitted = await client.post(f"/projects/{PROJECT}/shell", {"command": SCRIPT})
    click.echo(f"\n$ POST /projects/{PROJECT}/shell  →  {submitted['id']}")
    click.echo(f"$ GET /commands/{submitted['id']}/events\n")
    await client.follow(f"/commands/{submitted['id']}/events", _print, lost=_lost)


def _print(event: Event) -> None:
    shown = event.data.get("line") or ", ".join(
        f"{name} {event.data[name]}"
        for name in ("status", "exit_code", "duration_ms")
        if event.data.get(name) is not None
    )
    click.echo(f"  {event.name:<10} {shown}")


def _lost(reason: str) -> None:
    click.echo(f"  ({reason}; resuming)")


def _say_more(url: str, key: str) -> None:
    click.echo(f"""
Serving on {url}    (Ctrl-C stops the server, its commands and its database)
The key is {key}    Try:

  curl -sS '{url}/projects/{PROJECT}/shell?wait=5' -H 'Authorization: Bearer {key}' \\
       -H 'Content-Type: application/json' -d '{{"command": "uname -a"}}'
""")
