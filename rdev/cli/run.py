"""`rdev run` and `rdev claude`: submit a command, show its output, exit with its exit code."""

import base64
import shlex
import signal
import sys
from collections.abc import Callable

import click
import trio

from rdev.cli.client import Client, Event, Json, open_client, server_options
from rdev.cli.failures import run_trio

# The shell's convention for a program that was ended by a signal.
SIGNALLED = 128
# For an outcome that is not the command's own: lost, cancelled, expired (as `env` and `timeout`
# keep 125 for their own failures).
NO_STATUS = 125


@click.command(context_settings={"ignore_unknown_options": True})
@server_options
@click.option("--priority", type=click.Choice(["high", "normal", "low"]))
@click.option("--timeout", "timeout_s", type=int, help="Seconds until it is ended.")
@click.option("--detach", is_flag=True, help="Print the command's id and leave it running.")
@click.argument("project")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    url: str,
    key: str,
    priority: str | None,
    timeout_s: int | None,
    detach: bool,
    project: str,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in PROJECT: rdev run demo -- make test.

    One argument is a shell script as it is; several are one command with its arguments. Output goes
    to stdout and stderr as the command wrote it; a server that restarts in between is waited for.
    Ctrl-C asks whether to cancel the command or to leave it running.
    """
    script = command[0] if len(command) == 1 else shlex.join(command)
    body = _given(command=script, priority=priority, timeout_s=timeout_s)
    _submit_and_follow(url, key, f"/projects/{project}/shell", body, detach=detach)


@click.command()
@server_options
@click.option("--resume", help="The id of a session to go on with.")
@click.option("--model")
@click.option("--detach", is_flag=True, help="Print the command's id and leave it running.")
@click.argument("project")
@click.argument("prompt")
def claude(
    url: str,
    key: str,
    resume: str | None,
    model: str | None,
    detach: bool,
    project: str,
    prompt: str,
) -> None:
    """Give PROMPT to the coding agent in PROJECT and show what it says."""
    body = _given(prompt=prompt, resume=resume, model=model)
    _submit_and_follow(url, key, f"/projects/{project}/claude", body, detach=detach)


def _given(**values: object) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _submit_and_follow(url: str, key: str, path: str, body: Json, *, detach: bool) -> None:
    async def main() -> int:
        async with open_client(url, key) as client:
            submitted = await client.post(path, body)
            command_id = str(submitted["id"])
            if detach:
                click.echo(command_id)
                return 0
            return await _follow(client, command_id)

    run_trio(main)


async def _follow(client: Client, command_id: str) -> int:
    """Show the stream to its end; returns the exit status for this program."""
    status = NO_STATUS

    def heed(event: Event) -> None:
        nonlocal status
        if event.name == "output":
            _show(event.data)
        elif event.name == "gap":
            _say(f"{event.data['dropped_bytes']} bytes of {event.data['stream']} were dropped")
        elif event.name == "complete":
            status = _exit_status(event.data)

    def leave(with_status: int) -> None:
        nonlocal status
        status = with_status
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_heed_interrupts, client, command_id, leave)
        await client.follow(
            f"/commands/{command_id}/events",
            heed,
            lost=lambda reason: _say(f"{reason}; reconnecting"),
        )
        nursery.cancel_scope.cancel()
    return status


async def _heed_interrupts(client: Client, command_id: str, leave: Callable[[int], None]) -> None:
    """Ctrl-C: ask on a terminal; elsewhere leave the command running, with the shell's status for
    an interrupted program. To detach when asked is a success, as `--detach` is."""
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        async for _ in interrupts:
            is_asked = sys.stdin.isatty()
            answer = await _ask(command_id) if is_asked else "d"
            if answer == "c":
                await client.delete(f"/commands/{command_id}")
                _say("cancelling")
            elif answer == "d":
                _say(f"{command_id} goes on; follow it with GET /commands/{command_id}/events")
                leave(0 if is_asked else SIGNALLED + signal.SIGINT)
                return


async def _ask(command_id: str) -> str:
    question = f"\nrdev: {command_id}: [c]ancel it, [d]etach, or go [o]n? "
    click.echo(question, err=True, nl=False)
    answer: str = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    return answer.strip().lower()[:1] or "o"


def _show(data: Json) -> None:
    stream = sys.stdout if data["stream"] == "stdout" else sys.stderr
    line = data.get("line")
    raw = str(line).encode() if line is not None else base64.b64decode(str(data["base64"]))
    stream.buffer.write(raw if data.get("partial") else raw + b"\n")
    stream.buffer.flush()


def _exit_status(data: Json) -> int:
    """The command's own exit code where it has one; 128 + signal; 125 for everything else."""
    exit_code, signal_number = data["exit_code"], data["signal"]
    if data["status"] != "succeeded":
        reason = f" ({data['reason']})" if data.get("reason") else ""
        _say(f"{data['status']}{reason}")
    if data["status"] in ("succeeded", "failed", "timed_out", "cancelled"):
        if isinstance(exit_code, int):
            return exit_code if exit_code or data["status"] == "succeeded" else 1
        if isinstance(signal_number, int):
            return SIGNALLED + signal_number
    return NO_STATUS


def _say(text: str) -> None:
    click.echo(f"rdev: {text}", err=True)
