"""Where commands run: the executor that the settings name; a part of `wiring.py`.

It opens and starts nothing.
"""

import os
import pwd

from rdev.adapters.execution.local import LocalExecutor
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.identity import Identity
from rdev.services.guarded_executor import GuardedExecutor


def build_executor(
    settings: Settings, identity: Identity, telemetry: PrometheusTelemetry
) -> GuardedExecutor:
    """The executor, with a breaker for each project."""
    return GuardedExecutor(
        LocalExecutor(
            projects_dir=settings.projects_folder,
            machine_id=identity.machine,
            base_env=base_env(),
        ),
        telemetry=telemetry,
    )


def base_env() -> dict[str, str]:
    """What every local command gets: nothing of the server's environment."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": _home(),
        "LANG": "C.UTF-8",
    }


def _home() -> str:
    """Where this user's files are; "/" for one that the system does not know (a container's)."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"
