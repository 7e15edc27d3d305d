"""Writes down what the store committed, statement by statement, by looking at the rows.

It does not ask the services, and it knows of leases only what the statement brought along.
"""

from collections.abc import Mapping, Sequence

import trio

from rdev.domain.commands import Claimed as Taken
from rdev.domain.commands import Lease, NewCommand, Status
from rdev.domain.ids import CommandId
from rdev.domain.lanes import Lane
from rdev.ports.commands import Accepted as Answer
from rdev.ports.commands import Beat, Claims
from tests.fakes.store import Row, StoreState
from tests.simulation.history import (
    Accepted,
    Appended,
    CancelAsked,
    Claimed,
    Ended,
    History,
    QueuedAgain,
    Released,
    Renewed,
    TakenOver,
    Touched,
)


def lane_name(lane: Lane) -> str:
    """As the history has it."""
    return f"{lane.project}/{lane.lane_class}"


class Recorder:
    """`Watch`: between a statement's effect and this nothing else happens."""

    def __init__(self, state: StoreState, history: History) -> None:
        self._state = state
        self._history = history
        self._seqs: dict[CommandId, int] = {}
        self._ended: set[CommandId] = set()
        self._released: set[int] = set()
        # Accepted and not ended.
        self.open = 0
        self.changed = trio.Event()

    def committed(  # noqa: C901  # a table
        self, name: str, arguments: tuple[object, ...], result: object
    ) -> None:
        """Write down what this statement did."""
        match name, arguments, result:
            case "insert", (NewCommand() as new, *_), Answer(is_replay=False):
                self._accepted(new, self._state.rows[new.id])
                self._appended({})
            case "claim", (*_, touched, _), Claims(claimed=claimed):
                self._touched(tuple(sorted(map(lane_name, touched))))
                self._taken(Claimed, claimed)
            case "take_over", _, [*claimed]:
                self._taken(TakenOver, claimed)
            case "heartbeat", ([*leases], *_), Beat(stale=stale):
                self._renewed([lease for lease in leases if lease not in stale])
            case "append", ([*batch], *_), _:
                self._appended({one.lease.command: one.lease.id for one in batch})
            case "request_cancel", (str() as command, *_), answer if answer is not None:
                self._history.events.append(CancelAsked(trio.current_time(), command))
                self._appended({})
            case "touch", (lanes, *_), _:
                self._touched(tuple(sorted(map(lane_name, lanes))))
            case "repair", _, _:
                self._touched(None)
            case "expire" | "release" | "release_holder", _, _:
                self._appended({})
        if name in ("release", "release_holder", "take_over"):
            self._given_back()

    def _accepted(self, new: NewCommand, row: Row) -> None:
        event = Accepted(
            trio.current_time(),
            new.id,
            lane_name(row.lane),
            new.priority.level,
            new.idempotency.key if new.idempotency else None,
            row.expires_at,
            new.retry,
        )
        self._history.events.append(event)
        self._seqs[new.id] = 0
        self.open += 1

    def _taken(self, what: type[Claimed] | type[TakenOver], taken: Sequence[Taken]) -> None:
        """Ended ones first: a claim ends what expired before it takes what is behind."""
        ids = {one.lease.command for one in taken}
        self._appended({}, but=ids)
        for one in taken:
            row = self._state.rows[one.lease.command]
            lease = one.lease
            event = what(
                trio.current_time(), lease.command, lease.id, row.holder or "", row.lease_until
            )
            self._history.events.append(event)
        self._appended({one.lease.command: one.lease.id for one in taken})

    def _renewed(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            until = self._state.rows[lease.command].lease_until
            event = Renewed(trio.current_time(), lease.command, lease.id, until)
            self._history.events.append(event)

    def _given_back(self) -> None:
        for row in self._state.rows.values():
            lease = row.lease_id
            if lease is not None and row.lease_until < 0 and lease not in self._released:
                self._released.add(lease)
                event = Released(trio.current_time(), row.command.id, lease)
                self._history.events.append(event)

    def _touched(self, lanes: tuple[str, ...] | None) -> None:
        self._history.events.append(Touched(trio.current_time(), lanes))

    def _appended(
        self,
        leases: Mapping[CommandId, int],
        but: frozenset[CommandId] | set[CommandId] = frozenset(),
    ) -> None:
        """What the logs have more than before, and who has ended."""
        now = trio.current_time()
        for id_, row in self._state.rows.items():
            known, last = self._seqs[id_], row.command.last_seq
            if last == known or id_ in but:
                continue
            self._seqs[id_] = last
            lease = leases.get(id_)
            self._history.events.append(Appended(now, id_, lease, known + 1, last))
            if lease is not None and row.command.status is Status.QUEUED:
                self._history.events.append(QueuedAgain(now, id_, lease))
            if row.command.status.is_terminal and id_ not in self._ended:
                self._ended.add(id_)
                self._end(row, lease)

    def _end(self, row: Row, lease: int | None) -> None:
        command = row.command
        event = Ended(trio.current_time(), command.id, lease, command.status, command.reason)
        self._history.events.append(event)
        self.open -= 1
        self.changed.set()
        self.changed = trio.Event()
