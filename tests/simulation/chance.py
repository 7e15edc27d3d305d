"""Everything that a seed decides: the scheduler's order, ids, pauses, and the shape of the run.

Each run has only some kinds of faults (swarm testing): a run with all of them at once seldom gets
far enough for the rare ones. Source: Groce et al., "Swarm Testing", ISSTA 2012.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar
from uuid import UUID

import trio
from trio._core import _run as trio_run

from rdev.domain.backoff import Backoff

T = TypeVar("T")


class FaultKind(StrEnum):
    """What can be broken."""

    DB_BEFORE = "db_before"  # an error, the statement was not executed
    DB_UNCOMMITTED = "db_uncommitted"  # executed, its transaction died, its locks stayed a while
    DB_REPLY = "db_reply"  # committed, the reply was lost
    DB_LATENCY = "db_latency"  # a statement or its reply takes seconds
    DB_AWAY = "db_away"  # nobody reaches the database for a while
    NOTIFY = "notify"  # wake-ups between servers are lost
    CRASH = "crash"  # a server dies at some time
    CRASH_AT = "crash_at"  # a server dies right before or after a statement took effect
    STOP = "stop"  # a server is told to stop
    INTERRUPT = "interrupt"  # a server is told to stop and to end what it runs
    PAUSE = "pause"  # a server stands still, perhaps past its leases, and goes on
    PLACE_RESTART = "place_restart"  # a container restarts: its processes die
    PLACE_AWAY = "place_away"  # a project cannot be reached; its processes go on
    LATE_EXEC = "late_exec"  # an attach reaches its project long after it was sent
    CLIENT_GONE = "client_gone"  # a client leaves in mid-request
    STREAM_CUT = "stream_cut"  # a client's stream ends


class Chance:
    """One seeded generator; what is drawn first, second … is part of the run."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.random = self._random.random
        self.uniform = self._random.uniform
        self.integer = self._random.randint

    def odds(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def one_of(self, choices: Sequence[T]) -> T:
        """Each as likely."""
        return choices[int(self.random() * len(choices))]

    def uuid(self) -> UUID:
        """As UUIDv7: later ones are greater."""
        return UUID(int=(int(trio.current_time() * 1e6) << 80) | self._random.getrandbits(80))

    def backoff(self) -> Backoff:
        """A run of failures with seeded jitter."""
        return Backoff(random=self.random)


def seed_scheduler(seed: int) -> None:
    """Make the next `trio.run` of this process repeatable. Source: trio's own hypothesis plugin,
    which sets the same switch (`trio._core._run._hypothesis_plugin_setup`)."""
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a seed's run is like. Times in virtual seconds."""

    servers: int
    projects: int
    clients: int
    lease_s: float
    running_max: int
    project_max: int
    # The usual way of a statement or its reply; 0: none.
    latency_s: float
    # How long things are broken, and about how often.
    faulty_s: float
    every_s: float
    kinds: frozenset[FaultKind]
    # What a program takes, and over how long clients come.
    program_s: float
    arrival_s: float
    # Folders on the servers' machine: an instance is known beforehand and cannot change.
    standing: bool

    def has(self, kind: FaultKind) -> bool:
        """Whether this run has such faults."""
        return kind in self.kinds


def draw_shape(chance: Chance) -> Shape:
    """Small runs: the bugs of such systems show with two servers and a handful of commands."""
    faulty_s = chance.one_of((0.0, 4.0, 6.0, 6.0, 8.0, 10.0))
    kinds = [kind for kind in FaultKind if chance.odds(0.4)]
    standing = chance.odds(0.3)
    if standing and FaultKind.PLACE_RESTART in kinds:
        kinds.remove(FaultKind.PLACE_RESTART)
    # One in twenty is long enough for priorities to age.
    is_long = chance.odds(0.05)
    return Shape(
        servers=chance.one_of((2, 2, 2, 3)),
        projects=chance.one_of((1, 2, 3)),
        clients=chance.integer(2, 7),
        lease_s=chance.one_of((1.5, 2.0, 4.0)),
        running_max=chance.one_of((1, 2, 8)),
        project_max=chance.one_of((2, 100, 100)),
        latency_s=chance.one_of((0.0, 0.01, 0.2)),
        faulty_s=faulty_s,
        every_s=chance.one_of((0.7, 2.0)),
        kinds=frozenset(kinds) if faulty_s else frozenset(),
        program_s=20.0 if is_long else chance.one_of((0.2, 1.0, 2.5)),
        arrival_s=60.0 if is_long else chance.one_of((0.0, 2.0, 8.0)),
        standing=standing,
    )
