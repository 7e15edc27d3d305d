"""`rdev webhooks`: endpoints, their deliveries, and a receiver for people who write theirs.

What a receiver needs is printed alone on stdout: a secret (scheme v1), once, or a public key (v1a);
everything else about it goes to stderr.
"""

from collections.abc import Awaitable, Callable, Mapping

import click
import msgspec

from rdev.adapters.webhooks.ed25519 import parse_public
from rdev.cli.client import Client, Json, open_client, server_options
from rdev.cli.failures import run_trio
from rdev.cli.webhook_listener import listen as run_listener
from rdev.domain.signing import SignatureScheme, Verifier, parse_secret

_scheme_option = click.option(
    "--signature-scheme",
    "scheme",
    type=click.Choice([one.value for one in SignatureScheme]),
    help="v1: a secret of both sides (default); v1a: rdev signs, a public key verifies.",
)


@click.group()
def webhooks() -> None:
    """Tell programs what happens, and see what they were told."""


@webhooks.command("list")
@server_options
@click.option("--output", type=click.Choice(["table", "json", "ndjson"]), default="table")
def list_webhooks(url: str, key: str, output: str) -> None:
    """List the endpoints that the key may see, newest first."""
    _list(url, key, "/webhooks", output, _row)


@webhooks.command()
@server_options
@click.argument("target")
@click.option(
    "--event", "events", multiple=True, default=["*"], help="May be repeated; all if none."
)
@click.option("--project", "projects", multiple=True, help="Only this project; may be repeated.")
@click.option("--ordered", is_flag=True, help="One at a time, in sequence.")
@click.option("--description", default="")
@_scheme_option
def create(
    url: str,
    key: str,
    target: str,
    events: tuple[str, ...],
    projects: tuple[str, ...],
    ordered: bool,
    description: str,
    scheme: str | None,
) -> None:
    """Tell the URL TARGET of events; prints the secret that signs them, which is shown once, or
    with scheme v1a the public key that verifies them."""
    body: Json = {
        "url": target,
        "events": list(events),
        "project_ids": list(projects) or None,
        "ordered": ordered,
        "description": description or None,
        "signature_scheme": scheme,
    }
    _print_once(url, key, "/webhooks", body)


@webhooks.command("rotate-secret")
@server_options
@click.argument("webhook_id")
@click.option("--grace-s", type=int, help="Seconds that the old secret goes on signing; a day.")
def rotate_secret(url: str, key: str, webhook_id: str, grace_s: int | None) -> None:
    """Give an endpoint another secret, or pair of keys, and print what its receiver needs."""
    _print_once(url, key, f"/webhooks/{webhook_id}/rotate-secret", {"grace_s": grace_s})


@webhooks.command("use-scheme")
@server_options
@click.argument("webhook_id")
@click.argument("scheme", type=click.Choice([one.value for one in SignatureScheme]))
def use_scheme(url: str, key: str, webhook_id: str, scheme: str) -> None:
    """Sign an endpoint's requests with SCHEME and print what its receiver needs; what signed before
    signs beside it for a day. Of the scheme that it has, the secret is not shown again."""

    async def change(client: Client) -> None:
        path = f"/webhooks/{webhook_id}"
        _print_needed(await client.patch(path, {"signature_scheme": scheme}))

    _run(url, key, change)


@webhooks.command()
@server_options
@click.argument("webhook_id")
def enable(url: str, key: str, webhook_id: str) -> None:
    """Tell an endpoint again; it then speaks for the key that is used here."""
    _patch(url, key, webhook_id, {"enabled": True})


@webhooks.command()
@server_options
@click.argument("webhook_id")
def disable(url: str, key: str, webhook_id: str) -> None:
    """Tell an endpoint nothing; what is owed to it already waits."""
    _patch(url, key, webhook_id, {"enabled": False})


@webhooks.command()
@server_options
@click.argument("webhook_id")
def delete(url: str, key: str, webhook_id: str) -> None:
    """End an endpoint for ever."""

    async def remove(client: Client) -> None:
        await client.delete(f"/webhooks/{webhook_id}")

    _run(url, key, remove)


@webhooks.command()
@server_options
@click.argument("webhook_id")
def test(url: str, key: str, webhook_id: str) -> None:
    """Send an endpoint a `ping`; prints the delivery's id."""

    async def ping(client: Client) -> None:
        click.echo((await client.post(f"/webhooks/{webhook_id}/test", {}))["delivery_id"])

    _run(url, key, ping)


@webhooks.command()
@server_options
@click.argument("webhook_id")
@click.option("--output", type=click.Choice(["table", "json", "ndjson"]), default="table")
def deliveries(url: str, key: str, webhook_id: str, output: str) -> None:
    """List what was owed to an endpoint, newest first."""
    _list(url, key, f"/webhooks/{webhook_id}/deliveries", output, _delivery_row)


@webhooks.command()
@server_options
@click.argument("id_", metavar="ID")
@click.option("--since", help="With a webhook's ID: everything from this time on (RFC 3339).")
@click.option("--status", type=click.Choice(["dead", "delivered", "all"]), default="dead")
def redeliver(url: str, key: str, id_: str, since: str | None, status: str) -> None:
    """Send a delivery again, or with --since those of a webhook."""

    async def again(client: Client) -> None:
        if since is None:
            click.echo(_delivery_row(await client.post(f"/deliveries/{id_}/redeliver", {})))
            return
        body = {"since": since, "status": status}
        click.echo((await client.post(f"/webhooks/{id_}/redeliver", body))["redelivered"])

    _run(url, key, again)


@webhooks.command()
@click.option("--bind", default="127.0.0.1:9000", show_default=True, help="HOST:PORT to listen at.")
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    envvar="WEBHOOK_SECRET",
    help="whsec_… of scheme v1; may be repeated.",
)
@click.option(
    "--public-key",
    "public_keys",
    multiple=True,
    envvar="WEBHOOK_PUBLIC_KEY",
    help="whpk_… of scheme v1a; may be repeated.",
)
@click.option("--output", type=click.Choice(["text", "ndjson"]), default="text")
def listen(bind: str, secrets: tuple[str, ...], public_keys: tuple[str, ...], output: str) -> None:
    """Receive webhooks here, verify their signatures, print what they say."""
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise click.BadParameter("must be HOST:PORT", param_hint="--bind")
    if not secrets and not public_keys:
        raise click.UsageError("needs --secret (scheme v1) or --public-key (v1a)")

    async def main() -> int:
        verifiers: list[Verifier] = [parse_secret(text) for text in secrets]
        verifiers += [parse_public(text) for text in public_keys]
        await run_listener(host, int(port), verifiers, as_json=output == "ndjson")
        return 0

    run_trio(main)


def _run(url: str, key: str, use: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> int:
        async with open_client(url, key) as client:
            await use(client)
        return 0

    run_trio(main)


def _list(url: str, key: str, path: str, output: str, row: Callable[[Json], str]) -> None:
    async def show(client: Client) -> None:
        found = await client.pages(path)
        if output == "json":
            click.echo(msgspec.json.encode(found).decode())
            return
        for each in found:
            click.echo(msgspec.json.encode(each).decode() if output == "ndjson" else row(each))

    _run(url, key, show)


def _print_once(url: str, key: str, path: str, body: Mapping[str, object]) -> None:
    async def make(client: Client) -> None:
        _print_needed(await client.post(path, body))

    _run(url, key, make)


def _print_needed(made: Json) -> None:
    """What its receiver needs; nothing where that is a secret that is not shown again."""
    click.echo(_row(made), err=True)
    if (needed := made["secret"] or made["public_key"]) is not None:
        click.echo(needed)


def _patch(url: str, key: str, webhook_id: str, body: Mapping[str, object]) -> None:
    async def change(client: Client) -> None:
        click.echo(_row(await client.patch(f"/webhooks/{webhook_id}", body)))

    _run(url, key, change)


def _row(webhook: Json) -> str:
    """One line: id, URL, events, projects, state."""
    projects = webhook["project_ids"]
    state = "enabled" if webhook["enabled"] else f"disabled ({webhook['disabled_reason']})"
    if webhook["failing_since"] and webhook["enabled"]:
        state = f"failing since {webhook['failing_since']}"
    cells = [
        webhook["id"],
        webhook["url"],
        ",".join(msgspec.convert(webhook["events"], list[str])),
        "all projects" if projects is None else ",".join(msgspec.convert(projects, list[str])),
        state,
    ]
    return "\t".join(str(cell) for cell in cells)


def _delivery_row(delivery: Json) -> str:
    """One line: id, event, type, project, status, attempts, when."""
    status = delivery["status"]
    cells = [
        delivery["id"],
        delivery["event_id"],
        delivery["type"],
        delivery["project"] or "-",
        f"{status} ({delivery['reason']})" if delivery["reason"] else status,
        delivery["attempt"],
        delivery["next_attempt_at"] or delivery["finished_at"] or delivery["created_at"],
    ]
    return "\t".join(str(cell) for cell in cells)
