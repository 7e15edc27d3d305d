"""The use cases of commands: what is stored, who is told, and who waits for what."""

from collections.abc import Iterator
from functools import partial
from itertools import count
from uuid import UUID

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from rdev.domain.audit import Actor
from rdev.domain.commands import Command, Kind, LaneClass, NewCommand, Priority, Retry, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import CommandId, ProjectId
from rdev.domain.lanes import Lane
from rdev.domain.projects import ProjectDefinition
from rdev.domain.requests import Common
from rdev.domain.stream import Source
from rdev.ports.commands import Accepted, CancelResult
from rdev.ports.projects import ProjectMade
from rdev.services.commands import Commands
from rdev.services.projects import Projects
from rdev.services.shield import COMMIT_SHIELD_S
from tests.fakes.commands import FakeCommands
from tests.fakes.depths import FakeDepths
from tests.fakes.lives import standing_lives
from tests.fakes.projects import FakeProjects
from tests.fakes.store import ACTOR, StoreState
from tests.services.scripted import PROJECT, Place, Server, gate_of, make_project

UNKNOWN = CommandId("cmd_" + "f" * 32)
COMMON = Common(
    env={"A": "b"},
    cwd="src",
    stdin=b"in",
    timeout_s=60,
    priority=Priority.HIGH,
    expires_in_s=None,
    retry=Retry.NEVER,
)


class Office:
    """The use cases over a server that does not run, and who was told."""

    def __init__(self, server: Server, store: FakeCommands | None = None) -> None:
        self.server = server
        self.woken: list[Lane] = []
        self.cancelled: list[CommandId] = []
        numbers: Iterator[int] = count(1)
        self.commands = Commands(
            store=store or server.store,
            log=server.log,
            gate=gate_of(FakeDepths(server.state)),
            fanout=server.fanout,
            wake_workers=self.woken.append,
            reach_holder=self.cancelled.append,
            new_uuid=lambda: UUID(int=next(numbers)),
        )

    async def submit(self, project: str = PROJECT) -> Accepted:
        return await self.commands.submit(
            ACTOR,
            ProjectId(project),
            Kind.SHELL,
            argv=("sh", "-c", "true"),
            common=COMMON,
            env={"B": "c"},
        )


@pytest.fixture
async def office(server: Server) -> Office:
    return Office(server)


async def test_a_submission_is_stored_and_wakes_the_workers(office: Office) -> None:
    accepted = await office.submit()
    assert accepted.queue_position == 1
    assert office.woken == [Lane(project=PROJECT, lane_class=LaneClass.WORK)]
    row = office.server.state.rows[accepted.command.id]
    assert row.new.spec.env == {"A": "b", "B": "c"}
    assert (row.new.spec.cwd, row.new.spec.stdin, row.new.spec.timeout_s) == ("src", b"in", 60)
    assert (row.new.priority, row.new.actor) == (Priority.HIGH, ACTOR)


async def test_a_submission_to_an_unknown_project_wakes_nobody(office: Office) -> None:
    with pytest.raises(RdevError) as caught:
        await office.submit("nowhere")
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert office.woken == []


async def test_reading_an_unknown_command_is_not_found(office: Office) -> None:
    for ask in (office.commands.get, partial(office.commands.cancel, ACTOR)):
        with pytest.raises(RdevError) as caught:
            await ask(UNKNOWN)
        assert caught.value.code is ErrorCode.NOT_FOUND
    assert office.woken == []


async def test_only_a_queued_command_has_a_position(office: Office) -> None:
    command = (await office.submit()).command
    assert await office.commands.queue_position(command) == 1
    found = (await office.commands.cancel(ACTOR, command.id)).id
    assert await office.commands.queue_position(await office.commands.get(found)) is None


async def test_commands_are_listed_and_their_log_is_read(office: Office) -> None:
    ids = [(await office.submit()).command.id for _ in range(3)]
    found = await office.commands.list_for_project(
        PROJECT, status=None, kind=None, before=None, limit=2
    )
    assert [command.id for command in found.items] == [ids[2], ids[1]]
    [chunk] = await office.commands.read_log(ids[0], after=0)
    assert chunk.source is Source.LIFE
    assert await office.commands.read_log(ids[0], after=1) == []
    assert await office.commands.tail(ids[0], Source.STDOUT, tail_bytes=10) == []
    assert await office.commands.oldest_seq(ids[0]) == 1


async def test_a_cancel_tells_the_holder_the_workers_and_the_readers(office: Office) -> None:
    command = (await office.submit()).command.id
    with office.server.fanout.end_of(command) as ended:
        assert (await office.commands.cancel(ACTOR, command)).status is Status.CANCELLED
        assert ended.is_set()
    assert office.cancelled == [command]
    assert len(office.woken) == 2  # the submission's lane, and again when it left it
    assert office.server.told == [command]


# Waiting for an end


async def test_waiting_ends_with_the_command(office: Office, nursery: trio.Nursery) -> None:
    command = (await office.submit()).command.id
    seen: list[Command] = []

    async def wait() -> None:
        seen.append(await office.commands.ended(command, within_s=60))

    nursery.start_soon(wait)
    await trio.sleep(0.3)
    await office.commands.cancel(ACTOR, command)
    await wait_all_tasks_blocked()
    assert [one.status for one in seen] == [Status.CANCELLED]
    assert trio.current_time() == pytest.approx(0.3, abs=0.01)


async def test_waiting_ends_after_its_time(office: Office) -> None:
    command = (await office.submit()).command.id
    found = await office.commands.ended(command, within_s=7.5)
    assert found.status is Status.QUEUED
    assert trio.current_time() == pytest.approx(7.5, abs=0.01)


async def test_waiting_no_time_looks_once(office: Office) -> None:
    command = (await office.submit()).command.id
    assert (await office.commands.ended(command, within_s=0)).status is Status.QUEUED
    assert trio.current_time() == pytest.approx(0, abs=0.01)


async def test_a_lost_hint_costs_a_waiter_a_second(office: Office, nursery: trio.Nursery) -> None:
    command = (await office.submit()).command.id

    async def cancel_unseen() -> None:
        await trio.sleep(2.5)
        await office.server.store.request_cancel(command, ACTOR)

    nursery.start_soon(cancel_unseen)
    found = await office.commands.ended(command, within_s=60)
    assert found.status is Status.CANCELLED
    assert trio.current_time() <= 3.6


async def test_waiting_ends_when_the_server_stops(office: Office, nursery: trio.Nursery) -> None:
    command = (await office.submit()).command.id

    async def stop() -> None:
        await trio.sleep(5)
        office.server.fanout.stop()

    nursery.start_soon(stop)
    assert (await office.commands.ended(command, within_s=60)).status is Status.QUEUED
    assert trio.current_time() <= 6.1


# Cancellation


class SlowStore(FakeCommands):
    """A commit in the middle of every write, and the way there and back takes time."""

    def __init__(self, state: StoreState, before_s: float, after_s: float) -> None:
        super().__init__(state)
        self.before_s, self.after_s = before_s, after_s

    async def insert(self, new: NewCommand) -> Accepted:
        await trio.sleep(self.before_s)
        accepted = await super().insert(new)
        await trio.sleep(self.after_s)
        return accepted

    async def request_cancel(self, command: CommandId, actor: Actor) -> CancelResult | None:
        await trio.sleep(self.before_s)
        result = await super().request_cancel(command, actor)
        await trio.sleep(self.after_s)
        return result


TIMES = st.integers(0, 40).map(lambda tenths: tenths / 10)


@settings(max_examples=100, deadline=None)
@given(before_s=TIMES, after_s=TIMES, cancel_s=TIMES)
def test_whatever_was_committed_was_announced(
    before_s: float, after_s: float, cancel_s: float
) -> None:
    """For a submission and for a cancel, cancelled anywhere; the shield holds for 5 s."""

    async def check() -> None:
        async with trio.open_nursery() as nursery:
            server = Server(state=StoreState(), place=Place(nursery, {}))
            await make_project(server)
            await submit_and_cancel(server)

    async def submit_and_cancel(server: Server) -> None:
        office = Office(server, SlowStore(server.state, before_s, after_s))
        with trio.move_on_after(cancel_s):
            try:
                await office.submit()
            except RdevError:
                # The shield's time was up: nobody knows, and nobody was told.
                assert before_s + after_s >= COMMIT_SHIELD_S
                return
        assert len(office.woken) == len(server.state.rows)
        for command in server.state.rows:
            with trio.move_on_after(cancel_s):
                await office.commands.cancel(ACTOR, command)
            ended = server.state.rows[command].command.status is Status.CANCELLED
            assert office.cancelled == ([command] if ended else [])
            assert server.told == office.cancelled

    trio.run(check, clock=MockClock(autojump_threshold=0))


async def test_the_project_of_a_command_is_told_and_remembered(office: Office) -> None:
    command = (await office.submit()).command.id
    assert await office.commands.project_of(command) == PROJECT
    office.server.state.unavailable = True
    assert await office.commands.project_of(command) == PROJECT
    office.server.state.unavailable = False
    assert await office.commands.project_of(CommandId("cmd_" + "f" * 32)) is None


# Projects


async def test_a_project_is_made_in_its_place_first(server: Server) -> None:
    told: list[ProjectId] = []
    projects = Projects(
        store=FakeProjects(server.state),
        executor=server.place,
        executor_name="fake",
        lives=standing_lives(server.place),
        tell_replicas=told.append,
    )
    definition = ProjectDefinition(id=ProjectId("fresh"))
    made = await projects.create(definition, ACTOR)
    project = made.project
    assert made.is_new
    assert (project.executor, project.reach) == ("fake", server.place.reach)
    assert "fresh" in server.place._projects
    assert await projects.create(definition, ACTOR) == ProjectMade(project=project, is_new=False)
    assert await projects.get("fresh") == project
    found = await projects.list_all(within=None, after=None, limit=10)
    assert [one.id for one in found] == ["demo", "fresh"]
    for name in ("nowhere", "Not/An/Id"):
        with pytest.raises(RdevError) as caught:
            await projects.get(name)
        assert caught.value.code is ErrorCode.NOT_FOUND
