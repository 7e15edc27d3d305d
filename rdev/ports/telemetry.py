"""What rdev counts, in domain verbs, and what every log line of a running task carries.

No verb blocks, awaits or raises: telling is free of consequences for the one who tells. What a verb
becomes (a counter, a histogram) is the adapter's business.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import Protocol

from rdev.domain.breaker import BreakerReason, BreakerState
from rdev.domain.commands import Status
from rdev.domain.depths import Depths
from rdev.domain.ids import ProjectId

# Fields that the logs adapter adds to each line written by this task and the tasks it starts
# (`request_id`, `trace_id`). Set it, never change the mapping in place: children share it.
log_context: ContextVar[Mapping[str, str] | None] = ContextVar("log_context", default=None)


class AuthFailure(StrEnum):
    """Why a credential was refused, in the words of the monitoring guide."""

    INVALID = "invalid"
    REVOKED = "revoked"
    EXPIRED = "expired"
    IP_BLOCKED = "ip_blocked"


class Telemetry(Protocol):
    """One verb per thing that an operator watches."""

    def request_started(self, method: str, path: str) -> None:
        """An HTTP request was matched to a route; `path` is the route's template."""
        ...

    def request_finished(self, method: str, path: str, status: int, latency_s: float) -> None:
        """The request that `request_started` told of is answered.

        A held request (a stream, `?wait`) counts as finished at its head, and its latency ends
        where the holding began.
        """
        ...

    def command_claimed(self, kind: str, wait_s: float) -> None:
        """A command was claimed to be run, so long after it was accepted; no take-over."""
        ...

    def command_started(self, project: ProjectId, kind: str) -> None:
        """A command runs through this server now."""
        ...

    def command_left(self, project: ProjectId, kind: str) -> None:
        """What `command_started` told of is over here, whether the command has ended or not."""
        ...

    def command_finished(
        self, project: ProjectId, kind: str, status: Status, duration_s: float
    ) -> None:
        """A command that ran has its final status, and that is stored."""
        ...

    def kill_unconfirmed(self, kind: str) -> None:
        """A command was to be ended, and something of it may still run."""
        ...

    def queue_counted(self, depths: Depths | None) -> None:
        """The queue was counted; None where it could not be."""
        ...

    def loop_was_late(self, late_s: float) -> None:
        """By so much the event loop came later than asked to what was due."""
        ...

    def stream(self, project: ProjectId) -> AbstractContextManager[None]:
        """A client follows the project's events for as long as the block lasts."""
        ...

    def events_sent(self, project: ProjectId, event_type: str, count: int) -> None:
        """`count` events of one type were written to a stream."""
        ...

    def events_replayed(self, project: ProjectId, count: int) -> None:
        """So many of them were read from the database for this stream."""
        ...

    def slow_reader_cut(self, project: ProjectId) -> None:
        """A stream was ended because its client took nothing."""
        ...

    def stream_written(self, lag_s: float) -> None:
        """What this server had news of so long ago is written to all who waited for it."""
        ...

    def authenticated(self, failure: AuthFailure | None) -> None:
        """A credential was checked; `failure` is None where it was accepted."""
        ...

    def limit_checked(self, limit: str, *, refused: bool) -> None:
        """A limit was asked. Only `rate_limit` tells of every check; the others of refusals.

        `limit` comes from a closed set in the code: `rate_limit`, `in_flight`, `held`, `body`, …
        """
        ...

    def rate_decided(self, policy: str, *, refused: bool) -> None:
        """A policy of the rate limits decided. `policy` comes from a closed set in the code."""
        ...


class WebhookTelemetry(Protocol):
    """What the dispatcher tells; no verb blocks, awaits or raises either."""

    def webhook_attempted(self, outcome: str, latency_s: float) -> None:
        """An attempt is over, and that is stored. `outcome`: `accepted`, the class of the status
        (`3xx`, `4xx`, `5xx`, `other`), or a `SendFault`."""
        ...

    def webhook_dead(self, reason: str, count: int = 1) -> None:
        """So many deliveries were given up. `reason` is a `DeadReason`."""
        ...


class UpkeepTelemetry(Protocol):
    """What the housekeeper tells; no verb blocks, awaits or raises either."""

    def kept_house(self, duty: str, count: int) -> None:
        """So many things were put away. `duty` comes from a closed set in the code: `output_days`,
        `audit_days`, `idempotency_keys`, `rate_windows`, `events`, `commands`, `folders`,
        `orphans`."""
        ...


class BreakerTelemetry(Protocol):
    """What breakers tell; no verb blocks, awaits or raises either."""

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        """A breaker is in another state. `breaker` comes from a closed set in the code: `database`,
        `kubernetes` (the API server), `exec` (those of all projects)."""
        ...


class Silence:
    """Telemetry that nobody listens to: for tests and for parts that run without a server."""

    def request_started(self, method: str, path: str) -> None:
        """Nothing."""

    def request_finished(self, method: str, path: str, status: int, latency_s: float) -> None:
        """Nothing."""

    def command_claimed(self, kind: str, wait_s: float) -> None:
        """Nothing."""

    def command_started(self, project: ProjectId, kind: str) -> None:
        """Nothing."""

    def command_left(self, project: ProjectId, kind: str) -> None:
        """Nothing."""

    def command_finished(
        self, project: ProjectId, kind: str, status: Status, duration_s: float
    ) -> None:
        """Nothing."""

    def kill_unconfirmed(self, kind: str) -> None:
        """Nothing."""

    def queue_counted(self, depths: Depths | None) -> None:
        """Nothing."""

    def loop_was_late(self, late_s: float) -> None:
        """Nothing."""

    def events_replayed(self, project: ProjectId, count: int) -> None:
        """Nothing."""

    def slow_reader_cut(self, project: ProjectId) -> None:
        """Nothing."""

    def stream_written(self, lag_s: float) -> None:
        """Nothing."""

    def rate_decided(self, policy: str, *, refused: bool) -> None:
        """Nothing."""

    def webhook_attempted(self, outcome: str, latency_s: float) -> None:
        """Nothing."""

    def webhook_dead(self, reason: str, count: int = 1) -> None:
        """Nothing."""

    @contextmanager
    def stream(self, project: ProjectId) -> Iterator[None]:
        """Nothing."""
        yield

    def events_sent(self, project: ProjectId, event_type: str, count: int) -> None:
        """Nothing."""

    def authenticated(self, failure: AuthFailure | None) -> None:
        """Nothing."""

    def limit_checked(self, limit: str, *, refused: bool) -> None:
        """Nothing."""

    def kept_house(self, duty: str, count: int) -> None:
        """Nothing."""

    def breaker_changed(self, breaker: str, state: BreakerState, reason: BreakerReason) -> None:
        """Nothing."""
