"""An executor behind breakers, one for each project: a place that cannot be reached is left alone.

While a project's breaker is open, everything that would start or touch something there is refused
at once with SERVICE_UNAVAILABLE; whoever claims skips the project (`left_alone`), and what is
submitted waits in its queue. Kills are never refused. Only the way to the place counts:
a command that fails was reached, and so was one whose end is any `Lost` but `UNREACHABLE`.

An attachment lasts as long as its command, so it holds no permit: it asks once, and what it sees
(a piece, an end, that the place is out of reach) counts for the generation it began in. Calls
are what the place is asked: an attachment that was given up stands for each of its tries, some
twenty in half a minute, so that one is enough; a handful of claims alone is not.
Bounds: `PROJECTS_MAX` breakers; those that have seen nothing lately go first.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from rdev.domain.breaker import BreakerReason, BreakerSettings, BreakerState, CallOutcome
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import (
    Exit,
    KillReport,
    Lost,
    LostReason,
    Offsets,
    Piece,
    Spec,
    UnfitProjectError,
)
from rdev.domain.ids import AttemptId, CommandId, ProjectId
from rdev.ports.execution import Attachment, Executor
from rdev.ports.telemetry import BreakerTelemetry
from rdev.services.breaker import CircuitBreaker, Standing, tally_of, unavailable_is_failure

PROJECTS_MAX = 10_000
# How often a project that is to be tried again is left to a claim. One takes at most the heads of
# its two lanes: fewer than the breaker's trials, so that none is refused and loses its lease.
TRIAL_EVERY_S = 1.0
# What breakers of executors are called, in metrics and to clients.
NAME = "exec"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecBreakerStatistics:
    """Now: projects that are `refused`, of those that are `known`."""

    refused: int
    known: int


class GuardedExecutor:
    """The `Executor` port, around another one."""

    def __init__(
        self,
        executor: Executor,
        *,
        telemetry: BreakerTelemetry,
        settings: BreakerSettings | None = None,
    ) -> None:
        """Every project gets a breaker with these settings when it is first touched."""
        self._executor = executor
        self._telemetry = telemetry
        self._settings = settings
        self._breakers: OrderedDict[ProjectId, CircuitBreaker] = OrderedDict()
        # Those that are not closed, and when a claim may try them next (seconds of trio's clock).
        self._not_closed: dict[ProjectId, float] = {}
        # Those that are closed again.
        self._recovered: set[ProjectId] = set()

    @property
    def reach(self) -> str:
        """See `Executor.reach`."""
        return self._executor.reach

    @property
    def standing_instance(self) -> str | None:
        """See `Executor.standing_instance`."""
        return self._executor.standing_instance

    def is_open(self, project: ProjectId) -> bool:
        """Whether a claim should leave this project's commands waiting."""
        found = self._breakers.get(project)
        return found is not None and found.refuses

    def open_projects(self) -> list[ProjectId]:
        """All projects of which `is_open` says so. Cost: in the breakers that are not closed."""
        # A copy: to ask a breaker may change its state.
        return [project for project in list(self._not_closed) if self.is_open(project)]

    def left_alone(self) -> list[ProjectId]:
        """The projects that a claim made now is to pass by: the open ones, and those that another
        claim is trying. One that is due for a trial is left to this claim, and to no other for
        `TRIAL_EVERY_S`. Cost: in the breakers that are not closed."""
        now_s = trio.current_time()
        passed_by = []
        for project in list(self._not_closed):
            if self.is_open(project) or now_s < self._not_closed[project]:
                passed_by.append(project)
            else:
                self._not_closed[project] = now_s + TRIAL_EVERY_S
        return passed_by

    def statistics(self) -> ExecBreakerStatistics:
        """What is now."""
        return ExecBreakerStatistics(refused=len(self.open_projects()), known=len(self._breakers))

    def tally(self) -> Mapping[Standing, int]:
        """How many projects' breakers stand how. Cost: in the breakers that are not closed."""
        found = dict(tally_of([self._breakers[project] for project in self._not_closed]))
        recovered = len(self._recovered)
        found[BreakerState.CLOSED, BreakerReason.RECOVERED] = recovered
        untouched = len(self._breakers) - len(self._not_closed) - recovered
        found[BreakerState.CLOSED, BreakerReason.NOTHING] = untouched
        return found

    async def prepare(self, project: ProjectId) -> None:
        """See `Executor.prepare`. Errors: also SERVICE_UNAVAILABLE at once."""
        with self._breaker(project).call():
            await self._executor.prepare(project)

    async def instance(self, project: ProjectId) -> str:
        """See `Executor.instance`. Errors: also SERVICE_UNAVAILABLE at once."""
        with self._breaker(project).call():
            return await self._executor.instance(project)

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
        """See `Executor.attach`. Errors: also SERVICE_UNAVAILABLE at once, on entry."""
        breaker = self._breaker(project)
        generation = breaker.check()
        attached = self._executor.attach(
            project, attempt, spec=spec, instance=instance, offsets=offsets
        )
        async with attached as attachment:
            yield _Watched(attachment, breaker, generation)

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        """See `Executor.kill`. Never refused, but what is seen counts."""
        breaker = self._breaker(project)
        generation = breaker.breaker.generation
        try:
            report = await self._executor.kill(project, attempt, grace_s=grace_s)
        except RdevError as error:
            if error.code is ErrorCode.SERVICE_UNAVAILABLE:
                breaker.observe(generation, CallOutcome.FAILURE)
            raise
        breaker.observe(generation, CallOutcome.SUCCESS)
        return report

    async def tidy(self, project: ProjectId, commands: Sequence[CommandId]) -> list[AttemptId]:
        """See `Executor.tidy`. Errors: also SERVICE_UNAVAILABLE at once."""
        with self._breaker(project).call():
            return await self._executor.tidy(project, commands)

    async def remove(self, project: ProjectId, commands: Sequence[CommandId]) -> None:
        """See `Executor.remove`. Errors: also SERVICE_UNAVAILABLE at once."""
        with self._breaker(project).call():
            await self._executor.remove(project, commands)

    def _breaker(self, project: ProjectId) -> CircuitBreaker:
        """The project's breaker, now the most recently used."""
        found = self._breakers.get(project)
        if found is None:
            changes = _Changes(self._telemetry, self._not_closed, self._recovered, project)
            found = CircuitBreaker(
                name=NAME, telemetry=changes, settings=self._settings, outcome_of=_outcome_of
            )
            self._breakers[project] = found
            self._forget()
        self._breakers.move_to_end(project)
        return found

    def _forget(self) -> None:
        """Keep the bound: the least recently used that is at rest goes, else the very oldest."""
        if len(self._breakers) <= PROJECTS_MAX:
            return
        oldest = next(iter(self._breakers))
        at_rest = (one for one, breaker in self._breakers.items() if breaker.is_at_rest)
        gone = next(at_rest, oldest)
        del self._breakers[gone]
        self._not_closed.pop(gone, None)
        self._recovered.discard(gone)


def _outcome_of(error: Exception) -> CallOutcome:
    """A place in which nothing can run was reached."""
    if isinstance(error, UnfitProjectError):
        return CallOutcome.SUCCESS
    return unavailable_is_failure(error)


class _Changes:
    """Keeps one project among those that are not closed, or are again; passes on what it hears."""

    def __init__(
        self,
        telemetry: BreakerTelemetry,
        not_closed: dict[ProjectId, float],
        recovered: set[ProjectId],
        project: ProjectId,
    ) -> None:
        self._telemetry = telemetry
        self._not_closed = not_closed
        self._recovered = recovered
        self._project = project

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        """See `BreakerTelemetry.breaker_changed`."""
        if state is BreakerState.CLOSED:
            self._not_closed.pop(self._project, None)
            self._recovered.add(self._project)
        else:
            self._recovered.discard(self._project)
            self._not_closed.setdefault(self._project, 0.0)
        self._telemetry.breaker_changed(breaker, state, reason)


class _Watched:
    """An attachment whose first sign of life, and whose loss, is told to the breaker."""

    def __init__(self, attachment: Attachment, breaker: CircuitBreaker, generation: int) -> None:
        self._attachment = attachment
        self._breaker = breaker
        self._generation = generation
        self._was_reached = False

    async def receive(self) -> Piece | Exit | Lost:
        """See `Attachment.receive`."""
        item = await self._attachment.receive()
        if isinstance(item, Lost) and item.reason is LostReason.UNREACHABLE:
            for _ in range(item.tries):
                self._breaker.observe(self._generation, CallOutcome.FAILURE)
        elif not self._was_reached:
            self._was_reached = True
            self._breaker.observe(self._generation, CallOutcome.SUCCESS)
        return item
