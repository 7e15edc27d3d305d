"""The manifests hang together, and are what a cluster of today takes."""

import os
import re
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from rdev.config import PREFIX, Settings, load_settings
from rdev.domain.commands import LANE_CAP, LaneClass
from rdev.domain.pods import LABEL_PREFIX
from tests.deploy.conftest import DEPLOY, ROOT, Object, build, one, read_yaml, server_of

# `policy/v1`, `autoscaling/v2` and the profile of the namespace are all there from 1.25 on.
VERSIONS = ("1.25.0", "1.37.0")
CLOSING_S = 10
# Kinds of an operator, whose schemas are not Kubernetes' own.
FOREIGN = {"monitoring.coreos.com/v1"}

PROJECT = DEPLOY / "k8s" / "project" / "pod.yaml"
EXAMPLE = DEPLOY / "k8s" / "base" / "secrets.example.yaml"


def pods_of(objects: tuple[Object, ...]) -> list[Object]:
    """The specs of all pods that come of these objects."""
    return [o["spec"]["template"]["spec"] for o in objects if "template" in o.get("spec", {})] + [
        o["spec"] for o in objects if o["kind"] == "Pod"
    ]


def settings_of(container: Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the server would read in this container, with a key and a secret in the files."""
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)
    for variable in container["env"]:
        # Files are checked when settings are read: these are of the machine that reads them here.
        if not variable["name"].endswith("_FILE"):
            monkeypatch.setenv(variable["name"], variable.get("value", "host=database.example"))
    return load_settings({})


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_strictly_valid(objects: tuple[Object, ...], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    checked = [*objects, *read_yaml(PROJECT.read_text()), *read_yaml(EXAMPLE.read_text())]
    for object_ in checked:
        if object_["apiVersion"] not in FOREIGN:
            validator.validate(object_, version, strict=True)


def test_every_file_is_strict_yaml() -> None:
    files = sorted((DEPLOY / "k8s").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        assert "\t" not in text
        assert read_yaml(text), file


def test_names_that_queries_hang_on(objects: tuple[Object, ...]) -> None:
    service = one(objects, "Service")
    (port,) = service["spec"]["ports"]
    pod = one(objects, "Deployment")["spec"]["template"]
    (opened,) = pod["spec"]["containers"][0]["ports"]

    assert one(objects, "Namespace", "rdev")
    assert (service["metadata"]["labels"]["app"], port["name"], port["port"]) == (
        "rdev-api",
        "http",
        8080,
    )
    assert port["targetPort"] == opened["name"] == "http"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["labels"]["app"] == "rdev-api"


def test_every_object_lives_in_the_namespace(objects: tuple[Object, ...]) -> None:
    for object_ in objects:
        if object_["kind"] != "Namespace":
            assert object_["metadata"]["namespace"] == "rdev", object_["kind"]
    assert [o["kind"] for o in objects].count("Secret") == 0


def test_prometheus_finds_the_service(objects: tuple[Object, ...]) -> None:
    monitors = [o for o in objects if o["kind"] == "ServiceMonitor"]
    service = one(objects, "Service")
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["endpoints"]
        assert set(monitor["spec"]) == {"selector", "endpoints"}
        assert (
            monitor["spec"]["selector"]["matchLabels"].items()
            <= service["metadata"]["labels"].items()
        )
        assert endpoint == {"port": "http", "path": "/metrics", "interval": "15s"}


def test_the_environment_is_settings_of_this_version(
    objects: tuple[Object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, container = server_of(objects)
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    settings = settings_of(container, monkeypatch)

    assert {variable["name"] for variable in container["env"]} <= known
    assert settings.bind.endswith(f":{container['ports'][0]['containerPort']}")
    assert not settings.is_embedded
    # The Service's own variables (RDEV_API_PORT …) would look like settings.
    assert pod["enableServiceLinks"] is False


def test_the_grace_of_the_pod_holds_drain_and_grace(
    objects: tuple[Object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, container = server_of(objects)
    settings = settings_of(container, monkeypatch)

    assert settings.drain_s > 0
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_s + settings.grace_s + CLOSING_S


def test_readiness_is_off_before_the_drain_is_over(
    objects: tuple[Object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, container = server_of(objects)
    probe = container["readinessProbe"]

    assert (
        probe["periodSeconds"] * probe["failureThreshold"]
        < settings_of(container, monkeypatch).drain_s
    )
    assert probe["httpGet"] == {"path": "/ready", "port": "http"}
    assert probe["timeoutSeconds"] > 1  # each of its checks takes at most one


def test_only_the_process_itself_restarts_a_server(objects: tuple[Object, ...]) -> None:
    _, container = server_of(objects)
    for name in ("livenessProbe", "startupProbe"):
        assert container[name]["httpGet"] == {"path": "/health", "port": "http"}
    liveness, startup = container["livenessProbe"], container["startupProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 60


def test_every_pod_is_hardened(objects: tuple[Object, ...]) -> None:
    pods = [*pods_of(objects), *pods_of(tuple(read_yaml(PROJECT.read_text())))]
    assert len(pods) == 3  # server, migration, project
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]


def test_only_the_server_finds_a_token(objects: tuple[Object, ...]) -> None:
    server, _ = server_of(objects)
    others = [pod for pod in pods_of(objects) if pod is not server]
    others += pods_of(tuple(read_yaml(PROJECT.read_text())))

    assert server["automountServiceAccountToken"] is True
    assert len(others) == 2  # migration, project
    assert all(pod["automountServiceAccountToken"] is False for pod in others)
    # Whoever runs under the account without asking gets none.
    assert one(objects, "ServiceAccount")["automountServiceAccountToken"] is False


def test_projects_are_pods_and_nothing_of_another_way_is_set(
    objects: tuple[Object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, container = server_of(objects)
    settings = settings_of(container, monkeypatch)

    assert settings.executor == "kubernetes"
    # The token, its namespace and the authority are where the kubelet puts them.
    assert (settings.kubeconfig, settings.namespace, settings.projects_dir) == (None, None, None)


def test_the_role_reads_the_namespace_that_everything_is_in(objects: tuple[Object, ...]) -> None:
    (rule,) = [r for r in one(objects, "Role")["rules"] if r["resources"] == ["namespaces"]]
    binding = one(objects, "RoleBinding")
    (namespace,) = [o for o in objects if o["kind"] == "Namespace"]

    assert rule["resourceNames"] == [namespace["metadata"]["name"]]
    assert [s["namespace"] for s in binding["subjects"]] == [namespace["metadata"]["name"]]


def test_what_the_server_writes_is_on_a_volume(
    objects: tuple[Object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, container = server_of(objects)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    written = [
        mount["mountPath"]
        for mount in container["volumeMounts"]
        if "emptyDir" in volumes[mount["name"]]
    ]
    state = settings_of(container, monkeypatch).state_dir

    assert any(state.is_relative_to(path) for path in written)
    assert "/tmp" in written
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


def test_the_secret_holds_exactly_what_is_read_of_it(objects: tuple[Object, ...]) -> None:
    (example,) = read_yaml(EXAMPLE.read_text())
    read = set()
    for pod in pods_of(objects):
        for container in pod["containers"]:
            for variable in container["env"]:
                if (source := variable.get("valueFrom")) is not None:
                    assert source["secretKeyRef"]["name"] == "rdev-api-secrets"
                    read.add(source["secretKeyRef"]["key"])
        for volume in pod.get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["secretName"] == "rdev-api-secrets"
                read |= {item["key"] for item in volume["secret"]["items"]}

    assert example["metadata"]["name"] == "rdev-api-secrets"
    assert read == set(example["stringData"])


def test_the_files_of_the_secret_are_where_the_settings_look(objects: tuple[Object, ...]) -> None:
    pod, container = server_of(objects)
    (volume,) = [v for v in pod["volumes"] if "secret" in v]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
    there = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
    looked = {v["value"] for v in container["env"] if v["name"].endswith("_FILE")}

    assert looked == there
    # Read by the pod's group, and nobody else.
    assert volume["secret"]["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_the_values_of_the_example_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = read_yaml(EXAMPLE.read_text())
    monkeypatch.setenv("RDEV_ADMIN_KEY", example["stringData"]["admin-key"])
    with pytest.raises(Exception, match="at least 32 characters"):
        load_settings({})
    assert len(example["stringData"]["secret"]) < 32


@pytest.mark.parametrize("folder", ["base", "overlays/production", "overlays/dev"])
def test_git_ignores_secrets(folder: str) -> None:
    inside = subprocess.run(
        ["git", "rev-parse", "--is-inside-work-tree"], cwd=ROOT, capture_output=True, check=False
    )
    if inside.returncode != 0:
        pytest.skip("no git repository around this checkout")
    path = DEPLOY / "k8s" / folder / "secrets.yaml"
    ignored = subprocess.run(
        ["git", "check-ignore", "--quiet", "--no-index", str(path)], cwd=ROOT, check=False
    )
    example = subprocess.run(
        ["git", "check-ignore", "--quiet", "--no-index", str(EXAMPLE)], cwd=ROOT, check=False
    )

    assert (ignored.returncode, example.returncode) == (0, 1)


def test_policies_choose_the_pods_that_are_made(objects: tuple[Object, ...]) -> None:
    project, _ = read_yaml(PROJECT.read_text())
    chosen = {
        policy["metadata"]["name"]: policy["spec"]["podSelector"]["matchLabels"].items()
        for policy in objects
        if policy["kind"] == "NetworkPolicy"
    }
    server = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    migration = one(objects, "Job", "rdev-migrate")["spec"]["template"]["metadata"]["labels"]

    assert chosen["rdev-api"] <= server
    assert chosen["rdev-migrate"] <= migration.items()
    assert chosen["rdev-projects"] <= project["metadata"]["labels"].items()


def test_projects_reach_nothing_inside_and_are_reached_by_nobody(
    objects: tuple[Object, ...],
) -> None:
    policy = one(objects, "NetworkPolicy", "rdev-projects")["spec"]

    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in policy
    for rule in policy["egress"]:
        for peer in rule["to"]:
            # (A cache of names on the node, beside a cloud's metadata.)
            if "ipBlock" in peer and peer["ipBlock"]["cidr"] != "169.254.20.10/32":
                ours = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"}
                theirs = {"fc00::/7", "fe80::/10", "::1/128"}
                assert (ours if "." in peer["ipBlock"]["cidr"] else theirs) <= set(
                    peer["ipBlock"]["except"]
                )
            else:
                assert {port["port"] for port in rule["ports"]} == {53}


def lets_out(policy: Object, address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether an address outside of all pods may be reached, as a network reads the policy."""
    ip = ip_address(address)
    for rule in policy["spec"]["egress"]:
        blocks = [peer["ipBlock"] for peer in rule.get("to", ()) if "ipBlock" in peer]
        is_meant = "to" not in rule or any(
            ip in ip_network(block["cidr"])
            and not any(ip in ip_network(inner) for inner in block.get("except", ()))
            for block in blocks
        )
        if is_meant and {"port": port, "protocol": protocol} in rule["ports"]:
            return True
    return False


@pytest.mark.parametrize("name", ["rdev-api", "rdev-projects", "rdev-migrate"])
def test_names_are_asked_of_a_cache_on_the_node(objects: tuple[Object, ...], name: str) -> None:
    """NodeLocal DNSCache: a pod that may not ask it knows no name at all."""
    policy = one(objects, "NetworkPolicy", name)

    assert lets_out(policy, "169.254.20.10", 53, "UDP")
    assert lets_out(policy, "169.254.20.10", 53, "TCP")
    assert not any(lets_out(policy, "169.254.20.10", port) for port in (22, 80, 443, 8080))


# What tells a machine who it is, and gives it tokens: most clouds, Azure's other one, Alibaba, EC2.
METADATA = ("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254")


@pytest.mark.parametrize("address", METADATA)
def test_no_pod_reaches_a_clouds_metadata(objects: tuple[Object, ...], address: str) -> None:
    for name in ("rdev-api", "rdev-projects", "rdev-migrate"):
        policy = one(objects, "NetworkPolicy", name)
        for port, protocol in ((53, "UDP"), (53, "TCP"), (22, "TCP"), (80, "TCP"), (443, "TCP")):
            assert not lets_out(policy, address, port, protocol), (name, port)


def test_projects_reach_the_internet(objects: tuple[Object, ...]) -> None:
    policy = one(objects, "NetworkPolicy", "rdev-projects")
    for port in (22, 80, 443):
        assert lets_out(policy, "192.0.2.1", port)
        assert lets_out(policy, "2001:db8::1", port)


def test_the_way_to_a_collector_is_the_servers_alone(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operations" / "tracing.md").read_text()
    (text,) = re.findall(r"```yaml\n(.+?)```", page, re.DOTALL)
    (tmp_path / "collector.yaml").write_text(text)
    base = os.path.relpath(DEPLOY / "k8s" / "base", tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: rdev\n"
        f"resources: [{base}, collector.yaml]\n"
    )
    objects = build(str(tmp_path.resolve()))
    policy = one(objects, "NetworkPolicy", "rdev-api-collector")
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    project, _ = read_yaml(PROJECT.read_text())

    assert policy["metadata"]["namespace"] == "rdev"
    assert chosen <= one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert not chosen <= project["metadata"]["labels"].items()
    (rule,) = policy["spec"]["egress"]
    assert f"RDEV_OTLP_ENDPOINT=http://collector:{rule['ports'][0]['port']}" in page
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    for version in VERSIONS:
        validator.validate(policy, version, strict=True)


def test_webhooks_may_leave_by_the_default_ports(objects: tuple[Object, ...]) -> None:
    rules = one(objects, "NetworkPolicy")["spec"]["egress"]
    (internet,) = [
        r
        for r in rules
        if any("ipBlock" in p and "except" in p["ipBlock"] for p in r.get("to", []))
    ]
    default = {int(port) for port in Settings.model_fields["webhook_ports"].default.split(",")}

    assert {port["port"] for port in internet["ports"]} == default


def test_the_project_is_one_that_the_watch_finds() -> None:
    pod, claim = read_yaml(PROJECT.read_text())
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounted = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}

    assert pod["metadata"]["labels"] == {
        f"{LABEL_PREFIX}/project": "true",
        f"{LABEL_PREFIX}/project-id": "demo",
    }
    assert "emptyDir" in mounted["/run/rdev"]
    assert mounted["/workspace"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # Process 1 tells one container from the next.
    assert pod["spec"]["shareProcessNamespace"] is False


def test_disruptions_take_one_server_and_production_has_two() -> None:
    production = build("overlays/production")
    assert one(production, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    scaler = one(production, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    assert scaler["scaleTargetRef"]["name"] == one(production, "Deployment")["metadata"]["name"]
    # Whoever scales is the autoscaler alone.
    assert "replicas" not in one(production, "Deployment")["spec"]
    assert one(build("overlays/dev"), "Deployment")["spec"]["replicas"] == 1


def test_production_names_the_api_servers_addresses() -> None:
    rules = one(build("overlays/production"), "NetworkPolicy")["spec"]["egress"]
    (rule,) = [r for r in rules if r["ports"] == [{"port": 6443, "protocol": "TCP"}]]

    assert [peer["ipBlock"]["cidr"] for peer in rule["to"]] == ["192.0.2.10/32"]


def test_server_and_migration_are_of_one_image(objects: tuple[Object, ...]) -> None:
    images = {container["image"] for pod in pods_of(objects) for container in pod["containers"]}

    assert len(images) == 1
    assert images.pop().rpartition(":")[2] == _version()


def test_the_page_says_how_many_execs_a_pod_has() -> None:
    """By the lanes, however far the autoscaler goes: not by the servers."""
    page = (ROOT / "docs" / "operations" / "deployment.md").read_text()

    assert LANE_CAP == {LaneClass.AGENT: 1, LaneClass.WORK: 4}
    assert "a project has five however many servers there are (one `claude` or `git`, four" in page


def test_every_manifest_is_explained() -> None:
    page = (ROOT / "docs" / "operations" / "deployment.md").read_text()
    for file in (DEPLOY / "k8s").rglob("*.yaml"):
        if file.name != "kustomization.yaml":
            assert f"`{file.relative_to(DEPLOY / 'k8s')}`" in page, file
    for name in ("Containerfile", "compose.yaml"):
        assert f"`deploy/{name}`" in page


def _version() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]
