"""The `rdev` command line: exit codes, and the only place that prints.

Commands are imported when they are called: `rdev version` must not pay for the server. Exit status:
0 after a clean end, 1 on a fault (one line on stderr that says what to do), 2 on bad usage or
settings.
"""

import importlib

import click

# Each command and the module that defines it, under the command's own name.
_COMMANDS = {
    "serve": "serve",
    "migrate": "migrate",
    "run": "run",
    "claude": "run",
    "events": "events",
    "projects": "projects",
    "queue": "queue",
    "keys": "keys",
    "webhooks": "webhooks",
    "audit": "audit",
    "demo": "demo",
    "doctor": "doctor",
    "config": "config",
    "version": "version",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"rdev.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run coding agents, shell and git in projects, and watch every line live."""
