"""One trace from `POST` to each webhook's attempt, through real servers and a real receiver."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from signal import SIGTERM

import pytest
import trio

from tests.app.server import DEADLINE_S, Api, Json, Server, open_api, open_server, until_async
from tests.app.test_replicas import who_runs
from tests.app.test_webhooks import Sink, make
from tests.fakes.otlp import Collector, Seen, open_collector

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENTS = "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{CLIENTS}-01", "tracestate": "vendor=token"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with open_collector() as collector:
        yield collector


@pytest.fixture
def pair(
    quick_place: Path, migrated_dsn: str, tmp_path: Path, collector: Collector
) -> Iterator[tuple[Server, Server]]:
    settings = {
        "RDEV_DATABASE_DSN": migrated_dsn,
        "RDEV_PROJECTS_DIR": str(tmp_path / "projects"),
        "RDEV_LEASE_S": "2",
        "RDEV_DRAIN_DELAY_S": "0",
        "RDEV_OTLP_ENDPOINT": collector.url,
        "RDEV_TRACES_SAMPLE": "0",
        "RDEV_WEBHOOK_ALLOW_NETS": "127.0.0.0/8",
        "RDEV_WEBHOOK_SCHEDULE": "0.2,0.2",
    }
    secret = tmp_path / "secret"
    secret.write_text("x" * 64)
    settings["RDEV_SECRET_FILE"] = str(secret)
    with ExitStack() as stack:
        one = stack.enter_context(open_server(quick_place, **settings))
        two = stack.enter_context(open_server(quick_place, **settings))
        yield one, two


@asynccontextmanager
async def open_sink() -> AsyncIterator[Sink]:
    async with trio.open_nursery() as nursery:
        sink = Sink()
        serve = partial(trio.serve_tcp, sink.handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        sink.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/hooks/SECRETPATH"
        yield sink
        nursery.cancel_scope.cancel()


async def submit(api: Api, script: str, **headers: str) -> str:
    answer = await api.http.post(
        "/projects/demo/shell", json={"command": script}, headers=headers or SAMPLED
    )
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]["id"]


def gated(folder: Path) -> str:
    return f'echo "$TRACEPARENT $TRACESTATE"; while [ ! -e {folder}/gate ]; do sleep 0.02; done'


def one(spans: list[Seen], name: str) -> Seen:
    (found,) = [span for span in spans if span.name == name]
    return found


@pytest.mark.slow
async def test_one_trace_leads_from_the_post_over_a_killed_server_to_the_webhooks(
    pair: tuple[Server, Server], collector: Collector, tmp_path: Path
) -> None:
    async with open_sink() as sink, open_api(pair[0]) as api:
        await api.project()
        sink.answers = [(500, {})]
        await make(api, sink, events=["command.completed"])
        command = await submit(api, gated(tmp_path))
        await api.running(command)
        holder, other = await who_runs(command, *pair)
        until_ = trio.to_thread.run_sync
        names = lambda: {span.name for span in collector.trace(TRACE)}  # noqa: E731
        await until_(collector.await_, lambda: "claim" in names(), "its claim was told")
        holder.kill()
        await until_(collector.await_, lambda: "take over" in names(), "it was taken over")
        (tmp_path / "gate").touch()
        async with open_api(other) as still:
            assert (await still.ended(command))["status"] == "succeeded"
            told = (await still.get(f"/commands/{command}/output")).text.split()
        await sink.received(2)
        posts = lambda: [span for span in collector.trace(TRACE) if span.name == "POST"]  # noqa: E731
        await until_(collector.await_, lambda: len(posts()) == 2, "both attempts were told")

    spans = collector.trace(TRACE)
    request = one(spans, "POST /projects/{project}/shell")
    submitted, waited = one(spans, "submit shell"), one(spans, "queue wait")
    claim, over = one(spans, "claim"), one(spans, "take over")
    attempt = one(spans, "process shell")
    assert (request.kind, request.parent_id, request.state) == ("server", CLIENTS, "vendor=token")
    assert request.facts["http.request.method"] == "POST"
    assert request.facts["http.route"] == "/projects/{project}/shell"
    assert request.facts["http.response.status_code"] == 201
    assert (submitted.kind, submitted.parent_id) == ("producer", request.span_id)
    assert submitted.facts["messaging.message.id"] == command
    assert waited.parent_id == submitted.span_id
    # The attempt of the killed server was never told; what it had told hangs below it, and the
    # attempt of the other one names it.
    assert (attempt.kind, attempt.parent_id) == ("consumer", submitted.span_id)
    assert attempt.links == {claim.parent_id: {"rdev.link": "take_over"}}
    assert claim.parent_id not in {span.span_id for span in spans}
    assert over.parent_id == attempt.span_id
    assert claim.server != over.server
    assert attempt.facts["rdev.take_over"] is True
    assert (attempt.facts["rdev.left"], attempt.facts["rdev.status"]) == ("ended", "succeeded")
    assert attempt.facts["process.exit.code"] == 0
    for name in ("attach", "finish"):
        assert {s.parent_id for s in spans if s.name == name} <= {attempt.span_id, claim.parent_id}
        assert attempt.span_id in {s.parent_id for s in spans if s.name == name}
    # The command knows below which span it runs: the attempt that started it.
    assert told == [f"00-{TRACE}-{claim.parent_id}-01", "vendor=token"]
    first, second = posts()
    assert {first.parent_id, second.parent_id} == {submitted.span_id}
    assert (first.kind, first.is_error, second.is_error) == ("client", True, False)
    assert first.facts["error.type"] == "5xx"
    assert second.facts["http.request.resend_count"] == 1
    sent = [headers["traceparent"] for headers, _ in sink.requests]
    assert sent == [f"00-{TRACE}-{span.span_id}-01" for span in (first, second)]
    assert all("tracestate" not in headers for headers, _ in sink.requests)
    assert b"SECRETPATH" not in b"".join(collector.bodies)
    for span in spans:
        assert span.began_ns <= span.ended_ns, span
    assert waited.began_ns <= claim.ended_ns <= over.began_ns <= first.began_ns


@pytest.mark.slow
async def test_a_server_that_stops_tells_what_it_gave_back(
    pair: tuple[Server, Server], collector: Collector, tmp_path: Path
) -> None:
    async with open_api(pair[0]) as api:
        await api.project()
        command = await submit(api, gated(tmp_path))
        with trio.fail_after(DEADLINE_S):
            while not (await api.get(f"/commands/{command}/output")).text:
                await trio.sleep(0.02)
    holder, other = await who_runs(command, *pair)
    assert holder.end(SIGTERM) == 0
    found = [span for span in collector.trace(TRACE) if span.name == "process shell"]
    assert [span.facts["rdev.left"] for span in found] == ["given_back"], "before it ended"
    assert not found[0].is_error
    (tmp_path / "gate").touch()
    async with open_api(other) as api:
        await api.ended(command)
    assert other.end(SIGTERM) == 0
    before, after = [span for span in collector.trace(TRACE) if span.name == "process shell"]
    assert after.links == {before.span_id: {"rdev.link": "take_over"}}
    output = [span for span in collector.trace(TRACE) if span.name == "output"]
    assert before.span_id in {span.parent_id for span in output}


@pytest.fixture
def alone(quick_place: Path, collector: Collector) -> Iterator[Server]:
    """A server that records all, and tells its metrics each second."""
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url + "/",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20canaryOfTheCollector",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "OTEL_SERVICE_NAME": "rdev-of-the-test",
    }
    with open_server(quick_place, **settings) as server:
        yield server


def requests_of(server: Server) -> list[Json]:
    lines = map(json.loads, filter(lambda line: line.startswith("{"), server.log.splitlines()))
    return [line for line in lines if line["msg"] == "request completed"]


@pytest.mark.slow
async def test_lines_of_the_log_and_spans_name_the_same_traces(
    alone: Server, collector: Collector
) -> None:
    async with open_api(alone) as api:
        await api.project()
        await api.run("echo seen")
        unwanted = f"00-{'ab' * 16}-{CLIENTS}-00"
        await api.get("/projects", headers={"traceparent": unwanted})
    posted = [line for line in requests_of(alone) if line["path"].endswith("/shell")]
    trace_id = str(posted[0]["trace_id"])
    wanted = {"POST /projects/{project}/shell", "process shell", "output", "finish", "attach"}
    await trio.to_thread.run_sync(
        collector.await_,
        lambda: wanted <= {span.name for span in collector.trace(trace_id)},
        "the road of a command is told",
    )
    assert one(collector.trace(trace_id), "output").facts["rdev.stdout_bytes"] == 5
    assert collector.trace("ab" * 16) == [], "its client does not record it"
    assert all(len(str(line["trace_id"])) == 32 for line in requests_of(alone))
    assert {h["authorization"] for h in collector.headers} == {"Bearer canaryOfTheCollector"}
    assert "canaryOfTheCollector" not in alone.log
    probes = {"/health", "/ready", "/metrics"}
    assert not probes & {str(span.facts.get("url.path")) for span in collector.spans}


@pytest.mark.slow
async def test_the_metrics_of_otlp_have_the_names_of_the_page(
    alone: Server, collector: Collector
) -> None:
    async with open_api(alone) as api:
        await api.project()
        await api.run("true")
        text = (await api.get("/metrics")).text
    lines = [line.split() for line in text.splitlines() if line.startswith("# TYPE")]
    named = {line[2] for line in lines}
    has_series = {line.partition(" ")[0].partition("{")[0] for line in text.splitlines()}
    await trio.to_thread.run_sync(
        collector.await_,
        lambda: collector.metrics and "rdev_command_wait_seconds" in collector.metrics[-1],
        "the metrics came",
    )
    with_series = {name for name in named if {name, f"{name}_bucket"} & has_series}
    maps = Path(f"/proc/{alone.pid}/maps").read_text()
    assert "google/_upb" in maps, "so that its absence elsewhere says something"
    missing = with_series - set(collector.metrics[-1])
    assert missing == set()
    assert set(collector.metrics[-1]) <= named


@pytest.mark.slow
async def test_without_an_endpoint_the_context_is_handed_on_and_nothing_is_imported(
    quick_place: Path,
) -> None:
    with open_server(quick_place, RDEV_WEBHOOK_ALLOW_NETS="127.0.0.0/8") as server:
        async with open_sink() as sink, open_api(server) as api:
            await api.project()
            await make(api, sink, events=["command.completed"])
            command = await submit(api, 'echo "$TRACEPARENT $TRACESTATE"')
            silent = await submit(api, 'echo "[$TRACEPARENT]"', traceparent="none")
            own = await api.post(
                "/projects/demo/shell",
                {"command": 'echo "$TRACEPARENT$TRACESTATE"', "env": {"TRACEPARENT": "mine"}},
            )
            with trio.fail_after(DEADLINE_S):
                for id_ in (command, silent, own.json()["data"]["id"]):
                    await api.ended(id_)
            said = (await api.get(f"/commands/{command}/output")).text
            assert said == f"{SAMPLED['traceparent']} vendor=token\n"
            assert (await api.get(f"/commands/{silent}/output")).text == "[]\n"
            await sink.received(3)
            headers = [headers.get("traceparent") for headers, _ in sink.requests]
            assert sorted(headers, key=str) == [SAMPLED["traceparent"], None, None]
            assert (await api.get(f"/commands/{own.json()['data']['id']}/output")).text == "mine\n"
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert "google/_upb" not in maps, "protobuf's library"
        await until_async(lambda: len(requests_of(server)) > 3, "the lines are there")
        traced = [line for line in requests_of(server) if "trace_id" in line]
        assert {line["trace_id"] for line in traced} == {TRACE}
