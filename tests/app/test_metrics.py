"""The catalogue of metrics: a server exports what its page says, no more, no less; and
every road of a command leaves its traces there."""

import re
from pathlib import Path

import httpx2
import pytest
import trio
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.app.server import DEADLINE_S, Api, Server, metric, until_async

# The last section of the page.
OF_CLUSTERS = "\n## Only with projects in pods\n"
PAGE = Path(__file__).parents[2] / "docs" / "operations" / "metrics.md"
_ROW = re.compile(r"^\| `(?P<name>[a-z_]+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\|", re.MULTILINE)

# The monitoring guide: names, types, labels. Each of a group's labels is on those of the group that
# can have it: what is in flight has no status yet.
GUIDE = {
    "http_requests_total": ("counter", {"method", "path", "status"}),
    "http_request_duration_seconds": ("histogram", {"method", "path", "status"}),
    "http_requests_in_flight": ("gauge", {"method", "path"}),
    "rdev_commands_total": ("counter", {"project", "type", "status"}),
    "rdev_commands_active": ("gauge", {"project", "type"}),
    "rdev_command_duration_seconds": ("histogram", {"project", "type", "status"}),
    "rdev_sse_connections_total": ("counter", {"project"}),
    "rdev_sse_connections_active": ("gauge", {"project"}),
    "rdev_sse_events_sent_total": ("counter", {"project", "event_type"}),
    "rdev_auth_requests_total": ("counter", set()),
    "rdev_auth_failures_total": ("counter", {"reason"}),
    "rdev_ratelimit_requests_total": ("counter", set()),
    "rdev_ratelimit_rejected_total": ("counter", set()),
}
# The libraries' own: by their prefix.
_FOREIGN = ("process_", "python_")


def families(server: Server) -> dict[str, Metric]:
    """What is exported, by the name that stands in queries (histograms: without a suffix)."""
    text = httpx2.get(server.url + "/metrics", trust_env=False).text
    return {
        family.name + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(text)
        if not family.name.startswith(_FOREIGN)
    }


def documented(*, pods: bool = False) -> dict[str, tuple[str, set[str]]]:
    """What the page says of a server of local projects, or (`pods`) of one of a cluster's."""
    everywhere, _, of_clusters = PAGE.read_text().partition(OF_CLUSTERS)
    return {
        row["name"]: (row["type"], set(re.findall(r"`(\w+)`", row["labels"])))
        for row in _ROW.finditer(everywhere + of_clusters * pods)
    }


async def test_the_page_and_the_server_name_the_same_metrics(server: Server) -> None:
    exported = {name: family.type for name, family in families(server).items()}
    assert exported == {name: type_ for name, (type_, _) in documented().items()}


def test_every_metric_of_the_guide_is_in_the_catalogue_with_its_labels() -> None:
    found = documented()
    assert {name: found.get(name) for name in GUIDE} == GUIDE


async def test_what_is_exported_has_the_labels_of_the_page(api: Api, server: Server) -> None:
    await api.run("echo seen")
    command = await api.submit("echo streamed")
    await api.ended(command)
    await api.events(command)
    await api.http.get("/projects", headers={"Authorization": "Bearer wrong"})
    await until_async(lambda: metric(server, "rdev_commands_total", project="demo") >= 2, "counted")
    known = documented()
    labelled = 0
    for name, family in families(server).items():
        for sample in family.samples:
            labelled += 1
            assert set(sample.labels) - {"le"} == known[name][1], sample.name
    assert labelled > 100


async def test_a_command_is_counted_at_each_step_of_its_way(api: Api, server: Server) -> None:
    await api.project("steps")
    command = await api.submit("seq 10", project="steps")
    await api.ended(command)
    await api.events(command)
    labels = {"project": "steps", "type": "shell"}
    with trio.fail_after(DEADLINE_S):
        while metric(server, "rdev_commands_active", **labels) > 0:
            await trio.sleep(0.01)
    total = {**labels, "status": "succeeded"}
    assert metric(server, "rdev_commands_total", **total) == 1
    families_now = families(server)
    (ran,) = [
        sample
        for sample in families_now["rdev_command_duration_seconds"].samples
        if sample.name.endswith("_count") and sample.labels == total
    ]
    assert ran.value == 1
    (replayed,) = [
        sample.value
        for sample in families_now["rdev_sse_events_replayed_total"].samples
        if sample.labels == {"project": "steps"}
    ]
    assert replayed >= 10
    depth = families_now["rdev_queue_depth"].samples
    assert {sample.labels["priority"]: sample.value for sample in depth} == {
        "high": 0, "normal": 0, "low": 0
    }  # fmt: skip
    assert families_now["rdev_pool_size"].samples


async def test_what_clients_make_up_makes_no_series(api: Api, server: Server) -> None:
    for n in range(50):
        await api.http.request(f"METHOD{n}", f"/made/up/{n}")
        await api.http.get(f"/projects/made-up-{n}")
        await api.http.get(f"/commands/made-up-{n}/events")
    await trio.sleep(1.1)
    text = httpx2.get(server.url + "/metrics", trust_env=False).text
    assert "made" not in text
    assert "METHOD" not in text
    assert '/commands/{command}/events"' in text


@pytest.mark.parametrize("accept", ["text/plain; version=x", "application/openmetrics-text;a=b"])
async def test_an_accept_header_is_not_believed(server: Server, accept: str) -> None:
    headers = {"Accept": accept}
    answer = httpx2.get(server.url + "/metrics", headers=headers, trust_env=False)
    assert answer.status_code == 200
    assert "version=x" not in answer.headers["content-type"]


async def test_what_is_no_request_is_counted_too(server: Server) -> None:
    labels = {"method": "OTHER", "path": "unknown", "status": "400"}
    before = metric(server, "http_requests_total", **labels)
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(b"NONSENSE\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")
    await until_async(
        lambda: metric(server, "http_requests_total", **labels) == before + 1, "it is counted"
    )
    assert metric(server, "http_requests_in_flight", method="OTHER", path="unknown") == 0
