"""What the services tell of the road of a request, a command and a delivery, as a tree of spans.

No verb blocks, awaits or raises: telling is free of consequences for the one who tells. Facts are
told by names of ours; what they are called in a trace is the adapter's business. No fact may be a
secret: not an environment, not a body, not the path of a receiver's URL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from rdev.domain.commands import Claimed, Kind
from rdev.domain.deliveries import Owed
from rdev.domain.ids import ProjectId
from rdev.domain.traces import TraceContext
from rdev.domain.webhook_targets import Target

# The trace that this task works for: the exemplars of its metrics name it, where it is sampled.
current_trace: ContextVar[TraceContext | None] = ContextVar("current_trace", default=None)


class Step(StrEnum):
    """The parts of an attempt that have a span of their own."""

    ATTACH = "attach"
    OUTPUT = "output"
    FINISH = "finish"


class Span(Protocol):
    """Something that takes time. Ended once; telling it more afterwards changes nothing."""

    @property
    def context(self) -> TraceContext | None:
        """What others hang their spans below; None where there is no trace. Of work that is not
        recorded here it is the context of what comes before it."""
        ...

    def tell(self, **facts: str | int | bool | None) -> None:
        """What is known of it now; None is nothing."""
        ...

    def step(self, step: Step) -> "Span":
        """A part of it begins; ended with it at the latest."""
        ...

    def end(self, fault: str | None = None) -> None:
        """It is over; `fault` names why it failed, as a word of a closed set."""
        ...


class Tracing(Protocol):
    """One verb for each thing that is followed."""

    def request(
        self, method: str, scheme: str, path: str, client_ip: str, offered: TraceContext | None
    ) -> Span:
        """A request came; `offered` is the place in a trace that its client tells."""
        ...

    def submission(self, project: ProjectId, kind: Kind) -> Span:
        """A command is being stored for the request of this task. Its context is the command's."""
        ...

    def attempt(self, claimed: Claimed, *, claim_s: float) -> Span:
        """A command was claimed or taken over, in a statement that took so long."""
        ...

    def delivery(self, owed: Owed, target: Target) -> Span:
        """An attempt to deliver begins."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportStatistics:
    """`waiting` spans now; since the start: spans `exported` and `dropped` (too many waited, or the
    collector did not take them), requests that `failed`, exports of `metrics`."""

    waiting: int = 0
    exported: int = 0
    dropped: int = 0
    failed: int = 0
    metrics: int = 0


@contextmanager
def within(trace: TraceContext | None) -> Iterator[None]:
    """What is told in the block is told of work for this trace."""
    token = current_trace.set(trace)
    try:
        yield
    finally:
        current_trace.reset(token)


class Untraced:
    """Tracing without anybody who records: the contexts of clients are handed on as they came."""

    def request(
        self, method: str, scheme: str, path: str, client_ip: str, offered: TraceContext | None
    ) -> Span:
        """Nothing."""
        return Passed(offered)

    def submission(self, project: ProjectId, kind: Kind) -> Span:
        """Nothing."""
        return Passed(current_trace.get())

    def attempt(self, claimed: Claimed, *, claim_s: float) -> Span:
        """Nothing."""
        return Passed(claimed.trace)

    def delivery(self, owed: Owed, target: Target) -> Span:
        """Nothing."""
        return Passed(owed.trace)


class Passed:
    """A span that nobody records."""

    __slots__ = ("_context",)

    def __init__(self, context: TraceContext | None) -> None:
        self._context = context

    @property
    def context(self) -> TraceContext | None:
        """See the port."""
        return self._context

    def tell(self, **facts: str | int | bool | None) -> None:
        """Nothing."""

    def step(self, step: Step) -> "Span":
        """Nothing."""
        return self

    def end(self, fault: str | None = None) -> None:
        """Nothing."""
