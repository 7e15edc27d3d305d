"""`retry: safe`: what runs again, what does not, and what a client sees of it."""

import json
from collections.abc import Callable

import pytest
import trio

from rdev.domain.commands import Claimed, Command, Kind, Retry, Status
from rdev.domain.execution import Lost, LostReason, Stream
from rdev.domain.ids import AttemptId, CommandId, attempt_ids
from rdev.domain.lines import decode
from rdev.domain.stream import Source
from tests.fakes.executor import FakeRun, Program
from tests.fakes.store import ACTOR
from tests.services.scripted import PROJECT, Server, submit

SAFE = Retry.SAFE


def _statuses(server: Server, command: CommandId) -> list[tuple[str, int, str | None]]:
    """The status events of a command's stream: status, attempt, reason."""
    lines = [line for line in server.payload(command).split(b"\n") if line.startswith(b"s{")]
    events = [json.loads(line[1:]) for line in lines]
    return [(event["status"], event["attempt"], event.get("reason")) for event in events]


def _stdout(server: Server, command: CommandId, *, after: int = 0) -> list[str]:
    """The lines of stdout behind a number, as a reader sees them."""
    chunks = [one for one in server.state.chunks[command] if one.source is Source.STDOUT]
    payload = b"\n".join([one.payload for one in chunks if one.first_seq > after])
    lines = [line for line in payload.split(b"\n") if line.startswith(b"{")]
    return [json.loads(line)["line"] for line in lines]


class Flaky:
    """A program that stays in its first attempts and says its number in each."""

    def __init__(self, server: Server, *, fails: int) -> None:
        self.attempts = 0
        self.alive = 0
        self._server = server
        self._fails = fails

    async def __call__(self, run: FakeRun) -> int:
        self.attempts += 1
        self.alive += 1
        assert self.alive == 1
        try:
            run.write(b"attempt %d\n" % self.attempts)
            if self.attempts <= self._fails:
                run.write(b"half a li")
                await trio.sleep_forever()
            await trio.sleep(0)
            return 0
        finally:
            self.alive -= 1


async def _start(
    server: Server,
    nursery: trio.Nursery,
    program: Program,
    *,
    retry: Retry = SAFE,
    kind: Kind = Kind.SHELL,
    timeout_s: int = 60,
) -> CommandId:
    server.place._programs = {"it": program}
    await nursery.start(server.queue.run)
    return await _submit(server, retry=retry, kind=kind, timeout_s=timeout_s)


async def _submit(server: Server, **options: object) -> CommandId:
    command = await submit(server, "it", **options)  # type: ignore[arg-type]
    row = server.state.rows[command]
    server.queue.wake(row.lane)
    return command


def _ended(server: Server, command: CommandId) -> Command:
    return server.state.rows[command].command


@pytest.mark.parametrize("standing", [True, False])
async def test_a_command_that_went_with_its_place_runs_again(
    server: Server, nursery: trio.Nursery, standing: bool
) -> None:
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    server.place.restart()
    assert await server.ended(command) is Status.SUCCEEDED
    assert (flaky.attempts, server.place.started) == (2, attempt_ids(command)[:2])
    assert _statuses(server, command) == [
        ("queued", 0, None),
        ("running", 1, None),
        ("queued", 1, "supervisor_gone"),
        ("running", 2, None),
        ("succeeded", 2, None),
    ]
    # No line is made of the pieces of two attempts; what is said of output is the last one's.
    assert _stdout(server, command) == ["attempt 1", "half a li", "attempt 2"]
    ended = _ended(server, command)
    assert (ended.attempt, ended.stdout_bytes, ended.reason) == (2, len("attempt 2\n"), None)
    assert _stdout(server, command, after=ended.attempt_seq) == ["attempt 2"]
    numbers = [(one.first_seq, one.last_seq) for one in server.published]
    assert numbers == sorted(numbers)
    assert [one.is_final for one in server.published].count(True) == 1


async def test_a_place_that_restarts_under_a_standing_instance_runs_it_again(
    server: Server, nursery: trio.Nursery
) -> None:
    server.place.standing_instance = "boot-1"
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    server.place.standing_instance = "boot-2"
    server.place.restart()
    assert await server.ended(command) is Status.SUCCEEDED
    assert flaky.attempts == 2


async def test_with_never_it_is_lost(server: Server, nursery: trio.Nursery) -> None:
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky, retry=Retry.NEVER)
    await trio.sleep(3)
    server.place.restart()
    assert await server.ended(command) is Status.LOST
    await trio.sleep(10)
    assert (flaky.attempts, _ended(server, command).reason) == (1, LostReason.SUPERVISOR_GONE)


async def test_after_three_attempts_it_is_lost_with_its_reason(
    server: Server, nursery: trio.Nursery
) -> None:
    flaky = Flaky(server, fails=9)
    command = await _start(server, nursery, flaky)
    for _ in range(3):
        await trio.sleep(3)
        server.place.restart()
    assert await server.ended(command) is Status.LOST
    await trio.sleep(10)
    assert (flaky.attempts, server.place.started) == (3, attempt_ids(command))
    ended = _ended(server, command)
    assert (ended.attempt, ended.reason) == (3, LostReason.SUPERVISOR_GONE)
    assert _statuses(server, command)[-1] == ("lost", 3, "supervisor_gone")


async def test_what_was_never_started_runs_again(server: Server, nursery: trio.Nursery) -> None:
    """Its start was forbidden, as by an attach that came with nothing to start."""
    flaky = Flaky(server, fails=0)
    server.place._programs = {"it": flaky}
    command = await _submit(server, retry=SAFE)
    server.place._runs[attempt_ids(command)[0]] = None
    await nursery.start(server.queue.run)
    assert await server.ended(command) is Status.SUCCEEDED
    assert flaky.attempts == 1
    assert _statuses(server, command)[2] == ("queued", 1, "not_started")


@pytest.mark.parametrize(
    ("reason", "may_still_run"),
    [
        (LostReason.UNREACHABLE, True),
        (LostReason.SUPERVISOR_GONE, False),
        (LostReason.OOM_KILLED, False),
    ],
)
async def test_what_is_not_proven_to_be_gone_is_lost(
    server: Server, nursery: trio.Nursery, reason: LostReason, may_still_run: bool
) -> None:
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    server.place.lose(AttemptId(command), reason, may_still_run=may_still_run)
    assert await server.ended(command) is Status.LOST
    await trio.sleep(10)
    assert flaky.attempts == 1
    ended = _ended(server, command)
    assert (ended.reason, ended.may_still_run) == (reason, may_still_run)
    complete = json.loads(server.payload(command).rpartition(b"\nc")[2])
    assert complete.get("may_still_run", False) is may_still_run


async def test_what_ended_by_itself_never_runs_again(server: Server, nursery: trio.Nursery) -> None:
    async def fail(run: FakeRun) -> int:
        return 3

    command = await _start(server, nursery, fail)
    assert await server.ended(command) is Status.FAILED
    assert server.place.started == [command]


async def test_after_a_cancel_nothing_runs_again(server: Server, nursery: trio.Nursery) -> None:
    """The place restarts between the request and its kill."""
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    await server.store.request_cancel(command, ACTOR)
    server.place.restart()
    assert await server.ended(command) is Status.LOST
    await trio.sleep(10)
    assert flaky.attempts == 1
    assert _stdout(server, command) == ["attempt 1", "half a li"]


async def test_a_start_that_was_forbidden_under_a_cancel_is_cancelled(
    server: Server, nursery: trio.Nursery
) -> None:
    """The attempt does not know of the cancel when it wants to queue its command again."""
    flaky = Flaky(server, fails=0)
    server.place._programs = {"it": flaky}
    command = await _submit(server, retry=SAFE)
    nursery.start_soon(server.appender.run)
    await server.lanes.repair(reach=server.place.reach)
    [claimed] = await server.claim()
    server.place._runs[AttemptId(command)] = None
    await server.store.request_cancel(command, ACTOR)
    assert not claimed.cancel_requested
    finished = await server.attempt(claimed).run()
    assert finished.outcome.status is Status.CANCELLED
    assert _statuses(server, command)[-1] == ("cancelled", 1, "cancelled")


async def test_after_its_timeout_nothing_runs_again(server: Server, nursery: trio.Nursery) -> None:
    """Seen after a take-over: the store's clock counts from the claim."""
    flaky = Flaky(server, fails=1)
    server.place._programs = {"it": flaky}
    command = await _submit(server, retry=SAFE, timeout_s=60)
    await server.lanes.repair(reach=server.place.reach)
    [claimed] = await server.claim()
    with trio.move_on_after(1):
        await server.attempt(claimed).run()
    server.place.restart()
    await trio.sleep(59)
    await nursery.start(server.queue.run)
    assert await server.ended(command) is Status.LOST
    assert flaky.attempts == 1


async def test_just_before_its_timeout_it_runs_again(server: Server, nursery: trio.Nursery) -> None:
    flaky = Flaky(server, fails=1)
    server.place._programs = {"it": flaky}
    command = await _submit(server, retry=SAFE, timeout_s=60)
    await server.lanes.repair(reach=server.place.reach)
    [claimed] = await server.claim()
    with trio.move_on_after(1):
        await server.attempt(claimed).run()
    server.place.restart()
    await trio.sleep(50)
    await nursery.start(server.queue.run)
    assert await server.ended(command) is Status.SUCCEEDED
    assert flaky.attempts == 2


async def test_an_agent_that_said_its_result_has_finished(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b'{"type":"result","is_error":false}\n')
        await trio.sleep_forever()
        return 0

    command = await _start(server, nursery, program, kind=Kind.CLAUDE)
    await trio.sleep(3)
    server.place.restart()
    assert await server.ended(command) is Status.LOST
    assert server.place.started == [command]


def _agent(sessions: list[str]) -> Callable[[FakeRun], object]:
    """An agent whose attempts have sessions of their own; the first never ends."""
    left = list(sessions)

    async def program(run: FakeRun) -> int:
        session = left.pop(0)
        run.write(b'{"type":"system","session_id":"%s"}\n{"half' % session.encode())
        await trio.sleep(5 if not left else 1_000_000)
        return 0

    return program


async def test_a_take_over_replays_the_present_attempt_only(
    server: Server, nursery: trio.Nursery
) -> None:
    server.place._programs = {"it": _agent(["s-1", "s-2"])}  # type: ignore[dict-item]
    nursery.start_soon(server.appender.run)
    await _submit(server, retry=SAFE, kind=Kind.CLAUDE)
    await server.lanes.repair(reach=server.place.reach)
    [first] = await server.claim()

    async def restart() -> None:
        await trio.sleep(1)
        server.place.restart()

    nursery.start_soon(restart)
    assert (await server.attempt(first).run()).outcome.status is Status.QUEUED
    [second] = await server.claim()
    with trio.move_on_after(1):
        await server.attempt(second).run()
    await server.store.release([second.lease])
    [taken] = await server.claim()
    assert (taken.take_over, taken.attempt) == (True, 2)
    replayed = _sessions_of_replay(server, taken)
    finished = await server.attempt(taken).run()
    assert replayed == ["s-2"]
    assert finished.outcome.agent is not None
    assert finished.outcome.agent.session_id == "s-2"


def _sessions_of_replay(server: Server, claimed: Claimed) -> list[str]:
    chunks = server.state.chunks[claimed.lease.command]
    own = [one for one in chunks if one.first_seq > claimed.attempt_seq]
    raw = [decode(one.payload, Stream.STDOUT) for one in own if one.source is Source.STDOUT]
    return [json.loads(line)["session_id"] for line in b"".join(raw).split(b"\n")[:-1]]


async def test_a_command_whose_journal_was_cut_is_ended_since_nobody_can_follow_it(
    server: Server, nursery: trio.Nursery
) -> None:
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    attempt = AttemptId(command)
    run = server.place._runs[attempt]
    assert run is not None
    run.end = Lost(reason=LostReason.JOURNAL_TRUNCATED)
    run.ring()
    assert await server.ended(command) is Status.LOST
    assert not server.place.is_running(attempt)
    ended = _ended(server, command)
    assert ended.reason == LostReason.JOURNAL_TRUNCATED
    assert ended.kill is not None
    assert ended.kill.confirmed
    assert flaky.attempts == 1


async def test_a_lost_reply_neither_loses_nor_doubles_the_next_attempt(
    server: Server, nursery: trio.Nursery
) -> None:
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    server.state.lost_replies = 1
    server.place.restart()
    assert await server.ended(command) is Status.SUCCEEDED
    assert server.place.started == attempt_ids(command)[:2]


async def test_what_waits_for_its_next_attempt_is_no_end(
    server: Server, nursery: trio.Nursery
) -> None:
    """Nobody who waits for the command's end is told of one."""
    flaky = Flaky(server, fails=1)
    command = await _start(server, nursery, flaky)
    await trio.sleep(3)
    with server.fanout.end_of(command) as hint:
        server.place.restart()
        while flaky.attempts < 2:
            assert not hint.is_set()
            await trio.sleep(0.001)
    assert server.queue.statistics().finished <= 1
    assert _ended(server, command).project == PROJECT
