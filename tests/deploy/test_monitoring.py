"""Rules, dashboards, scrape and log configuration: parsed by the programs that will read them, and
held against what a server exports and writes. What needs promtool or amtool is skipped without."""

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import yaml

from tests.app.server import Server, open_api, open_server, until
from tests.deploy.conftest import DEPLOY, ROOT, build, one, read_yaml

PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"
OPERATIONS = ROOT / "docs" / "operations"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
TOOL_S = 60

# The libraries' own metrics, and Prometheus' of its targets and alerts.
FOREIGN = {
    "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds",
    "process_max_fds", "process_start_time_seconds", "up", "ALERTS",
}  # fmt: skip
_METRIC = re.compile(r"\b(?:(?:http|rdev|process|python)_[a-z_0-9]+|up|ALERTS)\b")
_ALL_PANELS = {"timeseries", "gauge", "stat"}


def tool(name: str, package: str, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of Prometheus' programs; skips where it is absent."""
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}: apt-get install {package}")
    return subprocess.run(
        [name, *argv], capture_output=True, text=True, check=False, timeout=TOOL_S
    )


def promtool(*argv: str | Path) -> None:
    ended = tool("promtool", "prometheus", *argv)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def rules() -> list[dict[str, Any]]:
    (found,) = read_yaml((PROMETHEUS / "rules.yaml").read_text())
    return [rule for group in found["groups"] for rule in group["rules"]]


def generator(folder: Path) -> ModuleType:
    """The `generate.py` of a folder that is no package."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_generate", folder / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported() -> set[str]:
    """Every name that a query may use: the catalogue, which tests/app compares with a server."""
    found = re.findall(
        r"^\| `([a-z_]+)` \| (counter|gauge|histogram) \|",
        (OPERATIONS / "metrics.md").read_text(),
        re.MULTILINE,
    )
    names = set(FOREIGN)
    for name, type_ in found:
        parts = ("_bucket", "_sum", "_count") if type_ == "histogram" else ("",)
        names |= {name + part for part in parts}
    return names


def metrics_of(expression: str) -> set[str]:
    without_labels = re.sub(r"\{[^}]*\}", "", expression)
    return set(_METRIC.findall(re.sub(r'"[^"]*"', "", without_labels)))


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.name}: {panel['title']}", target["expr"]
    for block in re.findall(r"```promql\n(.*?)```", page("monitoring.md"), re.DOTALL):
        yield "monitoring.md", block


def said_in_passing() -> Iterator[tuple[str, str]]:
    """Names and expressions in the sentences of runbooks and of the page for troubles, and of which
    page."""
    for file in [
        *sorted((OPERATIONS / "runbooks").glob("*.md")),
        OPERATIONS / "troubleshooting.md",
    ]:
        for said in re.findall(r"`([^`]+)`", file.read_text()):
            # In prose a label stands for whatever value it has.
            said = re.sub(r"\{\w+\}", "", re.sub(r",\w+\}", "}", said))
            if _METRIC.match(said) or re.match(r"(sum|rate|max|histogram_quantile|deriv)\b", said):
                yield file.name, said


def page(name: str) -> str:
    return (OPERATIONS / name).read_text()


def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", PROMETHEUS / "rules.yaml")


@pytest.mark.slow
def test_each_alert_fires_under_its_fault_and_not_under_what_looks_like_it() -> None:
    promtool("test", "rules", PROMETHEUS / "rules_test.yaml")


def test_each_alert_has_cases_that_fire_and_cases_that_do_not() -> None:
    (cases,) = read_yaml((PROMETHEUS / "rules_test.yaml").read_text())
    found: dict[str, set[bool]] = {}
    for case in cases["tests"]:
        alert = case["name"].partition(":")[0]
        for asked in case["promql_expr_test"]:
            assert f'alertname="{alert}"' in asked["expr"]
            found.setdefault(alert, set()).add(bool(asked["exp_samples"]))
    assert found == {rule["alert"]: {True, False} for rule in rules()}


def test_the_alerts_of_the_guide_keep_their_names() -> None:
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in rules()}
    guide = {
        "RdevAPIHighErrorRate": "critical",
        "RdevAPIHighLatency": "warning",
        "RdevAPIPodDown": "critical",
        "RdevAPIHighCommandQueue": "warning",
        "RdevAPIHighRateLimit": "warning",
    }
    assert guide.items() <= severities.items()


def test_each_alert_says_what_it_is_and_has_a_runbook() -> None:
    for rule in rules():
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook"}, rule["alert"]
        runbook = ROOT / notes["runbook"]
        assert rule["alert"] in runbook.read_text(), runbook
    linked = {(ROOT / rule["annotations"]["runbook"]).name for rule in rules()}
    assert {file.name for file in (OPERATIONS / "runbooks").glob("*.md")} == linked
    listed = page("alerts.md")
    assert all(rule["alert"] in listed for rule in rules())


def test_a_runbook_says_what_it_means_where_to_look_and_what_to_do() -> None:
    for file in (OPERATIONS / "runbooks").glob("*.md"):
        headings = re.findall(r"^\*\*(.+?)\*\*", file.read_text(), re.MULTILINE)
        assert headings == ["What it means.", "Where to look.", "What to do."], file


def test_the_operators_object_is_made_of_the_rules() -> None:
    made = generator(PROMETHEUS)
    assert made.OBJECT.read_text() == made.text()
    (plain,) = read_yaml((PROMETHEUS / "rules.yaml").read_text())
    assert one(build("base"), "PrometheusRule", "rdev-api-alerts")["spec"] == plain


def test_an_overlay_without_the_operator_has_none_of_its_kinds() -> None:
    assert not [o for o in build("overlays/dev") if o["apiVersion"].startswith("monitoring.")]


@pytest.mark.parametrize("name", ["prometheus.yaml", "scrape-kubernetes.yaml"])
def test_promtool_takes_the_scrape_configuration(name: str, tmp_path: Path) -> None:
    """Debian builds Prometheus without discovery in Kubernetes: that block is read here."""
    (found,) = read_yaml((PROMETHEUS / name).read_text())
    (job,) = found["scrape_configs"]
    assert job["job_name"] == "rdev-api"
    if discovery := job.pop("kubernetes_sd_configs", None):
        assert discovery == [{"role": "endpoints", "namespaces": {"names": ["rdev"]}}]
        service = one(build("base"), "Service")
        kept = {c["source_labels"][0]: c["regex"] for c in job["relabel_configs"] if "regex" in c}
        assert kept == {
            "__meta_kubernetes_service_label_app": service["metadata"]["labels"]["app"],
            "__meta_kubernetes_endpoint_port_name": service["spec"]["ports"][0]["name"],
        }
    shutil.copy(PROMETHEUS / "rules.yaml", tmp_path)
    (tmp_path / name).write_text(yaml.safe_dump(found))
    promtool("check", "config", tmp_path / name)


def test_amtool_takes_the_alertmanagers_configuration() -> None:
    ended = tool(
        "amtool", "prometheus-alertmanager", "check-config", PROMETHEUS / "alertmanager.yaml"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (found,) = read_yaml((PROMETHEUS / "alertmanager.yaml").read_text())
    names = {rule["alert"] for rule in rules()}
    for rule in found["inhibit_rules"]:
        told = " ".join(rule["source_matchers"] + rule["target_matchers"])
        assert set(re.findall(r"RdevAPI\w+", told)) <= names


def test_each_metric_that_is_asked_for_is_exported() -> None:
    known = exported()
    for where, expression in (*expressions(), *said_in_passing()):
        found = metrics_of(expression)
        assert found, where
        # Histograms have names in sentences, too, that queries do not have.
        assert found <= known | {name.removesuffix("_count") for name in known}, where


def test_no_rate_is_asked_of_what_goes_up_and_down() -> None:
    """`rate` and `increase` take each way down for a restart. Gauges that only grow say so."""
    text = page("metrics.md")
    down = set(re.findall(r"^\| `([a-z_]+)` \| gauge \|(?!.*since the start)", text, re.MULTILINE))
    down |= {"process_resident_memory_bytes", "process_open_fds", "process_max_fds", "up"}
    assert "rdev_queue_running" in down
    assert "rdev_queue_claimed" not in down
    for where, expression in (*expressions(), *said_in_passing()):
        rated = set(re.findall(r"(?:rate|increase)\(\s*(\w+)", expression))
        assert not rated & down, where


def test_promtool_takes_every_expression(tmp_path: Path) -> None:
    """As recording rules, which is where promtool parses any expression."""
    every = [*expressions(), *said_in_passing()]
    asked = [{"record": f"asked:{n}", "expr": e} for n, (_, e) in enumerate(every)]
    assert len(asked) > 80
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    promtool("check", "rules", file)


def test_the_dashboards_are_what_the_description_says() -> None:
    made = generator(GRAFANA)
    assert {file.stem: file.read_text() for file in DASHBOARDS} == {
        name: made.dashboard(name) for name in made.DASHBOARDS
    }
    assert set(made.DASHBOARDS) == {"overview", "queue", "streams", "webhooks", "database"}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_is_a_screen_of_questions(file: Path) -> None:
    found = json.loads(file.read_text())
    panels = found["panels"]
    assert 4 <= len(panels) <= 12
    # `graph` is gone since Grafana 11.
    assert {panel["type"] for panel in panels} <= _ALL_PANELS
    assert all(panel["title"].endswith("?") for panel in panels)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(target["legendFormat"] for panel in panels for target in panel["targets"])


def test_the_overview_has_the_panels_of_the_guide() -> None:
    titles = [
        p["title"] for p in json.loads((GRAFANA / "dashboards/overview.json").read_text())["panels"]
    ]
    for name in ("Request rate", "Latency P99", "Error rate", "Active commands"):
        assert any(title.startswith(name) for title in titles), name


def test_grafana_is_told_where_the_dashboards_are() -> None:
    for file in GRAFANA.rglob("*.yaml"):
        (found,) = read_yaml(file.read_text())
        assert found["apiVersion"] == 1
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"


@pytest.fixture(scope="module")
def line(quick_place: Path) -> dict[str, Any]:
    """The line of a request, as a server wrote it."""
    with open_server(quick_place) as server:
        return _line_of_a_request(server)


def _line_of_a_request(server: Server) -> dict[str, Any]:
    async def ask() -> None:
        async with open_api(server) as api:
            await api.get("/projects/nowhere")

    trio.run(ask)
    until(lambda: "/projects/nowhere" in server.log, "it is logged", server)
    (found,) = [text for text in server.log.splitlines() if "/projects/nowhere" in text]
    decoded: dict[str, Any] = json.loads(found)
    return decoded


@pytest.mark.slow
def test_promtail_reads_fields_that_a_server_writes(line: dict[str, Any]) -> None:
    (found,) = read_yaml((PROMETHEUS / "promtail.yaml").read_text())
    (job,) = found["scrape_configs"]
    stages = {name: stage for each in job["pipeline_stages"] for name, stage in each.items()}
    read = stages["json"]["expressions"]
    assert list(stages) == ["cri", "json", "labels", "timestamp"]
    assert set(read.values()) <= set(line)
    # Labels make streams: only what has few values, which the client does not choose.
    assert set(stages["labels"]) == {"level"}
    assert stages["timestamp"]["source"] in read
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["time"])
    targets = {c["target_label"] for c in job["relabel_configs"] if "target_label" in c}
    assert targets == {"app", "pod", "__path__"}


@pytest.mark.slow
def test_the_queries_of_logs_name_fields_that_a_server_writes(line: dict[str, Any]) -> None:
    (found,) = read_yaml((PROMETHEUS / "promtail.yaml").read_text())
    (job,) = found["scrape_configs"]
    labels = {c["target_label"] for c in job["relabel_configs"] if "target_label" in c}
    labels |= set(job["pipeline_stages"][2]["labels"])
    queries = re.findall(r"```logql\n(.*?)```", page("monitoring.md"), re.DOTALL)
    assert len(queries) == 3
    for query in queries:
        (selector,) = re.findall(r"\{(.*?)\}", query)
        assert {part.partition("=")[0].strip() for part in selector.split(",")} <= labels
        for name in re.findall(r"\| (\w+) [><]", query) + re.findall(r"by \((\w+)\)", query):
            assert name in line, query
        # Else lines that are no JSON pass the filters by number, and fail a count.
        assert ("| json" in query) == ('| __error__=""' in query), query
        assert not re.search(r'__error__="" \|', query), query
    assert (line["level"], line["status"]) == ("info", 404)
    assert line["duration_ms"] < 1_000
