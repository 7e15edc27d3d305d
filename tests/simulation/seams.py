"""What a run is built of. A planted bug replaces one of these parts by one that errs."""

from collections.abc import Callable
from dataclasses import dataclass

from rdev.services.appender import Appender
from rdev.services.stream import Fanout
from tests.fakes.commands import FakeCommands
from tests.fakes.depths import FakeDepths
from tests.fakes.executor import FakeExecutor
from tests.fakes.lanes import FakeLanes
from tests.fakes.output import FakeOutput
from tests.fakes.store import StoreState


@dataclass(slots=True)
class Seams:
    """The store's ports, shared by all servers, and the classes of which each has its own."""

    commands: FakeCommands
    lanes: FakeLanes
    output: FakeOutput
    depths: FakeDepths
    executor: type[FakeExecutor] = FakeExecutor
    fanout: type[Fanout] = Fanout
    appender: type[Appender] = Appender


# Breaks something; the state is given because a port is built on it.
Plant = Callable[[Seams, StoreState, float], None]


def sound(state: StoreState, *, lease_s: float) -> Seams:
    """Everything as it should be."""
    return Seams(
        commands=FakeCommands(state, lease_s=lease_s),
        lanes=FakeLanes(state, lease_s=lease_s),
        output=FakeOutput(state),
        depths=FakeDepths(state),
    )
