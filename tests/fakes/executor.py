"""An executor without processes: a program is a coroutine, a project is a dictionary.

Passes tests/ports/test_execution_conformance.py. For tests of services it can also restart its
place (`restart`) and lose a command (`lose`).
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import (
    Exit,
    KillReport,
    Lost,
    LostReason,
    Offsets,
    Piece,
    Spec,
    Stream,
    Why,
)
from rdev.domain.ids import AttemptId, CommandId, ProjectId, attempt_ids, command_of

PIECE_BYTES = 65_536


@dataclass
class FakeRun:
    """What a program sees; it returns its exit code, or minus a signal."""

    spec: Spec
    env: Mapping[str, str]
    journals: dict[Stream, bytearray] = field(
        default_factory=lambda: {Stream.STDOUT: bytearray(), Stream.STDERR: bytearray()}
    )
    end: Exit | Lost | None = None
    why: Why | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    grown: trio.Event = field(default_factory=trio.Event)
    # Its program is over, however it was judged.
    over: trio.Event = field(default_factory=trio.Event)

    def write(self, data: bytes, stream: Stream = Stream.STDOUT) -> None:
        self.journals[stream] += data
        self.ring()

    def ring(self) -> None:
        self.grown.set()
        self.grown = trio.Event()


Program = Callable[[FakeRun], Awaitable[int]]


class FakeExecutor:
    """Implements `Executor`; its commands live in the nursery it was given."""

    def __init__(self, nursery: trio.Nursery, programs: Mapping[str, Program]) -> None:
        self._nursery = nursery
        self._programs = programs
        self._projects: set[ProjectId] = set()
        self._runs: dict[AttemptId, FakeRun | None] = {}  # None: can never start
        # Those whose folder was first made in another instance than theirs.
        self._anew: set[AttemptId] = set()
        self._boots = 1
        self.started: list[AttemptId] = []
        # Projects that cannot be tidied now.
        self.unreachable: set[ProjectId] = set()
        # Commands of which a kill always leaves something.
        self.immortal: set[AttemptId] = set()

    @property
    def reach(self) -> str:
        return "fake:here"

    async def prepare(self, project: ProjectId) -> None:
        await trio.lowlevel.checkpoint()
        self._projects.add(project)

    async def instance(self, project: ProjectId) -> str:
        await trio.lowlevel.checkpoint()
        if project not in self._projects:
            raise RdevError(ErrorCode.NOT_FOUND, "project has no folder")
        return f"boot-{self._boots}"

    @asynccontextmanager
    async def attach(
        self,
        project: ProjectId,
        attempt: AttemptId,
        *,
        spec: Spec | None,
        instance: str,
        offsets: Offsets,
    ) -> AsyncIterator["FakeAttachment"]:
        if attempt not in self._runs:
            here = instance == f"boot-{self._boots}"
            self._runs[attempt] = self._start(attempt, spec) if here and spec else None
            if not here:
                self._anew.add(attempt)
        never = Lost(reason=LostReason.NOT_STARTED)
        if attempt in self._anew:
            never = Lost(reason=LostReason.POD_GONE, unfinished=True)
        yield FakeAttachment(self._runs[attempt], offsets, never)

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        await trio.lowlevel.checkpoint()
        run = self._runs.setdefault(attempt, None)
        if run is not None and not run.over.is_set():
            run.why = Why.CANCELLED
            run.scope.cancel()
            await run.over.wait()
        return KillReport(confirmed=attempt not in self.immortal)

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[AttemptId]:
        await trio.lowlevel.checkpoint()
        self.check_reachable(project)
        known = [one for command in commands for one in attempt_ids(command) if one in self._runs]
        running = [attempt for attempt in known if self.is_running(attempt)]
        for attempt in known:
            if attempt not in running:
                self._runs[attempt] = None
                self._anew.discard(attempt)
        return running

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        await trio.lowlevel.checkpoint()
        self.check_reachable(project)
        for attempt in [one for command in commands for one in attempt_ids(command)]:
            self._runs.pop(attempt, None)
            self._anew.discard(attempt)

    def is_running(self, attempt: AttemptId) -> bool:
        """Whether a program of it lives, whatever was said of its end."""
        run = self._runs.get(attempt)
        return run is not None and not run.over.is_set()

    def has_folder(self, command: CommandId) -> bool:
        """Whether anything is known of it."""
        return any(attempt in self._runs for attempt in attempt_ids(command))

    def check_reachable(self, project: ProjectId) -> None:
        """Errors: SERVICE_UNAVAILABLE for what is in `unreachable`."""
        if project in self.unreachable:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "project cannot be reached")

    def restart(self) -> None:
        """The place gets another instance; what ran there is gone."""
        self._boots += 1
        for attempt in self._runs:
            self.lose(attempt, LostReason.SUPERVISOR_GONE, unfinished=True)

    def lose(
        self,
        attempt: AttemptId,
        reason: LostReason,
        *,
        may_still_run: bool = False,
        unfinished: bool = False,
        tries: int = 1,
    ) -> None:
        """A running attempt ends as lost; one that may still run does."""
        run = self._runs.get(attempt)
        if run is not None and run.end is None:
            run.end = Lost(
                reason=reason, may_still_run=may_still_run, unfinished=unfinished, tries=tries
            )
            if not may_still_run:
                run.scope.cancel()
            run.ring()

    def _start(self, attempt: AttemptId, spec: Spec) -> FakeRun:
        env = {"PATH": "/fake", **spec.env, "RDEV_COMMAND_ID": command_of(attempt)}
        run = FakeRun(spec=spec, env=env)
        self.started.append(attempt)
        self._nursery.start_soon(self._run, run)
        return run

    async def _run(self, run: FakeRun) -> None:
        code = -15
        program = self._programs.get(run.spec.argv[0])
        began = trio.current_time()
        with run.scope:
            with trio.move_on_after(run.spec.timeout_s) as timeout:
                code = 127 if program is None else await program(run)
            if timeout.cancelled_caught:
                run.why = Why.TIMEOUT
        run.end = run.end or Exit(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            why=run.why,
            stdout_bytes=len(run.journals[Stream.STDOUT]),
            stderr_bytes=len(run.journals[Stream.STDERR]),
            runtime_ms=int((trio.current_time() - began) * 1000),
            kill=KillReport(confirmed=True) if run.why else None,
        )
        run.over.set()
        run.ring()


class FakeAttachment:
    """Implements `Attachment`."""

    def __init__(self, run: FakeRun | None, offsets: Offsets, never: Lost) -> None:
        """`never` is what an attachment to nothing ends with."""
        self._run = run
        self._never = never
        self._at = {Stream.STDOUT: offsets.stdout, Stream.STDERR: offsets.stderr}

    async def receive(self) -> Piece | Exit | Lost:
        await trio.lowlevel.checkpoint()
        if self._run is None:
            return self._never
        while True:
            for stream, journal in self._run.journals.items():
                offset = self._at[stream]
                if offset > len(journal):
                    return Lost(reason=LostReason.JOURNAL_TRUNCATED)
                if data := bytes(journal[offset : offset + PIECE_BYTES]):
                    self._at[stream] += len(data)
                    return Piece(stream=stream, offset=offset, data=data)
            if self._run.end is not None:
                return self._run.end
            await self._run.grown.wait()
