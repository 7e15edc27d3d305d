"""The `Executor` port over any transport: what Kubernetes and local folders have in common.

Owns the verbs of the script and the translation of their answers; bounded by one exec per
attachment and one short exec per verb.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from rdev.adapters.execution import script
from rdev.adapters.execution.attach import Patience, ScriptAttachment
from rdev.adapters.execution.frames import ProtocolError, parse_kill
from rdev.adapters.execution.transport import (
    NeverRanError,
    Streams,
    Transport,
    TransportError,
)
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import KillReport, Offsets, Spec, UnfitProjectError
from rdev.domain.ids import AttemptId, CommandId, ProjectId, attempt_ids, command_of
from rdev.ports.execution import Attachment

_VERB_S: Final = 30.0  # a verb that only touches a few files
_BATCH_S: Final = 120.0  # a verb that deletes up to 1,000 folders
_KILL_MARGIN_S: Final = 5.0  # the port: at most the grace and this
_ANSWER_BYTES: Final = 65_536

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a project's working folder and the folders of its commands are, as seen inside it."""

    home: str
    commands: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptSettings:
    """How commands run in a place.

    `base_env`: what every command's environment begins with. `path`: where the script finds its
    tools, and the PATH of commands that `base_env` gives none; None: as the place has it. `shell`:
    the POSIX sh to use, found there. A journal longer than `journal_max_bytes` ends its command.
    """

    base_env: Mapping[str, str] = field(default_factory=dict)
    path: str | None = DEFAULT_PATH
    shell: str = "sh"
    journal_max_bytes: int = 1 << 30
    patience: Patience = field(default_factory=Patience)

    @property
    def env(self) -> dict[str, str]:
        """What is set for each command."""
        return {**({} if self.path is None else {"PATH": self.path}), **self.base_env}


class ScriptExecutor:
    """Implements `Executor` with the script and a transport."""

    def __init__(
        self,
        *,
        reach: Callable[[], str],
        transport: Transport,
        place: Callable[[ProjectId], Place],
        settings: ScriptSettings,
        is_away: Callable[[], bool] = lambda: False,
    ) -> None:
        """Opens nothing. `is_away`: whether no project at all can be reached now."""
        self._is_away = is_away
        self._reconnects = 0
        self._reach = reach
        self._transport = transport
        self._place = place
        self._settings = settings

    @property
    def reach(self) -> str:
        """See `Executor.reach`. Errors: SERVICE_UNAVAILABLE while it is not known."""
        return self._reach()

    @property
    def standing_instance(self) -> str | None:
        """See `Executor.standing_instance`; a place in general has its own."""
        return None

    async def prepare(self, project: ProjectId) -> None:
        """See `Executor.prepare`; also tells which tool the place lacks."""
        place = self._place(project)
        answer = await self._ask(project, "prepare", place.home, place.commands)
        if answer != "ready":
            raise UnfitProjectError(answer)

    async def instance(self, project: ProjectId) -> str:
        """See `Executor.instance`."""
        answer = await self._ask(project, "instance", self._place(project).home)
        if answer == "absent":
            raise RdevError(ErrorCode.NOT_FOUND, "project has no folder")
        return answer

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        attempt: AttemptId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator[Attachment]:
        """See `Executor.attach`. Errors: BAD_REQUEST for a spec no process can be given."""
        place, settings = self._place(project), self._settings
        become = script.become(spec, settings.env, command_of(attempt)) if spec else b""
        rest = (
            *(int(spec is not None), len(spec.stdin) if spec else 0),
            *((spec.timeout_s, spec.grace_s) if spec else (0, 0)),
            settings.journal_max_bytes,
        )

        def open_exec(at: Offsets) -> AbstractAsyncContextManager[Streams]:
            where = (script.folder(place.commands, attempt), place.home, instance)
            words = ("attach", settings.shell, *where, at.stdout, at.stderr, *rest)
            return self._transport.run(project, script.argv(settings.shell, settings.path, *words))

        parts = (script.payload(become), *([spec.stdin] if spec and spec.stdin else []))
        async with ScriptAttachment(
            open_exec,
            parts,
            offsets,
            settings.patience,
            is_away=self._is_away,
            again=self._count_again,
        ) as attachment:
            yield attachment

    def _count_again(self) -> None:
        self._reconnects += 1

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        """See `Executor.kill`."""
        folder = script.folder(self._place(project).commands, attempt)
        words = ("kill_command", self._settings.shell, folder, grace_s)
        answer = await self._ask(project, *words, within_s=grace_s + _KILL_MARGIN_S)
        try:
            report = parse_kill(answer)
        except ValueError as error:
            raise _unavailable("no report of the kill") from error
        if report is None:
            raise _unavailable("no report of the kill")
        return report

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[AttemptId]:
        """See `Executor.tidy`."""
        answer = await self._ask_for_each(project, "tidy", commands)
        return [AttemptId(name) for name in answer.split()[1:]]

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        """See `Executor.remove`."""
        await self._ask_for_each(project, "remove", commands)

    async def _ask_for_each(
        self, project: ProjectId, verb: str, commands: Sequence[CommandId]
    ) -> str:
        """Run a verb that reads names of folders, up to an empty line."""
        folders = [attempt for command in commands for attempt in attempt_ids(command)]
        names = "".join(f"{folder}\n" for folder in folders) + "\n"
        place = self._place(project)
        return await self._ask(
            project, verb, place.commands, stdin=names.encode(), within_s=_BATCH_S
        )

    async def _ask(
        self,
        project: ProjectId,
        verb: str,
        *words: str | int,
        stdin: bytes = b"",
        within_s: float = _VERB_S,
    ) -> str:
        """Run a verb; its answer without the mark. Errors: SERVICE_UNAVAILABLE, as
        UnfitProjectError where the place has no shell."""
        argv = script.argv(self._settings.shell, self._settings.path, verb, *words)
        try:
            with trio.fail_after(within_s):
                async with self._transport.run(project, argv) as streams:
                    await streams.stdin.send_all(script.payload(stdin=stdin))
                    return await _read_answer(streams)
        except NeverRanError as error:
            raise UnfitProjectError(str(error)) from error
        except (TransportError, ProtocolError, trio.BrokenResourceError) as error:
            raise _unavailable(f"project cannot be reached: {error}") from error
        except trio.TooSlowError as error:
            raise _unavailable("project does not answer") from error


async def _read_answer(streams: Streams) -> str:
    answer = bytearray()
    while data := await streams.stdout.receive_some(_ANSWER_BYTES):
        answer += data
        if answer.endswith(b"\n") or len(answer) > _ANSWER_BYTES:
            break
    if not answer.startswith(b"= ") or not answer.endswith(b"\n"):
        raise ProtocolError("no answer from the script")
    return answer[2:-1].decode("utf-8", "replace")


def _unavailable(message: str) -> RdevError:
    return RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
