"""Who follows a project's life is told when the project goes; in virtual time."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import ProjectDefinition
from rdev.services.project_watch import (
    DELETED,
    LAST_WORDS_S,
    LOOK_S,
    PAUSE_S,
    TICK_S,
    ProjectWatch,
)
from tests.fakes.projects import FakeProjects
from tests.fakes.store import ACTOR, StoreState

DEMO, OTHER = ProjectId("demo"), ProjectId("other")
# The bound of the module's docstring, and what its own sleeps round to.
BOUND_S = TICK_S + LOOK_S + LAST_WORDS_S + PAUSE_S


@dataclass(slots=True)
class Stage:
    """A running watch over projects in memory."""

    watch: ProjectWatch
    state: StoreState
    told: list[tuple[str, str, float]] = field(default_factory=list)

    def uid(self, project: ProjectId) -> str:
        return self.state.projects[project].uid

    def teller(self, who: str):
        return lambda reason: self.told.append((who, reason, trio.current_time()))


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    state = StoreState()
    store = FakeProjects(state)
    for name in (DEMO, OTHER):
        definition = ProjectDefinition(id=name)
        await store.insert(definition, ACTOR, executor="local", reach="here")
    watch = ProjectWatch(store=store)
    await nursery.start(watch.run)
    return Stage(watch, state)


async def test_everybody_is_told_once_of_the_project_that_went_and_nobody_of_another(
    stage: Stage,
) -> None:
    with ExitStack() as stack:
        for who in ("first", "second"):
            stack.enter_context(stage.watch.watch(DEMO, stage.uid(DEMO), stage.teller(who)))
        stack.enter_context(stage.watch.watch(OTHER, stage.uid(OTHER), stage.teller("other")))
        await trio.sleep(3 * TICK_S)
        assert stage.told == []
        del stage.state.projects[DEMO]
        began_s = trio.current_time()
        await trio.sleep(3 * TICK_S)
    assert [(who, reason) for who, reason, _ in stage.told] == [
        ("first", DELETED),
        ("second", DELETED),
    ]
    assert max(at_s for *_, at_s in stage.told) <= began_s + BOUND_S


async def test_a_word_of_it_is_heeded_at_once_but_for_the_time_of_the_last_words(
    stage: Stage,
) -> None:
    with stage.watch.watch(DEMO, stage.uid(DEMO), stage.teller("one")):
        await trio.sleep(TICK_S / 2)
        del stage.state.projects[DEMO]
        began_s = trio.current_time()
        stage.watch.wake()
        await trio.sleep(TICK_S)
    assert began_s + LAST_WORDS_S <= stage.told[0][2] <= began_s + LAST_WORDS_S + PAUSE_S


async def test_a_project_of_the_same_name_that_was_made_since_is_another(stage: Stage) -> None:
    with stage.watch.watch(DEMO, stage.uid(DEMO), stage.teller("of the former")):
        await trio.sleep(TICK_S)
        stage.state.projects[DEMO] = replace(stage.state.projects[DEMO], uid="another")
        await trio.sleep(2 * TICK_S)
    assert [who for who, *_ in stage.told] == ["of the former"]
    with stage.watch.watch(DEMO, stage.uid(DEMO), stage.teller("of the latter")):
        await trio.sleep(3 * TICK_S)
    assert len(stage.told) == 1


async def test_a_project_that_went_before_the_first_look_is_told_too(stage: Stage) -> None:
    uid = stage.uid(DEMO)
    del stage.state.projects[DEMO]
    with stage.watch.watch(DEMO, uid, stage.teller("late")):
        await trio.sleep(BOUND_S)
    assert [who for who, *_ in stage.told] == ["late"]


async def test_a_project_that_was_made_again_before_the_first_look_is_another(stage: Stage) -> None:
    """It was taken for the one that was found, and its follower was told nothing."""
    uid = stage.uid(DEMO)
    stage.state.projects[DEMO] = replace(stage.state.projects[DEMO], uid="another")
    with (
        stage.watch.watch(DEMO, uid, stage.teller("of the former")),
        stage.watch.watch(DEMO, "another", stage.teller("of the latter")),
    ):
        await trio.sleep(BOUND_S)
    assert [who for who, *_ in stage.told] == ["of the former"]


async def test_an_end_just_behind_another_one_is_told_within_the_bound_too(stage: Stage) -> None:
    with (
        stage.watch.watch(DEMO, stage.uid(DEMO), stage.teller("first")),
        stage.watch.watch(OTHER, stage.uid(OTHER), stage.teller("second")),
    ):
        await trio.sleep(TICK_S / 2)
        del stage.state.projects[DEMO]
        stage.watch.wake()
        await trio.sleep(PAUSE_S)
        del stage.state.projects[OTHER]
        stage.watch.wake()
        began_s = trio.current_time()
        await trio.sleep(2 * TICK_S)
    assert [who for who, *_ in stage.told] == ["first", "second"]
    assert stage.told[1][2] <= began_s + 2 * LAST_WORDS_S + PAUSE_S


async def test_who_left_is_told_nothing_and_nothing_of_it_stays(stage: Stage) -> None:
    with stage.watch.watch(DEMO, stage.uid(DEMO), stage.teller("gone")):
        await trio.sleep(TICK_S)
    del stage.state.projects[DEMO]
    looks = stage.watch.statistics().looks
    await trio.sleep(3 * TICK_S)
    assert stage.told == []
    found = stage.watch.statistics()
    assert (found.watched, found.looks) == (0, looks)


async def test_a_database_that_is_away_tells_of_no_end(stage: Stage, nursery: trio.Nursery) -> None:
    class Away(FakeProjects):
        is_away = True

        async def list_all(self, **wanted):
            if self.is_away:
                raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database is away")
            return await super().list_all(**wanted)

    store = Away(stage.state)
    watch = ProjectWatch(store=store)
    await nursery.start(watch.run)
    with watch.watch(DEMO, stage.uid(DEMO), stage.teller("patient")):
        await trio.sleep(3 * TICK_S)
        assert stage.told == []
        assert watch.statistics().failures > 0
        store.is_away = False
        del stage.state.projects[DEMO]
        await trio.sleep(BOUND_S)
    assert [who for who, *_ in stage.told] == ["patient"]
