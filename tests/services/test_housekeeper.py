"""The housekeeper: each minute, one at a time, and again soon where it failed."""

from collections import Counter
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
import trio

from rdev.domain.commands import Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import KillReport, LostReason
from rdev.domain.idempotency import IDEMPOTENCY_S, Idempotency
from rdev.domain.ids import CommandId, ProjectId, attempt_id
from rdev.domain.retention import Retention
from rdev.ports.telemetry import Silence
from rdev.ports.upkeep import StoreDuties
from rdev.services.housekeeper import (
    DAY_S,
    DAYS_AHEAD,
    INTERVAL_S,
    TIDY_AGE_S,
    Housekeeper,
)
from tests.fakes.upkeep import FakeUpkeep
from tests.services.scripted import PROJECT, Server, backoff, make_project, submit

KEEP = Retention(days=7, log_max_bytes=10**9)


class Counted(Silence):
    def __init__(self) -> None:
        self.kept: Counter[str] = Counter()

    def kept_house(self, duty: str, count: int) -> None:
        self.kept[duty] += count


@dataclass(slots=True, kw_only=True)
class House:
    """A housekeeper on a server's fakes."""

    server: Server
    retention: Retention = KEEP
    telemetry: Counted = field(default_factory=Counted)
    upkeep: FakeUpkeep = field(init=False)
    keeper: Housekeeper = field(init=False)

    def __post_init__(self) -> None:
        self.upkeep = FakeUpkeep(self.server.state)
        self.keeper = Housekeeper(
            upkeep=self.upkeep,
            executor=self.server.place,
            telemetry=self.telemetry,
            audit_days=400,
            retention=self.retention,
            backoff=backoff,
        )

    async def ended(self, program: str = "quick", project: str = PROJECT) -> CommandId:
        """A command that ran to its end."""
        command = await submit(self.server, program, project=project)
        self.server.queue.wake()
        await self.server.ended(command)
        return command

    def age(self, seconds: float) -> None:
        """Make all that is stored so much older; the queue need not tick through it."""
        self.server.state.age(seconds)

    def known(self) -> set[CommandId]:
        return set(self.server.state.rows)


@pytest.fixture
async def house(server: Server, nursery: trio.Nursery) -> House:
    await nursery.start(server.queue.run)
    return House(server=server)


class Flaky:
    """Upkeep that remembers when it was asked, and fails where it is told to."""

    def __init__(self, upkeep: FakeUpkeep) -> None:
        self._upkeep = upkeep
        self.at: list[float] = []
        self.error: RdevError | None = None

    def store_turn(self) -> AbstractAsyncContextManager[StoreDuties | None]:
        self.at.append(trio.current_time())
        if self.error is not None:
            raise self.error
        return self._upkeep.store_turn()

    def place_turn(self, reach: str) -> AbstractAsyncContextManager[object]:
        return self._upkeep.place_turn(reach)


@pytest.fixture
def flaky(server: Server) -> Flaky:
    return Flaky(FakeUpkeep(server.state))


def keeper_of(server: Server, flaky: Flaky) -> Housekeeper:
    return Housekeeper(
        upkeep=flaky,
        executor=server.place,
        telemetry=Silence(),
        audit_days=400,
        retention=KEEP,
        backoff=backoff,
    )


async def test_it_works_at_the_start_and_every_minute(
    server: Server, flaky: Flaky, nursery: trio.Nursery
) -> None:
    await nursery.start(keeper_of(server, flaky).run)
    began_s = flaky.at[0] if flaky.at else trio.current_time()
    await trio.sleep(2.5 * INTERVAL_S)
    assert flaky.at == [began_s, began_s + INTERVAL_S, began_s + 2 * INTERVAL_S]


async def test_a_database_that_is_gone_is_asked_again_soon(
    server: Server, flaky: Flaky, nursery: trio.Nursery
) -> None:
    flaky.error = RdevError(ErrorCode.SERVICE_UNAVAILABLE, "gone")
    await nursery.start(keeper_of(server, flaky).run)
    await trio.sleep(60)
    assert 10 < len(flaky.at) < 60
    flaky.error = None
    await trio.sleep(10)
    asked = len(flaky.at)
    await trio.sleep(INTERVAL_S / 2)
    assert len(flaky.at) == asked


async def test_any_other_error_is_a_fault(server: Server, flaky: Flaky) -> None:
    flaky.error = RdevError(ErrorCode.INTERNAL_ERROR, "no")
    with pytest.raises(RdevError):
        await keeper_of(server, flaky).run()


async def test_stop_ends_it_at_once(server: Server, flaky: Flaky) -> None:
    keeper = keeper_of(server, flaky)
    began_s = trio.current_time()
    async with trio.open_nursery() as own:
        await own.start(keeper.run)
        await trio.sleep(10)
        keeper.stop()
        keeper.stop()
    assert trio.current_time() == began_s + 10


async def test_a_server_that_gets_no_turn_does_nothing(house: House) -> None:
    command = await house.ended()
    house.age(20 * DAY_S)
    async with (
        house.upkeep.store_turn() as store,
        house.upkeep.place_turn(house.server.place.reach) as places,
    ):
        assert store is not None
        assert places is not None
        await house.keeper.run_once()
        assert house.known() == {command}
    await house.keeper.run_once()
    assert house.known() == set()


async def test_partitions_are_made_ahead(house: House) -> None:
    await house.keeper.run_once()
    days = await house.upkeep.output_days()
    assert [one.age_days for one in days] == [-ahead for ahead in range(DAYS_AHEAD + 1)]


async def test_what_happened_is_told_for_a_week(house: House) -> None:
    await house.ended()
    record = house.server.state.record
    house.age(7 * DAY_S - 60)
    await house.keeper.run_once()
    assert len(record.events) == 3
    house.age(120)
    await house.keeper.run_once()
    assert len(record.events) == 1  # what the feeds know by that they have missed something
    assert house.telemetry.kept["events"] == 2


async def test_output_goes_first_then_the_command_with_its_folder(house: House) -> None:
    command = await house.ended()
    await house.keeper.run_once()
    assert await house.server.log.oldest_seq(command) == 1
    house.age(7 * DAY_S)
    await house.keeper.run_once()
    assert await house.server.log.oldest_seq(command) == 1
    house.age(DAY_S - 60)
    await house.keeper.run_once()
    assert await house.server.log.oldest_seq(command) is None
    assert await house.server.store.get(command) is not None
    assert house.telemetry.kept["output_days"] == 1
    house.age(120)
    await house.keeper.run_once()
    assert await house.server.store.get(command) is None
    assert not house.server.place.has_folder(command)
    assert house.telemetry.kept["commands"] == 1


async def test_what_waits_or_runs_is_never_touched(house: House) -> None:
    running = await submit(house.server, "forever", timeout_s=100 * 86_400)
    house.server.queue.wake()
    await trio.sleep(1)
    house.age(30 * DAY_S)
    await house.keeper.run_once()
    assert house.known() == {running}
    assert await house.server.log.oldest_seq(running) == 1
    assert house.server.place.is_running(running)


async def test_output_over_its_limit_goes_by_its_oldest_days(house: House) -> None:
    commands = []
    for _ in range(4):
        commands.append(await house.ended())
        house.age(DAY_S)
    today = await house.ended()
    one_day_bytes = len(house.server.payload(today))
    small = House(
        server=house.server, retention=replace(KEEP, log_max_bytes=int(2.5 * one_day_bytes))
    )
    await small.keeper.run_once()
    stored = [await house.server.log.oldest_seq(command) for command in [*commands, today]]
    assert stored == [None, None, None, 1, 1]


async def test_a_day_that_is_read_now_is_dropped_later(house: House) -> None:
    command = await house.ended()
    house.age(8 * DAY_S - 60)
    house.upkeep.in_use.add(house.server.state.rows[command].command.created_at.date())
    await house.keeper.run_once()
    assert await house.server.log.oldest_seq(command) == 1
    house.upkeep.in_use.clear()
    await house.keeper.run_once()
    assert await house.server.log.oldest_seq(command) is None


async def test_keys_that_stand_for_nothing_go_in_batches(house: House) -> None:
    keys = house.server.state.keys
    for number in range(2_500):
        keys.keep(Idempotency(key_id="k", key=str(number), digest=b""), "made")
    house.age(IDEMPOTENCY_S)
    keys.keep(Idempotency(key_id="k", key="young", digest=b""), "made")
    house.age(3_601)
    await house.keeper.run_once()
    assert [key for _, key in keys.kept] == ["young"]
    assert house.telemetry.kept["idempotency_keys"] == 2_500


async def test_windows_of_rate_limits_that_are_over_go_in_batches(house: House) -> None:
    house.upkeep.idle_windows = 1_500
    await house.keeper.run_once()
    assert house.upkeep.idle_windows == 0
    assert house.telemetry.kept["rate_windows"] == 1_500


async def test_folders_are_tidied_some_minutes_after_the_end(house: House) -> None:
    command = await house.ended()
    house.age(TIDY_AGE_S / 2)
    await house.keeper.run_once()
    assert house.telemetry.kept["folders"] == 0
    house.age(TIDY_AGE_S)
    await house.keeper.run_once()
    assert house.telemetry.kept["folders"] == 1
    assert house.server.place.has_folder(command)
    await house.keeper.run_once()
    assert house.telemetry.kept["folders"] == 1


async def test_every_folder_is_tidied_once_however_many_there_are(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdev.services.housekeeper.FOLDERS_MAX", 5)
    await make_project(house.server, "other")
    commands = [
        await submit(house.server, "quick", project=(PROJECT, "other")[number % 2])
        for number in range(13)
    ]
    house.server.queue.wake()
    for command in commands:
        await house.server.ended(command)
    house.age(2 * TIDY_AGE_S)
    await house.keeper.run_once()
    assert house.telemetry.kept["folders"] == len(commands)
    await house.keeper.run_once()
    assert house.telemetry.kept["folders"] == len(commands)


async def test_what_still_runs_although_it_ended_is_killed(house: House) -> None:
    command = await submit(house.server, "forever")
    house.server.queue.wake()
    await trio.sleep(1)
    house.server.place.lose(command, LostReason.UNREACHABLE, may_still_run=True)
    assert await house.server.ended(command) is Status.LOST
    assert house.server.place.is_running(command)
    house.age(2 * TIDY_AGE_S)
    await house.keeper.run_once()
    assert not house.server.place.is_running(command)
    assert house.telemetry.kept["orphans"] == 1


async def test_what_a_kill_left_is_killed_again_until_its_project_is_ready(house: House) -> None:
    left = await house.ended()
    row = house.server.state.rows[left]
    row.command = replace(row.command, kill=KillReport(confirmed=False, survivors=(7,)))
    waiting = await submit(house.server, "quick")
    house.server.place.immortal.add(attempt_id(left, 1))
    await house.keeper.run_once()
    assert house.telemetry.kept["survivors"] == 0
    assert house.server.state.is_failed(PROJECT)
    house.server.place.immortal.remove(attempt_id(left, 1))
    await house.keeper.run_once()
    assert house.telemetry.kept["survivors"] == 1
    assert await house.server.ended(waiting) is Status.SUCCEEDED


async def test_a_place_that_cannot_be_reached_holds_up_no_other(house: House) -> None:
    await make_project(house.server, "away")
    here, away = await house.ended(), await house.ended(project="away")
    house.server.place.unreachable.add(ProjectId("away"))
    house.age(2 * TIDY_AGE_S)
    await house.keeper.run_once()
    assert house.telemetry.kept["folders"] == 1
    house.age(8 * DAY_S)
    await house.keeper.run_once()
    assert house.known() == {away}
    assert not house.server.place.has_folder(here)
    house.age(DAY_S)
    await house.keeper.run_once()
    assert house.known() == set()


async def test_commands_of_another_reach_go_without_their_places(house: House) -> None:
    command = await house.ended()
    house.server.state.rows[command].reach = "gone"
    house.age(8.5 * DAY_S)
    await house.keeper.run_once()
    assert house.known() == {command}
    house.age(DAY_S)
    await house.keeper.run_once()
    assert house.known() == set()


async def test_stop_is_heeded_between_batches(house: House) -> None:
    command = await house.ended()
    old = house.server.state.rows[command]
    ended_at = house.server.state.now - timedelta(days=30)
    house.server.state.rows[command] = replace(
        old, command=replace(old.command, finished_at=ended_at)
    )
    house.keeper.stop()
    await house.keeper.run_once()
    assert house.known() == {command}
