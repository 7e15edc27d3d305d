"""`rdev queue`: how much waits and runs."""

import click
import msgspec

from rdev.cli.client import Json, open_client, server_options
from rdev.cli.failures import run_trio

_PRIORITIES = ("high", "normal", "low")


@click.command()
@server_options
@click.option("--output", type=click.Choice(["table", "json"]), default="table")
def queue(url: str, key: str, output: str) -> None:
    """Show how many commands wait and run, by project and priority."""

    async def main() -> int:
        async with open_client(url, key) as client:
            found = await client.get("/queue")
        if output == "json":
            click.echo(msgspec.json.encode(found).decode())
        else:
            _show(found)
        return 0

    run_trio(main)


def _show(found: Json) -> None:
    """A line for each project, one for all, one for the server that answered."""
    rows: list[tuple[str, ...]] = [
        ("PROJECT", "QUEUED", "HIGH", "NORMAL", "LOW", "OLDEST", "RUNNING")
    ]
    for project in msgspec.convert(found["projects"], list[Json]):
        counts = msgspec.convert(project["priorities"], dict[str, int])
        rows.append(_row(str(project["id"]), project, counts))
    levels = msgspec.convert(found["priorities"], dict[str, Json])
    counts = {name: msgspec.convert(levels[name]["queued"], int) for name in _PRIORITIES}
    rows.append(_row("(all)", found, counts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        click.echo("  ".join([first.ljust(widths[0]), *cells]))
    limits, server = msgspec.convert((found["limits"], found["server"]), tuple[Json, Json])
    click.echo(f"limits: {limits['project_max']} a project, {limits['server_max']} in all")
    click.echo(
        f"this server: {server['running']} of {server['running_max']} running, "
        f"{server['claims_per_s']} claims/s, {server['take_overs']} take-overs, "
        f"{server['stale_writes']} stale writes"
    )


def _row(name: str, depth: Json, counts: dict[str, int]) -> tuple[str, ...]:
    wait_s = depth["oldest_wait_s"]
    oldest = "-" if wait_s is None else f"{msgspec.convert(wait_s, float):.0f} s"
    by_priority = [str(counts[priority]) for priority in _PRIORITIES]
    return name, str(depth["queued"]), *by_priority, oldest, str(depth["running"])
