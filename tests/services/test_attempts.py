"""One attempt: what it shows and when, and how each end is judged."""

import itertools
import json

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rdev.domain.commands import Claimed, Kind, Outcome, Status
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import KillReport, LostReason, Stream
from rdev.domain.ids import AttemptId, CommandId, ProjectId
from rdev.domain.lines import decode
from rdev.domain.stream import Source
from rdev.services.appender import LeaseLostError
from rdev.services.attempts import Attempt
from tests.fakes.executor import FakeRun, Program
from tests.fakes.store import ACTOR
from tests.services.scripted import Place, Server, submit

RESULT = json.dumps(
    {"type": "result", "is_error": False, "session_id": "s-1", "usage": {"input_tokens": 3}}
)


async def _claimed(server: Server, program: Program, kind: Kind = Kind.SHELL) -> Claimed:
    server.place._programs = {"it": program}
    await submit(server, "it", kind=kind)
    [claimed] = await server.claim()
    return claimed


async def _run(
    server: Server, nursery: trio.Nursery, program: Program, kind: Kind = Kind.SHELL
) -> Outcome:
    nursery.start_soon(server.appender.run)
    claimed = await _claimed(server, program, kind)
    finished = await server.attempt(claimed).run()
    assert finished.claimed == claimed
    return finished.outcome


def _stdout(server: Server, command: CommandId) -> bytes:
    chunks = [one for one in server.state.chunks[command] if one.source is Source.STDOUT]
    return b"".join([decode(chunk.payload, Stream.STDOUT) for chunk in chunks])


def _only(server: Server) -> CommandId:
    [command] = server.state.rows
    return command


# Ends


@pytest.mark.parametrize(
    ("code", "status"), [(0, Status.SUCCEEDED), (3, Status.FAILED), (-9, Status.FAILED)]
)
async def test_an_exit_is_judged_by_its_code(
    server: Server, nursery: trio.Nursery, code: int, status: Status
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b"out\n")
        run.write(b"err\n", Stream.STDERR)
        return code

    outcome = await _run(server, nursery, program)
    assert outcome.status is status
    assert (outcome.exit_code, outcome.signal) == ((code, None) if code >= 0 else (None, -code))
    row = server.state.rows[_only(server)]
    assert row.command.status is status
    assert (row.command.stdout_bytes, row.command.stderr_bytes, row.has_spec) == (4, 4, False)
    assert server.published[-1].is_final


async def test_a_lost_command_ends_as_lost(server: Server, nursery: trio.Nursery) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b"half a li")
        server.place.lose(_only(server), LostReason.SUPERVISOR_GONE)
        await trio.sleep_forever()
        return 0

    outcome = await _run(server, nursery, program)
    assert (outcome.status, outcome.reason) == (Status.LOST, LostReason.SUPERVISOR_GONE)
    assert _stdout(server, _only(server)) == b"half a li"


async def test_a_place_that_was_restarted_before_the_start_never_runs_it(
    server: Server, nursery: trio.Nursery
) -> None:
    server.place.standing_instance = "boot-1"
    nursery.start_soon(server.appender.run)

    async def program(run: FakeRun) -> int:
        return 0

    claimed = await _claimed(server, program)
    server.place.restart()
    finished = await server.attempt(claimed).run()
    assert finished.outcome.status is Status.LOST
    assert server.place.started == []


async def test_the_instance_is_recorded_before_anything_starts(server: Server) -> None:
    async def program(run: FakeRun) -> int:
        seen.append(server.state.rows[_only(server)].instance)
        return 0

    seen: list[str | None] = []
    async with trio.open_nursery() as nursery:
        await _run(server, nursery, program)
        nursery.cancel_scope.cancel()
    assert seen == ["boot-1"]


async def test_a_lease_lost_before_the_start_starts_nothing(server: Server) -> None:
    async def program(run: FakeRun) -> int:
        return 0

    claimed = await _claimed(server, program)
    await server.store.release([claimed.lease])
    await server.claim()
    with pytest.raises(LeaseLostError):
        await server.attempt(claimed).run()
    assert server.place.started == []


# What is shown, and when


async def test_an_unfinished_line_is_shown_after_100_ms_of_silence(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b"name? ")
        await trio.sleep(0.05)
        seen.append(_stdout(server, _only(server)))
        await trio.sleep(0.06)
        seen.append(_stdout(server, _only(server)))
        run.write(b"joe\n")
        return 0

    seen: list[bytes] = []
    await _run(server, nursery, program)
    assert seen == [b"", b"name? "]
    assert _stdout(server, _only(server)) == b"name? joe\n"


async def test_an_unfinished_line_is_shown_though_the_other_stream_talks(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b"name? ")
        for _ in range(10):
            await trio.sleep(0.05)
            run.write(b"noise\n", Stream.STDERR)
        seen.append(_stdout(server, _only(server)))
        return 0

    seen: list[bytes] = []
    await _run(server, nursery, program)
    assert seen == [b"name? "]


async def test_much_output_is_stored_in_chunks_of_64_kib(
    server: Server, nursery: trio.Nursery
) -> None:
    data = b"".join([b"%d\n" % number for number in range(200_000)])

    async def program(run: FakeRun) -> int:
        run.write(data)
        return 0

    await _run(server, nursery, program)
    command = _only(server)
    assert _stdout(server, command) == data
    sizes = [len(chunk.payload) for chunk in server.state.chunks[command]]
    assert max(sizes) <= 65_536
    assert server.published == server.state.chunks[command][2:]


# Cancels


async def test_a_cancel_kills_and_ends_as_cancelled(server: Server, nursery: trio.Nursery) -> None:
    async def program(run: FakeRun) -> int:
        attempt[0].cancel()
        await trio.sleep_forever()
        return 0

    nursery.start_soon(server.appender.run)
    attempt: list[Attempt] = []
    attempt.append(server.attempt(await _claimed(server, program)))
    finished = await attempt[0].run()
    assert (finished.outcome.status, finished.outcome.reason) == ("cancelled", "cancelled")
    assert finished.outcome.kill == KillReport(confirmed=True)


async def test_a_command_claimed_with_a_cancel_is_killed(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        await trio.sleep_forever()
        return 0

    nursery.start_soon(server.appender.run)
    claimed = await _claimed(server, program)
    await server.store.request_cancel(claimed.lease.command, ACTOR)
    await server.store.release([claimed.lease])
    [taken] = await server.claim()
    finished = await server.attempt(taken).run()
    assert finished.outcome.status is Status.CANCELLED


class SlowKill(Place):
    """The command ends at TERM; looking for survivors takes a while. The first try fails."""

    def __init__(self, inner: Place) -> None:
        super().__init__(inner._nursery, inner._programs)
        self._projects = inner._projects
        self.kills = 0
        self.completed = 0

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        self.kills += 1
        if self.kills == 1:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the place is out of reach")
        await super().kill(project, attempt, grace_s=grace_s)
        run = self._runs[attempt]
        assert run is not None
        await trio.sleep(grace_s)
        self.completed += 1
        return KillReport(confirmed=False, survivors=(77,))


async def test_the_end_waits_until_the_kill_has_looked_again(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        attempts[0].cancel()
        await trio.sleep_forever()
        return 0

    nursery.start_soon(server.appender.run)
    server.place = place = SlowKill(server.place)
    attempts: list[Attempt] = []
    attempts.append(server.attempt(await _claimed(server, program)))
    await attempts[0].run()
    assert (place.kills, place.completed) == (2, 1)


class DeafPlace(Place):
    """No kill ever comes through."""

    async def kill(self, project: ProjectId, attempt: AttemptId, *, grace_s: int) -> KillReport:
        await trio.lowlevel.checkpoint()
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the place is out of reach")


async def test_an_end_that_was_read_does_not_wait_for_ever_for_a_kill(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        attempts[0].cancel()
        await trio.sleep(1)
        return 0

    nursery.start_soon(server.appender.run)
    inner = server.place
    server.place = DeafPlace(inner._nursery, {})
    server.place._projects = inner._projects
    attempts: list[Attempt] = []
    attempts.append(server.attempt(await _claimed(server, program)))
    began = trio.current_time()
    finished = await attempts[0].run()
    assert finished.outcome.status is Status.SUCCEEDED
    assert trio.current_time() - began < 15


# Agents


async def test_an_agents_report_is_part_of_its_outcome(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(RESULT.encode() + b"\n")
        return 0

    outcome = await _run(server, nursery, program, Kind.CLAUDE)
    assert outcome.status is Status.SUCCEEDED
    assert outcome.agent is not None
    assert outcome.agent.session_id == "s-1"
    assert outcome.agent.usage == {"usage": {"input_tokens": 3}}
    assert b"\na{" in server.payload(_only(server))


async def test_an_agent_that_says_is_error_has_failed(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b'{"type":"result","is_error":true}')
        return 0

    outcome = await _run(server, nursery, program, Kind.CLAUDE)
    assert (outcome.status, outcome.reason) == (Status.FAILED, "agent_error")


async def test_an_agent_that_hangs_after_its_result_is_ended_after_30_s(
    server: Server, nursery: trio.Nursery
) -> None:
    """Though it talks on: the half minute counts from the result."""

    async def program(run: FakeRun) -> int:
        await trio.sleep(100)
        run.write(RESULT.encode() + b"\n")
        began.append(trio.current_time())
        while True:
            await trio.sleep(7)
            run.write(b"still here\n", Stream.STDERR)

    began: list[float] = []
    outcome = await _run(server, nursery, program, Kind.CLAUDE)
    assert 30 <= trio.current_time() - began[0] < 32
    assert (outcome.status, outcome.reason) == (Status.FAILED, "hung_after_result")
    assert outcome.kill is not None
    assert outcome.agent is not None
    assert outcome.agent.session_id == "s-1"


async def test_an_agent_that_exits_soon_after_its_result_is_left_alone(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(RESULT.encode() + b"\n")
        await trio.sleep(29)
        return 0

    assert (await _run(server, nursery, program, Kind.CLAUDE)).status is Status.SUCCEEDED


async def test_a_shell_that_prints_a_result_is_no_agent(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(RESULT.encode() + b"\n")
        await trio.sleep(1_000)
        return 0

    outcome = await _run(server, nursery, program)
    assert (outcome.status, outcome.agent) == (Status.SUCCEEDED, None)


# Take-overs


async def test_a_take_over_continues_where_the_log_stands(
    server: Server, nursery: trio.Nursery
) -> None:
    """Interrupted again and again, the log holds every byte once, and it started once."""

    async def program(run: FakeRun) -> int:
        for number in range(200):
            run.write(b"line %d\n" % number)
            run.write(b"part %d" % number, Stream.STDERR)
            await trio.sleep(0.07)
        return 0

    nursery.start_soon(server.appender.run)
    claimed = await _claimed(server, program)
    finished = None
    interruptions = -1
    while finished is None:
        interruptions += 1
        with trio.move_on_after(0.313):
            finished = await server.attempt(claimed).run()
        if finished is None:
            await server.store.release([claimed.lease])
            [claimed] = await server.claim()
            assert claimed.take_over
    command = claimed.lease.command
    assert interruptions > 20
    assert server.place.started == [command]
    expected = b"".join([b"line %d\n" % number for number in range(200)])
    assert _stdout(server, command) == expected
    errors = [one for one in server.state.chunks[command] if one.source is Source.STDERR]
    shown = b"".join([decode(chunk.payload, Stream.STDERR) for chunk in errors])
    assert shown == b"".join([b"part %d" % number for number in range(200)])
    numbers = [(one.first_seq, one.last_seq) for one in server.state.chunks[command]]
    assert all(left[1] + 1 == right[0] for left, right in itertools.pairwise(numbers))


async def test_a_take_over_knows_what_the_agent_said_before(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        run.write(b'{"type":"system","session_id":"s-1"}\n')
        run.write(RESULT.encode() + b"\n")
        await trio.sleep_forever()
        return 0

    nursery.start_soon(server.appender.run)
    claimed = await _claimed(server, program, Kind.CLAUDE)
    with trio.move_on_after(1):
        await server.attempt(claimed).run()
    await server.store.release([claimed.lease])
    [taken] = await server.claim()
    began = trio.current_time()
    finished = await server.attempt(taken).run()
    assert finished.outcome.reason == "hung_after_result"
    assert 29 < trio.current_time() - began < 32
    assert finished.outcome.agent is not None
    assert finished.outcome.agent.session_id == "s-1"
    assert server.payload(claimed.lease.command).count(b'a{"type": "result"') == 1


async def test_a_writer_whose_lease_is_lost_ends_the_attempt_and_not_the_command(
    server: Server, nursery: trio.Nursery
) -> None:
    async def program(run: FakeRun) -> int:
        while True:
            run.write(b"x\n")
            await trio.sleep(1)

    nursery.start_soon(server.appender.run)
    claimed = await _claimed(server, program)

    async def take_over() -> None:
        await trio.sleep(5)
        await server.store.release([claimed.lease])
        await server.claim()

    nursery.start_soon(take_over)
    attempt = server.attempt(claimed)
    with pytest.raises(ExceptionGroup) as caught:
        await attempt.run()
    assert caught.group_contains(LeaseLostError)
    # As a server that is told to end its commands does, before it forgets this one.
    attempt.cancel()
    await wait_all_tasks_blocked()
    run = server.place._runs[claimed.lease.command]
    assert run is not None
    assert run.end is None
