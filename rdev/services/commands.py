"""Submitting, reading, awaiting and cancelling commands."""

from collections.abc import Awaitable, Callable, Mapping

import trio

from rdev.domain.audit import Actor
from rdev.domain.commands import LANE_CLASS, Command, Kind, NewCommand, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Spec
from rdev.domain.git import may_be_set
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import CommandId, NewUuid, ProjectId, command_id
from rdev.domain.lanes import Lane
from rdev.domain.pages import Page
from rdev.domain.redaction import redact_argv, secret_values
from rdev.domain.requests import Common
from rdev.domain.stream import Chunk, Source
from rdev.ports.commands import Accepted, CommandStore
from rdev.ports.output import OutputLog
from rdev.ports.tracing import Tracing, Untraced
from rdev.services.cached import Cached
from rdev.services.depths import QueueFullError, QueueGate
from rdev.services.shield import commit_shield
from rdev.services.stream import Fanout

# Even with every hint lost, `?wait` looks this often.
WAIT_POLL_S = 1.0
# What one read of the log brings at most.
PAGE_BYTES = 1_048_576


class Commands:
    """The use cases of commands."""

    def __init__(
        self,
        *,
        store: CommandStore,
        log: OutputLog,
        gate: QueueGate,
        fanout: Fanout,
        wake_workers: Callable[[Lane], None],
        reach_holder: Callable[[CommandId], None],
        new_uuid: NewUuid,
        tracing: Tracing | None = None,
        env_of: Callable[[ProjectId], Awaitable[Mapping[str, str]]] | None = None,
    ) -> None:
        """`wake_workers` says in which lane a command was queued or left the queue, `reach_holder`
        that one is to be cancelled, to the queues of all processes; neither waits. `env_of` gives
        what every command of a project has in its environment."""
        self._store = store
        self._log = log
        self._gate = gate
        self._fanout = fanout
        self._wake_workers = wake_workers
        self._reach_holder = reach_holder
        self._new_uuid = new_uuid
        self._tracing = tracing or Untraced()
        self._env_of = env_of
        self._projects_of: Cached[CommandId, ProjectId] = Cached(
            self._project_of, tag=lambda *_: None
        )

    async def submit(
        self,
        actor: Actor,
        project: ProjectId,
        kind: Kind,
        *,
        argv: tuple[str, ...],
        common: Common,
        env: dict[str, str] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Store a command and wake the workers; a repeat of an earlier request stores nothing.

        Its environment: the project's, then the command's own, then `env`, what rdev adds for the
        kind. Errors: as `CommandStore.insert`; as
        `QueueGate.place`, except for a repeat, which needs no place. Cancellation: the command is
        stored and announced, or neither.
        """
        spec = Spec(
            argv=argv,
            env={**await self._project_env(project, kind), **common.env, **(env or {})},
            cwd=common.cwd,
            stdin=common.stdin,
            timeout_s=common.timeout_s,
        )
        span = self._tracing.submission(project, kind)
        new = NewCommand(
            id=command_id(self._new_uuid()),
            project=project,
            kind=kind,
            spec=spec,
            argv=redact_argv(argv, secret_values(spec.env)),
            priority=common.priority,
            retry=common.retry,
            expires_in_s=common.expires_in_s,
            actor=actor,
            idempotency=idempotency,
            trace=span.context,
        )
        fault: str | None = "cancelled"
        try:
            accepted = await self._accept(new)
            span.tell(command_id=accepted.command.id, is_replay=accepted.is_replay)
            fault = None
        except RdevError as error:
            fault = error.code
            raise
        finally:
            span.end(fault)
        return accepted

    async def _project_env(self, project: ProjectId, kind: Kind) -> Mapping[str, str]:
        """What the project gives its commands; to git nothing that a client may not set for it."""
        if self._env_of is None:
            return {}
        env = await self._env_of(project)
        return {n: v for n, v in env.items() if may_be_set(n)} if kind is Kind.GIT else env

    async def _accept(self, new: NewCommand) -> Accepted:
        """Store it; a repeat of what was accepted is not refused."""
        try:
            return await self._insert(new)
        except QueueFullError as error:
            refusal = error
        earlier = None if new.idempotency is None else await self._store.replay(new.idempotency)
        if earlier is None:
            raise refusal
        return earlier

    async def _insert(self, new: NewCommand) -> Accepted:
        async with self._gate.place(new.project) as place:
            with commit_shield():
                accepted = await self._store.insert(new)
                if accepted.is_replay:
                    place.give_back()
                else:
                    self._wake_workers(_lane_of(accepted.command))
        return accepted

    async def get(self, command: CommandId) -> Command:
        """The command as it is now. Errors: NOT_FOUND."""
        found = await self._store.get(command)
        if found is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no command {command!r}")
        return found

    async def project_of(self, command: CommandId) -> ProjectId | None:
        """The project of a command, None where there is no such command. It never changes, so it
        is remembered for a moment."""
        return await self._projects_of.get(command)

    async def _project_of(self, command: CommandId) -> ProjectId | None:
        found = await self._store.get(command)
        return None if found is None else found.project

    async def list_for_project(
        self,
        project: ProjectId,
        *,
        status: Status | None,
        kind: Kind | None,
        before: CommandId | None,
        limit: int,
    ) -> Page[Command]:
        """See `CommandStore.list_for_project`."""
        return await self._store.list_for_project(
            project, status=status, kind=kind, before=before, limit=limit
        )

    async def queue_position(self, command: Command) -> int | None:
        """Where a queued command stands; None for any other."""
        if command.status is not Status.QUEUED:
            return None
        return await self._store.queue_position(command.id)

    async def ended(self, command: CommandId, *, within_s: float) -> Command:
        """The command when it has ended, or as it is after `within_s` seconds."""
        deadline = trio.current_time() + within_s
        while True:
            with self._fanout.end_of(command) as hint:
                found = await self.get(command)
                left_s = deadline - trio.current_time()
                if found.status.is_terminal or left_s <= 0 or self._fanout.draining:
                    return found
                with trio.move_on_after(min(WAIT_POLL_S, left_s)):
                    await hint.wait()

    async def cancel(self, actor: Actor, command: CommandId) -> Command:
        """Ask for the end of a command: a queued one ends now, a running one is killed.

        Errors: NOT_FOUND. Cancelling an ended command changes nothing.
        """
        with commit_shield():
            result = await self._store.request_cancel(command, actor)
            if result is not None:
                self._reach_holder(command)
                self._fanout.announce(command)
                if result.ended_now:
                    # The next head may be of a higher level, and its lane then stands earlier.
                    self._wake_workers(_lane_of(result.command))
        if result is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no command {command!r}")
        return result.command

    async def tail(self, command: CommandId, source: Source, *, tail_bytes: int) -> list[Chunk]:
        """The chunks that hold the last `tail_bytes` of one stream."""
        return await self._log.read_tail(command, source, tail_bytes=tail_bytes)

    async def read_log(self, command: CommandId, *, after: int) -> list[Chunk]:
        """A page of the command's events after a number, in order; empty at the end."""
        return await self._log.read(command, after=after, limit_bytes=PAGE_BYTES)

    async def check_stored(self, command: Command) -> None:
        """Errors: GONE when the command's output was pruned (its first event never is alone)."""
        if await self._log.oldest_seq(command.id) is None:
            message = f"the output of {command.id!r} is no longer stored"
            raise RdevError(ErrorCode.GONE, message)

    async def oldest_seq(self, command: CommandId) -> int | None:
        """The first event that is still stored; None when none is."""
        return await self._log.oldest_seq(command)


def _lane_of(command: Command) -> Lane:
    return Lane(project=command.project, lane_class=LANE_CLASS[command.kind])
