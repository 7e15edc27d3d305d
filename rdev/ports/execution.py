"""What the queue needs from a place where commands run (a local folder, a pod)."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from rdev.domain.execution import Exit, KillReport, Lost, Offsets, Piece, Spec
from rdev.domain.ids import AttemptId, CommandId, ProjectId


class Attachment(Protocol):
    """One attempt being observed. Reconnects by itself; the offsets carry on."""

    async def receive(self) -> Piece | Exit | Lost:
        """The next piece of output, or the end.

        Pieces of each stream continue at the offset asked for, without hole or overlap, ≤ 1 MiB
        each. `Exit` comes only when both offsets equal the sizes in the status; after `Exit` or
        `Lost` nothing more may be asked.
        Cancellation: nothing is lost; ask again, or attach again behind the last piece.
        Blocks: until there is output or an end, however long that takes. Not asking is the
        back-pressure: the journal in the project is the buffer.
        """
        ...


class Executor(Protocol):
    """Runs commands detached in projects and observes them. An attempt is started at most once;
    attempts of one command know nothing of each other."""

    @property
    def reach(self) -> str:
        """The set of projects this executor can touch, e.g. `local:<machine>:<folder>` or
        `kubernetes:<cluster>/<namespace>`; two servers with the same reach can take over each
        other's commands. Errors: SERVICE_UNAVAILABLE while it is not known."""
        ...

    @property
    def standing_instance(self) -> str | None:
        """The instance of every project of this reach, where it cannot change while this process
        lives (local folders); None where each project has its own."""
        ...

    async def prepare(self, project: ProjectId) -> None:
        """Make the project's place (idempotent). Errors: SERVICE_UNAVAILABLE, as
        UnfitProjectError where nothing can run in it."""
        ...

    async def instance(self, project: ProjectId) -> str:
        """What the place is now: boot id and start time of its pid 1. A place that was restarted
        has another instance. Errors: NOT_FOUND (a pod makes its folders itself);
        SERVICE_UNAVAILABLE, as UnfitProjectError where nothing can run in it."""
        ...

    def attach(
        self,
        project: ProjectId,
        attempt: AttemptId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AbstractAsyncContextManager[Attachment]:
        """Start the attempt if it can still be started, else continue reading at `offsets`.

        It is started at most once, whoever calls how often: `go/` in its folder is the only commit
        point. It is started only with a `spec` and only when the place is the given `instance`;
        otherwise its status is read or the end is `Lost`. After a `Lost` that is `not_started` or
        `unfinished` it can never start: the next attempt is never beside it.
        A place that cannot be reached for a while ends as `Lost(UNREACHABLE, may_still_run=True)`.
        Errors (on entry): BAD_REQUEST for a spec that no process can be given (a NUL, an argument
        that is too long, an environment name that a shell cannot export).
        Cancellation and leaving the block: the command goes on; only the observation ends.
        """
        ...

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        """End the attempt and all it started: TERM, `grace_s`, KILL, then look again.

        One that was not started can never start afterwards. Its status file is written by
        its supervisor with `why` = cancelled, so an attachment sees the end.
        Errors: SERVICE_UNAVAILABLE. Blocks: at most `grace_s` + 5 s.
        """
        ...

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[AttemptId]:
        """Clear what all attempts of these commands left behind, all but the fact that they can
        never start again.

        For commands whose end is stored: an attach finds nothing any more. An attempt that still
        runs here is left as it is and returned. Unknown ones are fine; idempotent.
        Errors: SERVICE_UNAVAILABLE; some may be cleared then. At most 1,000 at once.
        """
        ...

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        """Delete the folders of all attempts of these commands, before their rows go. Idempotent.
        Errors: SERVICE_UNAVAILABLE; some may be gone then. At most 1,000 at once."""
        ...
