"""Any sequence of create, start, stop and delete, with faults of the API server, servers that die
between any two steps, and two of them at once: repeating the last request brings what it asks."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
import trio

from rdev.adapters.kubernetes.connection import ApiServer, connect
from rdev.adapters.kubernetes.places import PodPlaces
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.adapters.kubernetes.template import read_template
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.pool import Pool, open_pool
from rdev.adapters.postgres.project_life import PostgresProjectLife
from rdev.adapters.postgres.projects import PostgresProjects
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.projects import Project, ProjectDefinition, Wanted
from rdev.services.project_keeper import ProjectKeeper
from rdev.services.project_steps import ProjectSteps
from rdev.services.projects import Lives, Projects
from tests.adapters.execution.observing import SYSTEM_PATH, until
from tests.adapters.kubernetes.conftest import config_of
from tests.fakes.api_server import FakeApiServer, Fault, api_server
from tests.fakes.executor import FakeExecutor
from tests.fakes.store import ACTOR

DEMO = ProjectId("demo")
NAME = "project-demo"
CLAIMS = "persistentvolumeclaims"
_LANES = "select cap > 0 from lanes where project = 'demo'"


@dataclass
class Replica:
    """One server's projects; `crashing` kills it in the middle of what it does."""

    projects: Projects
    keeper: ProjectKeeper
    store: PostgresProjects

    async def ask(self, verb: str) -> None:
        match verb:
            case "create":
                await self.projects.create(ProjectDefinition(id=DEMO), ACTOR)
            case "start":
                await self.projects.start(DEMO, ACTOR)
            case "stop":
                await self.projects.stop(DEMO, ACTOR, force=False)
            case "delete":
                await self.projects.delete(DEMO, ACTOR, force=False)


@dataclass
class Scene:
    """Two servers, one store, one cluster."""

    fake: FakeApiServer
    pool: Pool
    api: ApiServer
    watch: PodWatch
    nursery: trio.Nursery

    def replica(self) -> Replica:
        executor = FakeExecutor(self.nursery, {})
        places = PodPlaces(self.api, self.watch, read_template(None), now=lambda: datetime.now(UTC))
        life = PostgresProjectLife(pool=self.pool, holder="one")
        steps = ProjectSteps(
            life=life,
            places=places,
            executor="kubernetes",
            reach=lambda: executor.reach,
            ended=lambda _: None,
            ask_to_end=lambda _: None,
            changed=lambda _: None,
        )
        keeper = ProjectKeeper(steps=steps, life=life, places=places, reach=lambda: executor.reach)
        store = PostgresProjects(pool=self.pool)
        projects = Projects(
            store=store,
            executor=executor,
            executor_name="kubernetes",
            lives=Lives(life=life, places=places, steps=steps, keeper=keeper),
            tell_replicas=lambda _: None,
            patience_s=0.3,
        )
        return Replica(projects, keeper, store)

    async def lanes(self) -> set[bool]:
        async with self.pool.connection() as connection:
            rows = await (await connection.execute(_LANES)).fetchall()
        return {row[0] for row in rows}


@pytest.fixture
async def scene(migrated_dsn: str) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        fake = await stack.enter_async_context(api_server({"PATH": SYSTEM_PATH}))
        api = await stack.enter_async_context(connect(config_of(fake)))
        settings = ConnectionSettings(dsn=migrated_dsn)
        pool = await stack.enter_async_context(open_pool(settings, wait_s=60.0))
        nursery = await stack.enter_async_context(trio.open_nursery())
        watch = PodWatch(api, changed=lambda _: None)
        await nursery.start(watch.run)
        await until(lambda: watch.is_current, "the watch hears")
        yield Scene(fake, pool, api, watch, nursery)
        watch.stop()


def fault(chance: random.Random) -> Fault:
    """Something that may go wrong with one of the next requests."""
    return Fault(
        status=chance.choice([403, 409, 422, 429, 500, 503, 504]),
        method=chance.choice(["POST", "POST", "DELETE", "GET"]),
        path_end=chance.choice(["/pods", f"/{CLAIMS}", f"/pods/{NAME}", f"/{CLAIMS}/{NAME}"]),
        times=chance.choice([1, 1, 2, 8]),
        is_late=chance.random() < 0.5,
    )


async def step(replica: Replica, verb: str, chance: random.Random) -> None:
    """One request, or one look of the keeper; the server may die in the middle of it."""
    dies_after_s = chance.choice([float("inf"), 0.002, 0.01, 0.03, 0.1])
    with trio.move_on_after(dies_after_s):
        try:
            await (replica.keeper.run_once() if verb == "look" else replica.ask(verb))
        except RdevError as error:
            if error.code is ErrorCode.INTERNAL_ERROR:
                raise


async def taken_or_not(replica: Replica, verb: str) -> None:
    with suppress(RdevError):
        await replica.ask(verb)


async def brought(scene: Scene, verb: str) -> Project | None:
    """The cluster is well again, and the client repeats its request until it is taken."""
    scene.fake.faults.clear()
    scene.fake.lingers = False
    scene.fake.finish()
    with trio.fail_after(60):
        while True:
            replica = scene.replica()
            try:
                await replica.ask(verb)
                taken = True
            except RdevError as error:
                # To delete or stop what is not there is no request that can be taken.
                taken = error.code is ErrorCode.NOT_FOUND
            await replica.keeper.run_once()
            found = await replica.store.get(DEMO)
            if taken and (found is None or found.is_settled):
                return found


async def settled(scene: Scene, replica: Replica) -> None:
    """The keepers look until nothing is left to do."""
    while True:
        await replica.keeper.run_once()
        found = await replica.store.get(DEMO)
        if found is None or found.is_settled:
            return


async def muddle(scene: Scene, chance: random.Random) -> None:
    """Some steps, each by servers that know nothing of the ones before; sometimes by two."""
    for _ in range(chance.randrange(1, 7)):
        if chance.random() < 0.6:
            scene.fake.faults.append(fault(chance))
        scene.fake.lingers = chance.random() < 0.3
        if not scene.fake.lingers:
            scene.fake.finish()
        async with trio.open_nursery() as nursery:
            for _ in range(chance.choice([1, 1, 2])):
                verb = chance.choice(["create", "start", "stop", "delete", "look", "look"])
                nursery.start_soon(step, scene.replica(), verb, chance)


async def check(scene: Scene, verb: str, found: Project | None) -> None:
    """Whether all is as the request asks."""
    pods, volumes, lanes = scene.fake.names("pods"), scene.fake.names(CLAIMS), await scene.lanes()
    if found is None:
        assert verb != "create"
        assert (pods, volumes, lanes) == ([], [], set())
    elif verb == "stop" or (verb == "create" and found.wanted is Wanted.STOPPED):
        # (One that was there is not started by being asked for.)
        assert (pods, lanes) == ([], {False})
    else:
        assert verb != "delete"
        assert (pods, volumes, lanes) == ([NAME], [NAME], {True})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
async def test_a_repeat_brings_what_was_asked_last(scene: Scene, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(6):
        await muddle(scene, chance)
        verb = chance.choice(["create", "start", "stop", "delete"])
        await check(scene, verb, await brought(scene, verb))


@pytest.mark.parametrize("end", [None, 422], ids=["made", "refused"])
async def test_a_start_that_outlasts_its_project_leaves_nothing(
    scene: Scene, end: int | None
) -> None:
    """Its pod was made after the delete was through: it was found by its labels, and the project
    was back; or its volume stood in the way of the next one of this name for ever."""
    starter, other, held = scene.replica(), scene.replica(), trio.Event()
    late = Fault(status=200, method="POST", path_end=f"/{CLAIMS}" if end else "/pods", held=held)
    scene.fake.faults.append(late)
    if end is not None:
        scene.fake.faults.append(Fault(status=end, method="POST", path_end="/pods"))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(taken_or_not, starter, "create")
            await until(lambda: late.times == 0, "it is asked for")
            await other.ask("delete")
            while await other.store.get(DEMO) is not None:
                await other.keeper.run_once()
            assert (scene.fake.names("pods"), scene.fake.names(CLAIMS)) == ([], [])
            held.set()
    assert (scene.fake.names("pods"), scene.fake.names(CLAIMS)) == ([], [])


async def test_a_stop_that_outlasts_a_start_leaves_no_project_without_its_pod(scene: Scene) -> None:
    """Another server's stop, which had looked before the start was asked for: the start found the
    pod still there, and was through. Pods take their time to go, so the stop was not, and told
    nobody: the project was to run, with nothing left to do, and had no pod."""
    slow, other, held = scene.replica(), scene.replica(), trio.Event()
    await other.ask("create")
    await other.ask("stop")
    late = Fault(status=200, method="DELETE", path_end=f"/pods/{NAME}", held=held)
    scene.fake.faults.append(late)
    scene.fake.lingers = True
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.keeper.run_once)
            await until(lambda: late.times == 0, "it is asked for")
            await other.ask("start")
            await other.keeper.run_once()
            held.set()
        scene.fake.finish()
        scene.fake.lingers = False
        await settled(scene, other)
    assert scene.fake.names("pods") == [NAME]


async def test_a_start_that_fails_behind_a_stop_leaves_no_pod(scene: Scene) -> None:
    """Its pod was made, but the answer was lost, and so it told nobody that it had acted."""
    slow, other, held = scene.replica(), scene.replica(), trio.Event()
    late = Fault(
        status=503,
        method="POST",
        path_end="/pods",
        is_late=True,
        retry_after_s=60,
        held=held,
    )
    scene.fake.faults.append(late)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(taken_or_not, slow, "create")
            await until(lambda: late.times == 0, "it is asked for")
            await other.ask("stop")
            await other.keeper.run_once()
            held.set()
        await settled(scene, other)
    assert scene.fake.names("pods") == []
