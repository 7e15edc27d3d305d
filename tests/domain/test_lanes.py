"""The two bounds of `domain/lanes.py`, on a model of the queue over its functions."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from rdev.domain.lanes import AGE_STEP_S, due, rank

LANES = 4
# What happens, in seconds after the last thing, and in which lane.
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "serve", "serve", "end"]),
        st.integers(0, LANES - 1),
        st.sampled_from([0, 1, 2]),
        st.sampled_from([0.001, 0.001, 0.5, 7.0, 29.0, 40.0]),
    ),
    min_size=5,
    max_size=60,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A queued command."""

    accepted_at_s: float
    level: int

    @property
    def rank(self) -> float:
        return rank(accepted_at_s=self.accepted_at_s, level=self.level)


@dataclass(slots=True)
class ModelLane:
    """A lane with room for two."""

    queued: list[Waiting] = field(default_factory=list)
    running: int = 0
    last_start_s: float = -1_000.0

    @property
    def head(self) -> Waiting:
        return min(self.queued, key=lambda one: one.rank)

    @property
    def due(self) -> float:
        return due(
            head_rank=self.head.rank,
            head_level=self.head.level,
            last_start_s=self.last_start_s,
        )

    @property
    def can_be_served(self) -> bool:
        return bool(self.queued) and self.running < 2


def is_owed(lane: ModelLane, other: ModelLane) -> bool:
    """Bound 2, in times: whether `lane` must stand behind `other`."""
    aged_s = (lane.head.level - other.head.level) * AGE_STEP_S
    since_s = max(other.head.accepted_at_s, other.last_start_s)
    return lane.last_start_s - aged_s > since_s


def is_overtaken_too_late(served: Waiting, waiting: Waiting) -> bool:
    """Bound 1, in times: whether `served` must not have come before `waiting`."""
    aged_s = (served.level - waiting.level) * AGE_STEP_S
    return served.accepted_at_s - waiting.accepted_at_s > aged_s


@settings(max_examples=1_500, deadline=None)
@given(ACTIONS)
def test_nobody_is_overtaken_beyond_the_bounds(
    actions: list[tuple[str, int, int, float]],
) -> None:
    lanes = [ModelLane() for _ in range(LANES)]
    now_s = 0.0
    for action, number, level, later_s in actions:
        now_s += later_s
        lane = lanes[number]
        if action == "submit":
            lane.queued.append(Waiting(accepted_at_s=now_s, level=level))
        elif action == "end":
            lane.running = max(0, lane.running - 1)
        elif eligible := [one for one in lanes if one.can_be_served]:
            served = min(eligible, key=lambda one: one.due)
            assert not any(is_owed(served, other) for other in eligible if other is not served)
            head = served.head
            assert not any(is_overtaken_too_late(head, one) for one in served.queued)
            served.queued.remove(head)
            served.running += 1
            served.last_start_s = now_s


@given(st.integers(1, 6), st.integers(1, 50), st.floats(0.001, 100))
def test_a_flood_costs_another_project_one_turn_of_each_lane(
    noisy: int, flood: int, later_s: float
) -> None:
    lanes = [ModelLane() for _ in range(noisy)]
    for lane in lanes:
        lane.queued = [Waiting(accepted_at_s=n * 0.001, level=1) for n in range(flood)]
    quiet = ModelLane(queued=[Waiting(accepted_at_s=later_s + 1, level=1)])
    turns = 0
    now_s = later_s + 1
    while quiet.queued:
        now_s += 0.001
        eligible = [one for one in (*lanes, quiet) if one.queued]
        served = min(eligible, key=lambda one: one.due)
        served.queued.remove(served.head)
        served.last_start_s = now_s
        turns += 1
    assert turns <= noisy + 1


def test_a_level_is_worth_half_a_minute() -> None:
    assert rank(accepted_at_s=100.0, level=2) == rank(accepted_at_s=70.0, level=1)
    assert due(head_rank=50.0, head_level=1, last_start_s=0.0) == 50.0
    assert due(head_rank=50.0, head_level=1, last_start_s=90.0) == 60.0
