"""How much is queued, as far as one may see it."""

from rdev.domain.commands import Priority
from rdev.domain.depths import Depth, Depths, ProjectDepth
from rdev.domain.ids import ProjectId

A, B = ProjectId("a"), ProjectId("b")
DEPTHS = Depths(
    projects={
        A: ProjectDepth(waiting={Priority.HIGH: Depth(queued=2, oldest_wait_s=5)}, running=1),
        B: ProjectDepth(waiting={Priority.LOW: Depth(queued=7, oldest_wait_s=9)}, running=3),
    }
)


def test_within_some_projects_only_theirs_is_counted() -> None:
    seen = DEPTHS.within(frozenset({A, ProjectId("z")}))
    assert (seen.depth, seen.running) == (Depth(queued=2, oldest_wait_s=5), 1)
    assert seen.of_priority(Priority.LOW) == Depth()
    assert seen.projects.keys() == {A}


def test_within_all_it_is_the_whole() -> None:
    assert DEPTHS.within(None) == DEPTHS
    assert DEPTHS.within(frozenset()).depth == Depth()
