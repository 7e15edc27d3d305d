"""The order in which commands are served: ageing within a lane, round robin between lanes.

A lane is a project's commands of one class; at most `LANE_CAP` of them run, in order of rank. Among
lanes the one with the smallest `due` is served next. Both are plain arithmetic over the database's
clock, stored with the rows, so nothing has to be rewritten as time passes.

Bounds that follow, and are tested:
1. In a lane, a command is overtaken only by commands accepted less than (difference of levels) ×
   `AGE_STEP_S` after it.
2. A lane that was served at time t stands behind every lane whose head was accepted, and which was
   last served, before t - (difference of the heads' levels) × `AGE_STEP_S`. So at one level a flood
   in one project delays another project's command by at most one turn of each lane.
"""

from dataclasses import dataclass

from rdev.domain.commands import LaneClass
from rdev.domain.ids import ProjectId

# What one level of priority is worth, in seconds of waiting.
AGE_STEP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The key of a lane."""

    project: ProjectId
    lane_class: LaneClass


def rank(*, accepted_at_s: float, level: int) -> float:
    """Where a command stands in its lane: the smallest is served first. Epoch seconds."""
    return accepted_at_s - level * AGE_STEP_S


def due(*, head_rank: float, head_level: int, last_start_s: float) -> float:
    """Where a lane stands among lanes, by the command at its head and its last start."""
    return max(head_rank, last_start_s - head_level * AGE_STEP_S)
