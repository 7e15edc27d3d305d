"""Projects that stand: folders, of which nothing is asked but to be made."""

from typing import cast

from rdev.ports.execution import Executor
from rdev.ports.project_life import ProjectLife
from rdev.services.project_keeper import ProjectKeeper
from rdev.services.project_steps import ProjectSteps
from rdev.services.projects import Lives
from rdev.services.standing_places import StandingPlaces


def standing_lives(executor: Executor) -> Lives:
    """For tests in which nothing is asked of a project: the store of that is missing."""
    life = cast("ProjectLife", None)
    places = StandingPlaces(executor)
    steps = ProjectSteps(
        life=life,
        places=places,
        executor="fake",
        reach=lambda: executor.reach,
        ended=lambda _: None,
        ask_to_end=lambda _: None,
        changed=lambda _: None,
    )
    keeper = ProjectKeeper(steps=steps, life=life, places=places, reach=lambda: executor.reach)
    return Lives(life=life, places=places, steps=steps, keeper=keeper)
