"""The transport of pods: what an exec's socket may do, and that no command minds."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from rdev.adapters.execution.attach import Patience
from rdev.adapters.execution.kubernetes import KubernetesTransport, explain
from rdev.adapters.execution.transport import Streams, TransportError
from rdev.adapters.kubernetes.websocket import Silence
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.execution import Lost, LostReason, Offsets, UnfitProjectError
from tests.adapters.execution.observing import (
    DEADLINE_S,
    PROJECT,
    QUICK,
    START,
    new_command,
    observe,
    processes_in,
    read_to_end,
    read_until,
    sh,
    until,
)
from tests.adapters.execution.pods import POD, Cluster, cluster
from tests.fakes.api_server import Fault
from tests.fakes.pod_exec import V4, V5, StatusFault

# Half of it is one character of three bytes; it compresses to nothing a cut could hide.
LINES = "".join(f"{number} €€€€€€€€\n" for number in range(8_000)).encode()


@pytest.fixture
def projects(tmp_path: Path) -> Path:
    return tmp_path / "projects"


@pytest.fixture(params=[V5, V4])
async def pods(request: pytest.FixtureRequest, projects: Path) -> AsyncIterator[Cluster]:
    async with cluster(projects, patience=QUICK, supported=(request.param,)) as made:
        await made.executor.prepare(PROJECT)
        yield made
        await until(lambda: not processes_in(projects), "all processes are gone")


async def read_all(streams: Streams) -> bytes:
    read = bytearray()
    with trio.fail_after(DEADLINE_S):
        while data := await streams.stdout.receive_some(65_536):
            read += data
    return bytes(read)


async def test_v5_is_preferred_and_v4_is_enough(pods: Cluster) -> None:
    async with pods.transport.run(PROJECT, ["sh", "-c", "printf hello"]) as streams:
        assert await read_all(streams) == b"hello"


async def test_an_exec_takes_and_gives_at_the_same_time(pods: Cluster) -> None:
    """More than all buffers hold goes through `cat`: neither side may wait for the other."""
    data = LINES * 60
    async with pods.transport.run(PROJECT, ["cat"]) as streams:
        read = bytearray()

        async def send() -> None:
            await streams.stdin.send_all(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with trio.fail_after(DEADLINE_S):
                while len(read) < len(data):
                    read += await streams.stdout.receive_some(65_536)
    assert bytes(read) == data


async def test_stdin_ends_alone_with_v5(projects: Path) -> None:
    async with cluster(projects) as made:
        async with made.transport.run(PROJECT, ["cat"]) as streams:
            await streams.stdin.send_all(b"all of it")
            await streams.stdin.aclose()
            assert await read_all(streams) == b"all of it"
            with pytest.raises(trio.ClosedResourceError):
                await streams.stdin.send_all(b"more")
        assert made.api.execs.stdin_ends == 1


async def test_leaving_ends_the_stdin_of_what_ran(pods: Cluster, projects: Path) -> None:
    mark = projects / "left"
    script = f"printf x; cat >/dev/null; touch {mark}"
    async with pods.transport.run(PROJECT, ["sh", "-c", script]) as streams:
        assert await streams.stdout.receive_some(1) == b"x"
    await until(mark.exists, "the end of stdin")


@pytest.mark.slow
async def test_a_reader_that_pauses_stops_the_sender(pods: Cluster) -> None:
    async with pods.transport.run(PROJECT, ["sh", "-c", "head -c 40000000 /dev/zero"]) as streams:
        await streams.stdout.receive_some(1)
        before = -1
        with trio.fail_after(DEADLINE_S):
            while pods.api.execs.sent_bytes != before:  # it comes to rest
                before = pods.api.execs.sent_bytes
                await trio.sleep(0.3)
        # What sockets and the proxy hold; ours is one read.
        assert before < 30_000_000
        assert 1 + len(await read_all(streams)) == 40_000_000


async def test_an_exit_code_is_just_an_end(pods: Cluster) -> None:
    async with pods.transport.run(PROJECT, ["sh", "-c", "printf x; exit 3"]) as streams:
        assert await read_all(streams) == b"x"
        assert await streams.stdout.receive_some(10) == b""


async def test_an_image_without_a_shell_says_so(pods: Cluster) -> None:
    async with pods.transport.run(PROJECT, ["no-such-shell", "-c", "true"]) as streams:
        with pytest.raises(trio.BrokenResourceError, match="no-such-shell"):
            await read_all(streams)


async def test_an_image_without_a_tool_is_named_once(projects: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    async with cluster(projects, str(tmp_path / "empty")) as made:
        with pytest.raises(RdevError, match="No such file") as caught:
            await made.executor.prepare(PROJECT)
        assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
        assert len(made.api.execs.seen) == 1


async def test_a_pod_that_nobody_prepared_is_prepared_once(projects: Path) -> None:
    async with cluster(projects) as made:
        instance = await made.executor.instance(PROJECT)
        asked = len(made.api.execs.seen)
        made.executor.forget(PROJECT)
        assert await made.executor.instance(PROJECT) == instance
        assert len(made.api.execs.seen) == asked + 1
        assert (projects / PROJECT).is_dir()


async def test_a_pod_is_not_asked_again_at_once_what_it_is(projects: Path) -> None:
    async with cluster(projects) as made:
        instance = await made.executor.instance(PROJECT)
        asked = len(made.api.execs.seen)
        assert await made.executor.instance(PROJECT) == instance
        assert len(made.api.execs.seen) == asked


async def test_a_pod_that_changed_while_it_was_asked_is_asked_again(projects: Path) -> None:
    async with cluster(projects) as made:
        await made.executor.prepare(PROJECT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.executor.instance, PROJECT)
            await trio.testing.wait_all_tasks_blocked()  # for the process that answers
            made.executor.forget(PROJECT)
        asked = len(made.api.execs.seen)
        await made.executor.instance(PROJECT)
        assert len(made.api.execs.seen) > asked


async def test_what_a_pod_is_is_asked_for_again_after_some_seconds(
    projects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdev.adapters.execution.kubernetes.FRESH_S", 0.0)
    async with cluster(projects) as made:
        await made.executor.instance(PROJECT)
        asked = len(made.api.execs.seen)
        await made.executor.instance(PROJECT)
        assert len(made.api.execs.seen) == asked + 1


@pytest.mark.parametrize("has_shell", [True, False])
async def test_nothing_runs_where_the_shell_or_its_tools_are_missing(
    projects: Path, tmp_path: Path, has_shell: bool
) -> None:
    (tmp_path / "empty").mkdir()
    if has_shell:
        (tmp_path / "empty" / "sh").symlink_to("/bin/sh")
    async with cluster(projects, str(tmp_path / "empty")) as made:
        with pytest.raises(UnfitProjectError) as caught:
            await made.executor.instance(PROJECT)
    assert ("shell" if has_shell else 'exec: "sh"') in caught.value.lacks


@pytest.mark.parametrize("fault", [StatusFault.ABSENT, StatusFault.NOISE])
async def test_an_end_without_a_status_is_no_end(pods: Cluster, fault: StatusFault) -> None:
    pods.api.execs.status_fault = fault
    async with pods.transport.run(PROJECT, ["sh", "-c", "printf x"]) as streams:
        with pytest.raises(trio.BrokenResourceError, match="status"):
            await read_all(streams)


async def test_output_behind_the_status_is_read(pods: Cluster) -> None:
    pods.api.execs.status_fault = StatusFault.FIRST
    async with pods.transport.run(PROJECT, ["sh", "-c", "sleep 0.1; printf late"]) as streams:
        assert await read_all(streams) == b"late"


async def test_a_false_success_ends_no_command(pods: Cluster) -> None:
    """The exec is over with status 0 and without output; the command runs on."""
    command, instance = new_command(), await pods.executor.instance(PROJECT)
    pods.api.execs.status_fault = StatusFault.FALSE_SUCCESS
    async with pods.executor.attach(
        PROJECT, command, spec=sh("echo done; exit 4"), instance=instance, offsets=START
    ) as attachment:
        before = len(pods.api.execs.seen)
        await until(lambda: len(pods.api.execs.seen) > before + 2, "it attaches again")
        pods.api.execs.status_fault = StatusFault.NONE
        seen = await read_to_end(attachment)
    assert (seen.out, seen.exit.exit_code) == (b"done\n", 4)


async def test_messages_of_seven_bytes_split_characters_and_harm_nothing(pods: Cluster) -> None:
    pods.api.execs.message_bytes = 7
    text = LINES[:20_000]
    seen = await observe(pods.executor, new_command(), sh("cat", stdin=text))
    assert seen.out == text


@pytest.mark.slow
async def test_cuts_in_mid_frame_lose_and_double_nothing(pods: Cluster) -> None:
    """Each connection is dropped after a different number of bytes, mostly within a frame."""
    text, command = LINES * 4, new_command()
    instance = await pods.executor.instance(PROJECT)
    pods.proxy.cut_after_bytes = 9_001
    async with (
        pods.executor.attach(
            PROJECT,
            command,
            spec=sh("cat; exit 7", stdin=text),
            instance=instance,
            offsets=START,
        ) as attachment,
        trio.open_nursery() as nursery,
    ):

        async def vary() -> None:
            while True:
                cuts = pods.proxy.cuts
                pods.proxy.cut_after_bytes = 3_000 + cuts * 997 % 30_000
                await trio.sleep(0.02)

        nursery.start_soon(vary)
        seen = await read_to_end(attachment)
        nursery.cancel_scope.cancel()
    assert seen.out == text
    assert seen.exit.exit_code == 7
    assert pods.proxy.cuts > 10


@pytest.mark.parametrize("status", [401, 403, 404, 409, 410, 429, 500, 503])
async def test_a_refused_exec_says_why_and_is_asked_for_again(pods: Cluster, status: int) -> None:
    fault = Fault(status, method="EXEC", path_end="/exec", times=1, message="not now")
    pods.api.faults.append(fault)
    with pytest.raises(TransportError, match=f"{status}: not now"):
        async with pods.transport.run(PROJECT, ["true"]):
            pass
    instance = await pods.executor.instance(PROJECT)
    fault.times = 2
    seen = await observe(pods.executor, new_command(), sh("echo done"), instance=instance)
    assert (seen.out, fault.times) == (b"done\n", 0)


async def test_an_api_server_that_says_when_is_not_asked_before(pods: Cluster) -> None:
    instance = await pods.executor.instance(PROJECT)
    wait = Fault(429, method="EXEC", path_end="/exec", retry_after_s=1)
    pods.api.faults.append(wait)
    asked: list[float] = []
    async with trio.open_nursery() as nursery:

        async def note() -> None:
            known = sum(path.endswith("/exec") for _, path in pods.api.requests)
            while len(asked) < 2:
                now = sum(path.endswith("/exec") for _, path in pods.api.requests)
                asked.extend([trio.current_time()] * (now - known))
                known = now
                await trio.sleep(0.005)

        nursery.start_soon(note)
        seen = await observe(pods.executor, new_command(), sh("echo done"), instance=instance)
    assert (seen.out, wait.times) == (b"done\n", 0)
    assert asked[1] - asked[0] > 0.9


async def test_a_proxys_page_instead_of_an_exec_is_an_error(pods: Cluster) -> None:
    page = Fault(502, method="EXEC", path_end="/exec", body="<html>Bad Gateway</html>")
    pods.api.faults.append(page)
    with pytest.raises(TransportError, match="502"):
        async with pods.transport.run(PROJECT, ["true"]):
            pass


async def test_while_no_pod_can_be_reached_none_is_given_up(projects: Path) -> None:
    quick = Patience(heartbeat_s=0.1, silence_s=5, unreachable_s=0.3)
    gate = projects / "gate"
    async with cluster(projects, patience=quick) as made, trio.open_nursery() as nursery:
        await made.executor.prepare(PROJECT)
        command, instance = new_command(), await made.executor.instance(PROJECT)
        async with made.executor.attach(
            PROJECT,
            command,
            spec=sh(f"echo ready; until [ -e {gate} ]; do sleep 0.05; done"),
            instance=instance,
            offsets=START,
        ) as attachment:
            await read_until(attachment, b"ready\n")
            made.is_away, made.proxy.is_refusing = True, True
            made.proxy.cut_all()
            seen: list[object] = []

            async def read() -> None:
                seen.append(await read_to_end(attachment, Offsets(stdout=6)))

            nursery.start_soon(read)
            failed = made.executor.statistics().failed
            ends = trio.current_time() + 4 * quick.unreachable_s
            await until(lambda: trio.current_time() > ends, "time passes")
            assert made.executor.statistics().failed > failed
            assert seen == []
            gate.touch()
            made.is_away = made.proxy.is_refusing = False
            await until(lambda: bool(seen), "its end is read")
        assert seen[0].exit.exit_code == 0  # type: ignore[attr-defined]
        assert made.executor.statistics().reconnects > 1


async def test_a_cluster_that_is_away_for_too_long_is_given_up(projects: Path) -> None:
    quick = Patience(heartbeat_s=0.1, silence_s=5, unreachable_s=60, away_s=0.3)
    async with cluster(projects, patience=quick) as made:
        await made.executor.prepare(PROJECT)
        instance = await made.executor.instance(PROJECT)
        made.is_away, made.proxy.is_refusing = True, True
        seen = await observe(made.executor, new_command(), sh("true"), instance=instance)
        assert seen.end == Lost(reason=LostReason.UNREACHABLE, may_still_run=True)
        assert isinstance(seen.end, Lost)
        assert seen.end.tries == 0  # no fault of the project's


async def test_execs_are_counted(projects: Path) -> None:
    async with cluster(projects) as made:
        async with made.transport.run(PROJECT, ["cat"]):
            assert made.executor.statistics().open == 1
        made.api.drop("pods", POD)
        with pytest.raises(TransportError):
            async with made.transport.run(PROJECT, ["cat"]):
                pass
        found = made.executor.statistics()
        assert (found.open, found.opened, found.failed, found.full) == (0, 1, 1, 0)


async def test_a_pod_that_is_gone_is_out_of_reach(projects: Path) -> None:
    quick = Patience(heartbeat_s=0.1, silence_s=5, unreachable_s=0.3)
    async with cluster(projects, patience=quick) as made:
        await made.executor.prepare(PROJECT)
        instance = await made.executor.instance(PROJECT)
        made.api.drop("pods", POD)
        seen = await observe(made.executor, new_command(), sh("true"), instance=instance)
        assert seen.end == Lost(reason=LostReason.UNREACHABLE, may_still_run=True)
        made.reason = LostReason.EVICTED
        seen = await observe(made.executor, new_command(), sh("true"), instance=instance)
        assert seen.end == Lost(reason=LostReason.EVICTED)


@pytest.mark.parametrize(
    ("lost", "reason", "explained"),
    [
        (Lost(reason=LostReason.POD_GONE), LostReason.OOM_KILLED, LostReason.OOM_KILLED),
        (Lost(reason=LostReason.POD_GONE), None, LostReason.POD_GONE),
        (
            Lost(reason=LostReason.SUPERVISOR_GONE),
            LostReason.OOM_KILLED,
            LostReason.SUPERVISOR_GONE,
        ),
        (
            Lost(reason=LostReason.SUPERVISOR_GONE, unfinished=True),
            LostReason.OOM_KILLED,
            LostReason.OOM_KILLED,
        ),
        (Lost(reason=LostReason.NOT_STARTED), LostReason.EVICTED, LostReason.NOT_STARTED),
        (
            Lost(reason=LostReason.JOURNAL_TRUNCATED),
            LostReason.POD_GONE,
            LostReason.JOURNAL_TRUNCATED,
        ),
    ],
)
def test_the_clusters_reason_replaces_only_what_is_about_the_pod(
    lost: Lost, reason: LostReason | None, explained: LostReason
) -> None:
    assert explain(lost, lambda are_gone: reason) == Lost(
        reason=explained, unfinished=lost.unfinished
    )


def test_who_is_out_of_reach_is_not_taken_for_gone() -> None:
    lost = Lost(reason=LostReason.UNREACHABLE, may_still_run=True)
    assert explain(lost, lambda are_gone: LostReason.OOM_KILLED if are_gone else None) == lost


async def test_an_exec_that_falls_silent_is_broken(projects: Path) -> None:
    """Not even pings are answered: a network that is gone without a word."""
    silence = Silence(ping_s=0.1, broken_s=0.5)
    async with (
        cluster(projects, silence=silence) as made,
        made.transport.run(PROJECT, ["cat"]) as streams,
    ):
        await streams.stdin.send_all(b"x")
        assert await streams.stdout.receive_some(1) == b"x"
        made.proxy.is_silent = True
        with trio.fail_after(DEADLINE_S):
            with pytest.raises(trio.BrokenResourceError, match="silent"):
                await streams.stdout.receive_some(1)


@pytest.mark.slow
async def test_a_quiet_exec_whose_server_answers_pings_is_not_broken(projects: Path) -> None:
    silence = Silence(ping_s=0.05, broken_s=1.0)
    async with cluster(projects, silence=silence) as made:
        script = "read X; printf $X"
        async with made.transport.run(PROJECT, ["sh", "-c", script]) as streams:
            with trio.move_on_after(2.5):
                await streams.stdout.receive_some(1)
            await streams.stdin.send_all(b"still here\n")
            assert await streams.stdout.receive_some(100) == b"still"


@pytest.mark.slow
async def test_pings_of_the_server_are_answered(projects: Path) -> None:
    """The fake drops who does not answer them."""
    async with cluster(projects, ping_s=0.05) as made:
        script = "sleep 1; printf x"
        async with made.transport.run(PROJECT, ["sh", "-c", script]) as streams:
            assert await read_all(streams) == b"x"


async def test_at_most_sixteen_execs_are_open_in_a_pod(pods: Cluster) -> None:
    async def one() -> None:
        async with pods.transport.run(PROJECT, ["sh", "-c", "sleep 0.1"]) as streams:
            await read_all(streams)

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(one)
    assert pods.api.execs.open_most <= 16
    assert len(pods.api.execs.seen) >= 40


async def test_who_finds_no_place_among_the_execs_is_told(pods: Cluster) -> None:
    narrow = KubernetesTransport(pods.transport._open, execs_max=1, slot_s=0.05)
    async with narrow.run(PROJECT, ["cat"]):
        with pytest.raises(TransportError, match="1 execs are open"):
            async with narrow.run(PROJECT, ["true"]):
                pass
    async with narrow.run(PROJECT, ["sh", "-c", "printf x"]) as streams:
        assert await read_all(streams) == b"x"


async def test_a_cancelled_exec_leaves_no_connection(pods: Cluster) -> None:
    for _ in range(5):
        with trio.move_on_after(0.05):
            async with pods.transport.run(PROJECT, ["cat"]) as streams:
                await streams.stdout.receive_some(1)
    await until(lambda: pods.api.execs.open_now == 0, "the connections are closed")


async def test_an_error_in_the_block_comes_out_in_no_group(pods: Cluster) -> None:
    with pytest.raises(KeyError):
        async with pods.transport.run(PROJECT, ["cat"]):
            raise KeyError("mine")


async def test_no_secret_is_in_what_the_api_server_is_asked(pods: Cluster) -> None:
    what = sh("true", env={"TOKEN": "s3cret"}, stdin=b"s3cret")
    await observe(pods.executor, new_command(), what)
    assert not any("s3cret" in word for argv in pods.api.execs.seen for word in argv)


async def test_a_command_outlives_every_connection(pods: Cluster, projects: Path) -> None:
    command, instance = new_command(), await pods.executor.instance(PROJECT)
    async with pods.executor.attach(
        PROJECT,
        command,
        spec=sh("echo ready; while [ ! -e go-on ]; do sleep 0.01; done; echo end"),
        instance=instance,
        offsets=START,
    ) as attachment:
        await read_until(attachment, b"ready\n")
        pods.proxy.is_refusing = True
        pods.proxy.cut_all()
        (projects / PROJECT / "go-on").touch()
        pods.proxy.is_refusing = False
        seen = await read_to_end(attachment, Offsets(stdout=6))
    assert (seen.out, seen.exit.exit_code) == (b"end\n", 0)
